"""Turns the policy's logits into the distribution that is sampled.

The order is that of `transformers.generate`: repetition penalty, suppressed tokens, temperature, top-k, top-p, min-p.
`atlas_kernels.truncate` does the last three; it keeps the same tokens on every device, and defines which of equal ones
it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from atlas_kernels.dispatch import implementation_on
from atlas_kernels.noise import BLOCK
from atlas_kernels.truncate import truncate
from atlas_rl.core import SamplingParams
from atlas_rl.policy.upload import uploaded

_WIDE_NATS = 1e4  # differences of larger float32 numbers are off by 1e-3 and more


def process(logits: torch.Tensor, sampling: SamplingParams, prefixes: torch.Tensor | None) -> torch.Tensor:
    """Logits of the processed distribution, `-inf` for excluded tokens.

    Args:
        logits: float32 `[rows, vocab]`; may be changed in place.
        sampling: Sampling parameters. Greedy sampling keeps the temperature at 1: the choice is the same, and the
            returned logprobs are the policy's own instead of zeros.
        prefixes: int64 `[rows, n]`, ids of all tokens before each position, repetitions allowed (`padded_prefixes`);
            needed with a repetition penalty, else None.

    Returns:
        float32 `[rows, vocab]`.
    """
    if sampling.repetition_penalty != 1:
        assert prefixes is not None
        seen, penalty = logits.gather(1, prefixes), sampling.repetition_penalty
        # A repeated token is written several times, always with the same value.
        logits.scatter_(1, prefixes, torch.where(seen < 0, seen * penalty, seen / penalty))
    if sampling.suppress_tokens:
        logits.index_fill_(1, _existing(sampling.suppress_tokens, logits), -torch.inf)
    if sampling.greedy:
        return logits
    if sampling.truncates:
        temperature, how = sampling.temperature, implementation_on(logits.device)
        return truncate(logits, sampling.truncation, temperature=temperature, out=logits, implementation=how)
    return logits if sampling.temperature == 1 else logits.div_(sampling.temperature)


def _existing(token_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """The tokens that `logits` `[rows, vocab]` have: int64 `[n]` on their device. Others are never drawn anyway."""
    here = [token for token in token_ids if 0 <= token < logits.shape[1]]
    return uploaded(np.array(here, np.int64), logits.device)


def padded_prefixes(texts: np.ndarray, rows: np.ndarray, ends: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids before some positions, as `process` takes them, in one upload for all rows.

    Args:
        texts: int32 `[texts, n]`.
        rows: int64 `[positions]`, the text of each position.
        ends: int64 `[positions]`, number of tokens of its text before it, at least 1.
        device: Device of the result.

    Returns:
        int64 `[positions, n]` on `device`; after its end a row repeats its first token.
    """
    packed = uploaded(np.concatenate([texts.ravel(), rows, ends]).astype(np.int32), device)
    known, row, end = packed.split([texts.size, len(rows), len(ends)])
    found = known.view(texts.shape).index_select(0, row)
    before = torch.arange(texts.shape[1], device=device) < end[:, None]
    return torch.where(before, found, found[:, :1]).long()


def entropies(
    logits: torch.Tensor, probs: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor, truncated: bool
) -> np.ndarray:
    """Entropy in nats of every row: log Z - sum p l, with log Z taken from one token whose logprob is known.

    Args:
        logits: Processed logits `[rows, vocab]`; every row is a distribution.
        probs: Their softmax `[rows, vocab]`.
        tokens: int64 `[rows]`, tokens of non-zero probability.
        logprobs: float32 `[rows]`, their logprobs.
        truncated: Whether the caller has excluded tokens. Tokens that the policy itself excludes cost a second pass.

    Returns:
        float32 `[rows]`.
    """
    # Excluded tokens have probability 0 and logit -inf: their product must be 0, not NaN.
    finite = logits.masked_fill(probs == 0, 0.0) if truncated else logits
    log_normalisers = logits.gather(1, tokens[:, None])[:, 0] - logprobs
    found = torch.stack([log_normalisers - torch.linalg.vecdot(probs, finite), log_normalisers]).cpu().numpy()
    if (np.abs(found) < _WIDE_NATS).all():
        return found[0]
    centred = (logits - logits.amax(dim=-1, keepdim=True)).masked_fill(probs == 0, 0.0)
    log_normalisers = centred.gather(1, tokens[:, None])[:, 0] - logprobs
    return (log_normalisers - torch.linalg.vecdot(probs, centred)).cpu().numpy()


def block_maxima(probs: torch.Tensor) -> torch.Tensor:
    """Largest value of each block of `BLOCK` tokens: `[rows, ceil(vocab / BLOCK)]`."""
    rows, vocab = probs.shape
    whole = vocab // BLOCK * BLOCK
    maxima = probs[:, :whole].view(rows, -1, BLOCK).amax(dim=-1)
    if whole < vocab:
        maxima = torch.cat([maxima, probs[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    return maxima
