"""Drafter-invariant verification for an engine that passes the processed logits of a whole step at once.

The rule is that of `sampling/verification.py`: the token at a position is a function of prefix and noise, and a draft is
accepted exactly when it is that token. Here every drafted position is drawn, and tokens after the first miss are
dropped.

On CUDA the kernel of `atlas_kernels.verify` draws, and all results come back in one download. On a CPU torch and numba
draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from atlas_kernels.dispatch import Implementation, kernels_run_on
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.noise import Stream
from atlas_kernels.verify import verify
from atlas_rl.decode.compile_kernels import announced
from atlas_rl.policy.upload import download, upload
from atlas_rl.sampling.processing import entropies
from atlas_rl.sampling.verification import choose

NO_TOKEN = -1


@dataclass(slots=True)
class DrawnTokens:
    """Tokens that one step drew.

    Attributes:
        token_ids: int64 `[batch, draft_len + 1]`: accepted drafts, then the recovered or bonus token, then `NO_TOKEN`.
        index: int64 `[batch, draft_len + 1]`, the row of logits that each token was drawn from; 0 where there is none.
        logprobs: float32 `[batch, draft_len + 1]`, of the processed distribution; 0 where there is no token.
        entropies: float32 `[batch, draft_len + 1]`, nats, of the processed distribution; 0 where there is no token.
        max_probs: float32 `[batch, draft_len + 1]`, likewise.
        undefined: bool `[batch, draft_len + 1]`, tokens whose logits were no distribution: NaN, infinite, or all excluded;
            None if all rows were distributions.
        ranks: int64 `[batch, draft_len + 1]`, tokens that are at least as likely; None where they were not counted.
    """

    token_ids: np.ndarray
    index: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray
    undefined: np.ndarray | None = None
    ranks: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of logits, request by request.

    Attributes:
        request: int64 `[rows]`.
        depth: int64 `[rows]`, drafts before the row's position.
        starts: int64 `[batch + 1]`, first row of each request.
        keys: uint64 `[rows]`, noise keys.
        positions: int64 `[rows]`, index in the whole sequence of the token drawn.
        greedy: bool `[rows]`.
    """

    request: np.ndarray
    depth: np.ndarray
    starts: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    greedy: np.ndarray


@dataclass(slots=True)
class _Decided:
    """The draw of every row, including rows after a miss: arrays `[rows]`, and `drafts` int64 `[sum(num_drafts)]`.

    `undefined` has the indices of rows that are no distribution.
    """

    tokens: np.ndarray
    drafts: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray
    undefined: np.ndarray
    ranks: np.ndarray | None


def draw(
    logits: torch.Tensor,
    drafts: np.ndarray | torch.Tensor,
    num_drafts: np.ndarray,
    keys: np.ndarray,
    starts: np.ndarray,
    greedy: np.ndarray,
    truncated: bool,
    *,
    ranked: bool = False,
    implementation: Implementation = "auto",
) -> DrawnTokens:
    """Draw every position of a step and keep, per request, the tokens up to the first that is not an accepted draft.

    Args:
        logits: `[sum(num_drafts + 1), vocab]`, processed: for each request, the logits after its last committed token,
            then after each draft token. float32; for the kernel also bfloat16 or float16. Rows that are no distribution
            (a request may exclude every token) are replaced in place by their likeliest token, because vLLM continues
            with some token.
        drafts: `[sum(num_drafts)]`, request by request, on the host or on the device of `logits`; negative ones are
            never accepted.
        num_drafts: int64 `[batch]`.
        keys: uint64 `[batch]`, noise keys.
        starts: int64 `[batch]`, index in the whole sequence of the first token drawn.
        greedy: bool `[batch]`, requests that take the likeliest token.
        truncated: Whether some logits may be `-inf`.
        ranked: Count ranks too, if that needs no extra download: with the kernel.
        implementation: "auto" is the kernel on CUDA, else torch and numba; "reference" is torch and numba.
    """
    counts = num_drafts + 1
    request = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    depth = np.arange(len(request)) - (ends - counts)[request]
    rows = _Rows(request, depth, np.append(0, ends), keys[request], starts[request] + depth, greedy[request])
    if implementation == "triton" or (implementation == "auto" and kernels_run_on(logits.device)):
        decided = _decided_by_kernel(logits, drafts, num_drafts, rows, ranked, implementation)
    else:
        decided = _decided_by_torch(logits, np.asarray(drafts, np.int64), rows, truncated)
    return _kept(decided, num_drafts, rows)


def compile_draw(vocab_size: int, device: torch.device) -> None:
    """Compile the GPU kernels of `draw`, before any request needs it."""
    if kernels_run_on(device):
        none, one = np.zeros(0, np.int64), np.zeros(1, np.int64)
        with announced("GPU", "some seconds"):
            logits = torch.zeros(1, vocab_size, dtype=torch.float32, device=device)
            draw(logits, none, one, one.view(np.uint64), one, one > 0, False)


def _kept(decided: _Decided, num_drafts: np.ndarray, rows: _Rows) -> DrawnTokens:
    """Per request, the drawn tokens up to the first that is not an accepted draft."""
    row, depth, first = rows.request, rows.depth, rows.starts[:-1]
    width = int((num_drafts + 1).max(initial=1))
    drafted = depth < num_drafts[row]
    padded = np.full((len(num_drafts), width), NO_TOKEN)
    padded[row[drafted], depth[drafted]] = decided.drafts
    drawn = np.full((len(num_drafts), width), NO_TOKEN)
    drawn[row, depth] = decided.tokens
    hits = (padded == drawn) & (drawn != NO_TOKEN)
    num_accepted = np.cumprod(hits, axis=1).sum(axis=1)
    kept = np.arange(width)[None] <= num_accepted[:, None]
    index = np.where(kept, first[:, None] + np.arange(width)[None], 0)
    # Without speculation, nothing would have looked at the rows after a miss.
    undefined = kept & np.isin(index, decided.undefined) if len(decided.undefined) else None
    nothing = np.float32(0)
    return DrawnTokens(
        token_ids=np.where(kept, drawn, NO_TOKEN),
        index=index,
        logprobs=np.where(kept, decided.logprobs[index], nothing),
        entropies=np.where(kept, decided.entropies[index], nothing),
        max_probs=np.where(kept, decided.max_probs[index], nothing),
        undefined=undefined,
        ranks=None if decided.ranks is None else np.where(kept, decided.ranks[index], 0),
    )


def _decided_by_torch(logits: torch.Tensor, drafts: np.ndarray, rows: _Rows, truncated: bool) -> _Decided:
    probs = logits.softmax(dim=-1)
    max_probs = probs.amax(dim=-1).cpu().numpy()  # for the report, and NaN exactly where a row is no distribution
    undefined = np.flatnonzero(np.isnan(max_probs))
    if len(undefined):
        at = torch.from_numpy(undefined).to(logits.device)
        certain = _certain(logits[at])
        logits[at], probs[at] = certain, certain.softmax(dim=-1)
        max_probs[undefined], truncated = 1, True
    tokens = _choose(probs, rows.keys, rows.positions, rows.greedy)
    chosen = torch.from_numpy(tokens).to(logits.device)
    logprobs = probs.gather(1, chosen[:, None])[:, 0].log()
    # Computed for every row, also after a miss: leaving rows out would copy the others, which costs more.
    nats = entropies(logits, probs, chosen, logprobs, truncated)
    return _Decided(tokens, drafts, logprobs.cpu().numpy(), nats, max_probs, undefined, None)


def _decided_by_kernel(
    logits: torch.Tensor,
    drafts: np.ndarray | torch.Tensor,
    num_drafts: np.ndarray,
    rows: _Rows,
    ranked: bool,
    implementation: Implementation,
) -> _Decided:
    """One upload, a dozen launches, one download; nothing as large as `logits` except one byte per rank and token."""
    device, num_rows = logits.device, len(rows.request)
    # Index of a row's draft, or of the -1 after the last draft.
    source = np.where(rows.depth < num_drafts[rows.request], np.arange(num_rows) - rows.request, len(drafts))
    keys, positions, at, greedy, starts = upload(
        [rows.keys.view(np.int64), rows.positions, source, rows.greedy, rows.starts], device
    )
    drafts = torch.nn.functional.pad(torch.as_tensor(drafts, dtype=torch.int64, device=device), (0, 1), value=NO_TOKEN)[
        at
    ]
    found = verify(logits, drafts, starts, keys, positions, greedy=greedy, implementation=implementation)
    integers = [found.token_ids, drafts]
    if ranked:
        integers.append((logits >= logits.gather(1, found.token_ids[:, None])).sum(dim=-1))
    *whole, logprobs, nats, max_probs = download(
        [*(each.to(torch.int32) for each in integers), found.logprobs, found.entropies, found.max_probs]
    )
    tokens, own_drafts, *ranks = (array.astype(np.int64) for array in whole)
    undefined = np.flatnonzero(np.isnan(max_probs))
    if len(undefined):
        where = torch.from_numpy(undefined).to(device)
        logits[where] = certain = _certain(logits[where])
        tokens[undefined] = certain.argmax(dim=-1).cpu().numpy()
        logprobs[undefined], nats[undefined], max_probs[undefined] = 0, 0, 1
        for counted in ranks:
            counted[undefined] = 1
    own_drafts = own_drafts[rows.depth < num_drafts[rows.request]]
    return _Decided(tokens, own_drafts, logprobs, nats, max_probs, undefined, ranks[0] if ranks else None)


def scores(
    scored: torch.Tensor, drawn: DrawnTokens, known: np.ndarray | None, num_logprobs: int, *, as_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of the kept tokens as vLLM reports them: the drawn one, then the `num_logprobs` likeliest.

    Args:
        scored: `[positions, vocab]`, logits.
        drawn: Tokens that were drawn.
        known: Logprobs of the kept tokens under `scored`, shaped like `drawn.logprobs`; None if unknown. If given,
            `drawn.ranks` are under `scored` too.
        num_logprobs: Likeliest tokens per position; negative for all.
        as_logits: Report logits instead.

    Returns:
        On the host: token ids int32 and values float32 `[batch * (draft_len + 1), 1 + num_logprobs]`, and the drawn
        tokens' ranks, int64; 0 where there is no token.
    """
    kept = drawn.token_ids != NO_TOKEN
    if as_logits:
        known = None
    if known is not None and drawn.ranks is not None and num_logprobs == 0:
        ids, values, counted = drawn.token_ids[kept][:, None], known[kept][:, None], drawn.ranks[kept]
    else:
        own = None if known is None else known[kept]
        ids, values, counted = _looked_up(
            scored, drawn.index[kept], drawn.token_ids[kept], own, num_logprobs, as_logits=as_logits
        )
    places = np.flatnonzero(kept)
    out_ids = np.zeros((kept.size, ids.shape[1]), np.int32)
    out_values = np.zeros((kept.size, ids.shape[1]), np.float32)
    out_ranks = np.zeros(kept.size, np.int64)
    out_ids[places], out_values[places], out_ranks[places] = ids, values, counted
    return torch.from_numpy(out_ids), torch.from_numpy(out_values), torch.from_numpy(out_ranks)


def _looked_up(
    scored: torch.Tensor,
    index: np.ndarray,
    token_ids: np.ndarray,
    own: np.ndarray | None,
    num_logprobs: int,
    *,
    as_logits: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, values `[n, 1 + num_logprobs]` and ranks `[n]` of tokens drawn from the rows `index`, in one download.

    A logprob is a logit minus its row's normaliser. Where the drawn tokens' logprobs `own` are known, the normaliser
    follows from them, and no row has to be summed.
    """
    device = scored.device
    rows, tokens = torch.from_numpy(index).to(device), torch.from_numpy(token_ids).to(device)[:, None]
    logits = scored[rows[:, None], tokens].float()
    if as_logits:
        values, normaliser = logits, torch.zeros_like(logits)
    elif own is None:
        normaliser = scored[rows].float().logsumexp(dim=-1, keepdim=True)
        values = logits - normaliser
    else:
        values = torch.from_numpy(own).to(device)[:, None]
        normaliser = logits - values
    ids = tokens
    if num_logprobs:
        likeliest = scored[rows].topk(num_logprobs if num_logprobs > 0 else scored.shape[1], dim=-1)
        # Tokens of probability 0 have the logprob -inf, which JSON cannot represent; they rank last.
        ids, values = torch.cat([ids, likeliest.indices], 1), torch.cat([values, likeliest.values - normaliser], 1)
    if device.type == "cpu":
        return ids.numpy(), values.numpy(), _ranks(scored.float().contiguous().numpy(), index, token_ids)
    counted = (scored[rows] >= scored[rows[:, None], tokens]).sum(dim=-1)
    own_ids, own_values, ranks = download([ids.to(torch.int32), values, counted.to(torch.int32)])
    return own_ids, own_values, ranks


@cached_njit(nogil=True)
def _ranks(logits: np.ndarray, index: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Ranks of tokens, in one pass that writes nothing; torch would materialise every comparison."""
    found = np.zeros(len(index), np.int64)
    for i in range(len(index)):
        row = logits[index[i]]
        own, count = row[tokens[i]], np.int32(0)
        for token in range(len(row)):
            count += np.int32(row[token] >= own)
        found[i] = count
    return found


def _certain(logits: torch.Tensor) -> torch.Tensor:
    """Logits `[rows, vocab]` with each row's likeliest token (the first if there is none) as the only one."""
    likeliest = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(dim=-1, keepdim=True)
    return torch.full_like(logits, -torch.inf).scatter_(1, likeliest, 0.0)


def _choose(probs: torch.Tensor, keys: np.ndarray, positions: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    if greedy.all():
        return choose(probs, keys, positions, Stream.TARGET, greedy=True)
    tokens = choose(probs, keys, positions, Stream.TARGET, greedy=False)
    if greedy.any():
        rows = torch.from_numpy(np.flatnonzero(greedy)).to(probs.device)
        tokens[greedy] = choose(probs[rows], keys[greedy], positions[greedy], Stream.TARGET, greedy=True)
    return tokens
