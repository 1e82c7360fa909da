"""Drafter-invariant verification for an engine that hands over the processed logits of a whole step at once.

The rule is that of `sampling/verification.py`: the token at a position is a function of prefix and noise, and a draft is
accepted exactly when it is that token. Here every drafted position is drawn, and what follows the first miss is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch

from atlas_kernels.noise import Stream
from atlas_rl.sampling.processing import entropies
from atlas_rl.sampling.verification import choose

NO_TOKEN = -1


@dataclass(slots=True)
class Drawn:
    """What one step drew.

    Attributes:
        token_ids: int64 `[batch, draft_len + 1]`: accepted drafts, then the recovered or bonus token, then `NO_TOKEN`.
        index: int64 `[batch, draft_len + 1]`, the row of logits that each token was drawn from; 0 where there is none.
        logprobs: float32 `[batch, draft_len + 1]`, of the processed distribution; 0 where there is no token.
        entropies: float32 `[batch, draft_len + 1]`, nats, of the processed distribution; 0 where there is no token.
        max_probs: float32 `[batch, draft_len + 1]`, likewise.
        num_undefined: Positions whose logits were no distribution: NaN, infinite, or all excluded.
    """

    token_ids: np.ndarray
    index: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray
    num_undefined: int


def draw(
    logits: torch.Tensor,
    drafts: np.ndarray,
    num_drafts: np.ndarray,
    keys: np.ndarray,
    starts: np.ndarray,
    greedy: np.ndarray,
    truncated: bool,
) -> Drawn:
    """Draw every position of a step and keep, per request, the tokens up to the first that is no accepted draft.

    Args:
        logits: float32 `[sum(num_drafts + 1), vocab]`, processed: request by request, the logits after its last committed
            token, then after each draft token. Rows that are no distribution (a request may exclude every token) are
            replaced in place by their likeliest token: vLLM goes on with some token, and so must we.
        drafts: int64 `[sum(num_drafts)]`, request by request; a negative one is never accepted.
        num_drafts: int64 `[batch]`.
        keys: uint64 `[batch]`, noise keys.
        starts: int64 `[batch]`, index in the whole sequence of the first token drawn.
        greedy: bool `[batch]`, requests that take the likeliest token.
        truncated: Whether some logits may be `-inf`.
    """
    counts = num_drafts + 1
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    offset = np.arange(len(row)) - first[row]
    probs = logits.softmax(dim=-1)
    max_probs = probs.amax(dim=-1).cpu().numpy()  # for the report, and NaN exactly where a row is no distribution
    undefined = np.flatnonzero(np.isnan(max_probs))
    if len(undefined):
        rows = torch.from_numpy(undefined).to(logits.device)
        certain = _certain(logits[rows])
        logits[rows], probs[rows] = certain, certain.softmax(dim=-1)
        max_probs[undefined], truncated = 1, True
    tokens = _choose(probs, keys[row], starts[row] + offset, greedy[row])
    width = int(counts.max(initial=1))
    padded = np.full((len(counts), width), NO_TOKEN)
    padded[row[offset < num_drafts[row]], offset[offset < num_drafts[row]]] = drafts
    drawn = np.full((len(counts), width), NO_TOKEN)
    drawn[row, offset] = tokens
    hits = (padded == drawn) & (drawn != NO_TOKEN)
    num_accepted = np.cumprod(hits, axis=1).sum(axis=1)
    kept = np.arange(width)[None] <= num_accepted[:, None]
    index = np.where(kept, first[:, None] + np.arange(width)[None], 0)
    chosen = torch.from_numpy(tokens).to(logits.device)
    logprobs = probs.gather(1, chosen[:, None])[:, 0].log()
    # Of every row, also of those behind a miss: to leave them out, the others would have to be copied, which costs more.
    nats = entropies(logits, probs, chosen, logprobs, truncated)
    of_rows = (logprobs.cpu().numpy(), nats, max_probs)
    of_kept = [np.where(kept, values[index], np.float32(0)) for values in of_rows]
    return Drawn(np.where(kept, drawn, NO_TOKEN), index, of_kept[0], of_kept[1], of_kept[2], len(undefined))


def scores(
    scored: torch.Tensor, drawn: Drawn, known: np.ndarray | None, num_logprobs: int, *, as_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of the kept tokens as vLLM reports them: the drawn one, then the `num_logprobs` likeliest.

    Args:
        scored: float32 `[positions, vocab]`, logits.
        drawn: What was drawn.
        known: Logprobs of the kept tokens under `scored`, as `drawn.logprobs`, where they are known.
        num_logprobs: Likeliest tokens per position; negative for all.
        as_logits: Report logits instead.

    Returns:
        Token ids int32 and values float32 `[batch * (draft_len + 1), 1 + num_logprobs]`, and the drawn tokens' ranks, int64;
        0 where there is no token.
    """
    kept = drawn.token_ids != NO_TOKEN
    index, token_ids = drawn.index[kept], drawn.token_ids[kept]
    rows, tokens = torch.from_numpy(index).to(scored.device), torch.from_numpy(token_ids).to(scored.device)[:, None]
    ids, found = tokens, scored[rows[:, None], tokens]
    normaliser = torch.zeros_like(found)
    if not as_logits and known is not None:
        own = torch.from_numpy(known[kept]).to(scored.device)[:, None]
        found, normaliser = own, found - own
    elif not as_logits:
        normaliser = scored[rows].logsumexp(dim=-1, keepdim=True)
        found = found - normaliser
    if num_logprobs:
        likeliest = scored[rows].topk(num_logprobs if num_logprobs > 0 else scored.shape[1], dim=-1)
        # A processed distribution has tokens of no probability, which JSON cannot name; nobody ranks behind them.
        ids, found = torch.cat([ids, likeliest.indices], 1), torch.cat([found, likeliest.values - normaliser], 1)
    places = torch.from_numpy(np.flatnonzero(kept)).to(scored.device)
    out_ids = torch.zeros(kept.size, ids.shape[1], dtype=torch.int32, device=scored.device)
    out_values = torch.zeros(kept.size, ids.shape[1], dtype=torch.float32, device=scored.device)
    out_ranks = torch.zeros(kept.size, dtype=torch.int64, device=scored.device)
    out_ids[places], out_values[places] = ids.to(torch.int32), found
    out_ranks[places] = torch.from_numpy(ranks(scored, index, token_ids)).to(scored.device)
    return out_ids, out_values, out_ranks


def ranks(logits: torch.Tensor, index: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How many tokens of a row are at least as likely as the one drawn from it: int64 `[n]`.

    Args:
        logits: float32 `[rows, vocab]`.
        index: int64 `[n]`, rows.
        tokens: int64 `[n]`.
    """
    if logits.device.type == "cpu":
        return _ranks(logits.contiguous().numpy(), index, tokens)
    values = logits[torch.from_numpy(index).to(logits.device)]
    own = values.gather(1, torch.from_numpy(tokens).to(logits.device)[:, None])
    return (values >= own).sum(dim=-1).cpu().numpy()


@numba.njit(cache=True, nogil=True)
def _ranks(logits: np.ndarray, index: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """One pass and nothing written, where torch would write every comparison out."""
    found = np.zeros(len(index), np.int64)
    for i in range(len(index)):
        row = logits[index[i]]
        own, count = row[tokens[i]], np.int32(0)
        for token in range(len(row)):
            count += np.int32(row[token] >= own)
        found[i] = count
    return found


def _certain(logits: torch.Tensor) -> torch.Tensor:
    """Each row's likeliest token, the first where there is none, as the only one: `[rows, vocab]` likewise."""
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
