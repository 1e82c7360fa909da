"""The eager reference of `verify`: every score materialised, in float64."""

from __future__ import annotations

import torch

from atlas_kernels import noise
from atlas_kernels.noise import Stream
from atlas_kernels.rows import PackedRows


def verify_reference(rows: PackedRows) -> tuple[torch.Tensor, ...]:
    """The fields of `atlas_kernels.verify.Verification`."""
    processed = processed_logits(rows.logits, rows.temperature, rows.allowed)
    scores = processed
    if rows.temperature > 0:
        scores = noisy_scores(processed, rows.keys, rows.positions, Stream.TARGET)
        if rows.greedy is not None:
            scores = torch.where(rows.greedy[:, None], processed, scores)
    token_ids = first_argmax(scores)
    num_accepted = count_accepted(token_ids == rows.draft_token_ids, rows.row_starts)
    return token_ids, num_accepted, *summarise(processed.log_softmax(dim=-1), token_ids)


def summarise(log_probs: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(logprobs, entropies, max_probs)` of a `Verification`, from float64 `[rows, vocab]`."""
    probs = log_probs.exp()
    # Excluded tokens have probability 0 and log-probability -inf: their product must be 0, not NaN.
    entropies = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(dim=-1)
    logprobs = log_probs.gather(1, token_ids[:, None])[:, 0]
    return logprobs.float(), entropies.float(), probs.amax(dim=-1).float()


def processed_logits(logits: torch.Tensor, temperature: float, allowed: torch.Tensor | None) -> torch.Tensor:
    """Logits of the sampled distribution: float64 `[rows, vocab]`, with values representable in float32."""
    processed = logits.float()
    if temperature not in (0, 1):
        # Division by a tensor stays a division; on CUDA, by a Python number it becomes a multiplication by its
        # reciprocal.
        processed = processed / torch.tensor(temperature, dtype=torch.float32, device=logits.device)
    if allowed is not None:
        processed = processed.masked_fill(~allowed, float("-inf"))
    return processed.double()


def noisy_scores(
    log_weights: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, stream: Stream
) -> torch.Tensor:
    """`log w(x) - log E(x)`: float64 `[rows, vocab]`; its argmax is a draw from the normalised `w`."""
    e = noise.exponentials(keys, positions, int(stream), log_weights.shape[1])
    return log_weights - e.double().log()


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """The first of each row's largest scores: int64 `[rows]` (`Tensor.argmax` does not promise the first).

    Returns 0 for a row with a NaN, which equals nothing: an index out of range would abort the whole process on a GPU.
    """
    vocab = scores.shape[1]
    tokens = torch.arange(vocab, device=scores.device)
    first = torch.where(scores == scores.amax(dim=-1, keepdim=True), tokens, vocab).amin(dim=-1)
    return first.where(first < vocab, 0)


def count_accepted(stands: torch.Tensor, row_starts: torch.Tensor) -> torch.Tensor:
    """Accepted drafts before the first rejected one: int64 `[batch]` (`stands` bool `[rows]`)."""
    num_rows = len(stands)
    rows = torch.arange(num_rows + 1, device=stands.device)
    fallen = torch.where(torch.nn.functional.pad(stands, (0, 1)), num_rows, rows)
    first_fallen = fallen.flip(0).cummin(0).values.flip(0)
    return torch.minimum(first_fallen[row_starts[:-1]], row_starts[1:]) - row_starts[:-1]
