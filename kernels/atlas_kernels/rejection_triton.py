"""The Triton kernels of `rejection`: `choose_splits` with exclusions, a pass over the draft vocabulary, and the decision."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from atlas_kernels.noise import Stream
from atlas_kernels.noise_triton import exponentials_of, uniform
from atlas_kernels.rows import PackedRows
from atlas_kernels.verify_triton import (
    best_split,
    empty_results,
    join_sums,
    launch_splits,
    most_splits,
    processed_logits,
    row_arguments,
    store_figures,
)

RESIDUAL_TILE = 1024
"""Draft tokens per program of the second pass."""
RESIDUAL_WARPS = 4


@triton.jit(
    do_not_specialize=["num_draft_tokens", "splits"],
    do_not_specialize_on_alignment=["draft_token_ids", "draft_vocab", "keys", "positions"],
)
def residual_splits(
    logits, allowed, draft_token_ids, draft_probs, draft_vocab, keys, positions, sums, residual_scores, residual_tokens,
    temperature, vocab, num_draft_tokens, logits_stride, allowed_stride, splits,
    STREAM: tl.constexpr, SCALED: tl.constexpr, HAS_ALLOWED: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Draws from `(p - q)+` over a tile of the draft vocabulary; the grid and both results are `[rows, tiles]`.

    A draw is an argmax, so p need not be normalised: with m and Z = sum exp(l - m) of the first pass,
    `(exp(l - m) - q Z)+` suffices. Adding m puts its scores on the first pass's scale.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, position = tl.load(keys + row), tl.load(positions + row)
    peak, total, _ = join_sums(sums, row, splits, SPLITS)
    column = tl.arange(0, TILE) + tile * TILE
    inside = column < num_draft_tokens
    ids = tl.load(draft_vocab + column, mask=inside, other=vocab).to(tl.int32)
    row_logits, row_allowed = logits + row * logits_stride, allowed + row * allowed_stride
    x = processed_logits(row_logits, row_allowed, ids, vocab, temperature, SCALED, HAS_ALLOWED)
    # A row without a draft draws from p: nothing is subtracted, whatever its draft probabilities hold.
    drafted = tl.where(tl.load(draft_token_ids + row) >= 0, num_draft_tokens, 0)
    q = tl.load(draft_probs + row * num_draft_tokens + column, mask=column < drafted, other=0.0)
    residual = tl.maximum(tl.exp(x - peak) - q * total, 0.0)
    e = exponentials_of(key, position, ids, STREAM)
    score = tl.log(residual.to(tl.float64)) - tl.log(e.to(tl.float64)) + peak.to(tl.float64)
    best = tl.max(score, axis=0)
    at = row * tl.num_programs(1) + tile
    tl.store(residual_scores + at, best)
    tl.store(residual_tokens + at, tl.min(tl.where(score == best, ids, vocab), axis=0))


@triton.jit
def better_split(scores, tokens, row, splits, score, token, SPLITS: tl.constexpr):
    """Score and token of a row's best split, or the given ones if no split is better."""
    other_score, other_token, _ = best_split(scores, tokens, row, splits, SPLITS)
    return tl.maximum(score, other_score), tl.where(other_score > score, other_token, token)


@triton.jit
def draft_probability(draft_probs, column_of, row, draft, num_draft_tokens):
    """The probability that a row's draft was drawn with; 0 without a draft or outside of the draft vocabulary."""
    column = tl.load(column_of + draft, mask=draft >= 0, other=-1)
    return tl.load(draft_probs + row * num_draft_tokens + column, mask=column >= 0, other=0.0)


@triton.jit(
    do_not_specialize=["num_draft_tokens", "splits", "tiles"],
    do_not_specialize_on_alignment=["draft_token_ids", "column_of", "row_starts", "keys", "positions"],
)
def finish_rejection(
    logits, allowed, scores, tokens, sums, residual_scores, residual_tokens, draft_token_ids, draft_probs, column_of,
    row_starts, keys, positions, token_ids, num_accepted, logprobs, entropies, max_probs,
    temperature, vocab, num_draft_tokens, logits_stride, allowed_stride, splits, tiles,
    ACCEPT_STREAM: tl.constexpr, ONE_HOT: tl.constexpr, SCALED: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes the decision and figures of every row of one request, and its accepted count; grid `[batch]`."""
    request = tl.program_id(0)
    accepted, standing = 0, 1
    for row in range(tl.load(row_starts + request), tl.load(row_starts + request + 1)):
        draft = tl.load(draft_token_ids + row)
        has_draft = draft >= 0
        score, recovered, _ = best_split(scores, tokens, row, splits, SPLITS)
        peak, total, moment = join_sums(sums, row, splits, SPLITS)
        q = 1.0
        if not ONE_HOT:
            score, recovered = better_split(residual_scores, residual_tokens, row, tiles, score, recovered, TILES)
            q = draft_probability(draft_probs, column_of, row, draft, num_draft_tokens)
        row_logits, row_allowed = logits + row * logits_stride, allowed + row * allowed_stride
        drafted = tl.where(has_draft, draft, vocab)  # beyond the vocabulary: probability 0
        drafted_logit = processed_logits(row_logits, row_allowed, drafted, vocab, temperature, SCALED, HAS_ALLOWED)
        p = tl.exp(drafted_logit - peak) / total
        likely = uniform(tl.load(keys + row), tl.load(positions + row), ACCEPT_STREAM) * q < p
        stands = has_draft & (likely | (score == float("-inf")))
        token = tl.where(stands, draft, recovered)
        logit = processed_logits(row_logits, row_allowed, token, vocab, temperature, SCALED, HAS_ALLOWED)
        tl.store(token_ids + row, token)
        store_figures(logprobs, entropies, max_probs, row, logit, peak, total, moment)
        standing = tl.where(stands, standing, 0)
        accepted += standing
    tl.store(num_accepted + request, accepted)


def rejection_triton(
    rows: PackedRows, draft_probs: torch.Tensor | None, draft_vocab: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The fields of `atlas_kernels.verify.Verification`; arguments as in `atlas_kernels.rejection.verify_by_rejection`."""
    results = empty_results(rows)
    if not len(rows.logits):
        return results[0], results[1].zero_(), *results[2:]
    rows = rows.contiguous()
    one_hot = draft_probs is None or draft_vocab is None
    # A pointer must be passed even if nothing is read through it; the only column of a one-hot draft is itself.
    column_of = rows.draft_token_ids if draft_vocab is None else _inverted(draft_vocab, rows.logits.shape[1])
    scores, tokens, sums = launch_splits(rows, stream=Stream.RECOVER, exclude=1 if one_hot else 2, excluded=column_of)
    arguments = row_arguments(rows) | {
        "draft_token_ids": rows.draft_token_ids,
        "draft_probs": None if draft_probs is None else draft_probs.contiguous(),
        "num_draft_tokens": 0 if draft_vocab is None else len(draft_vocab),
        "sums": sums,
        "splits": scores.shape[1],
        "SPLITS": most_splits(rows.logits.shape[1], rows.logits.device),
    }
    residual_scores, residual_tokens = None, None
    if draft_vocab is not None:
        residual_scores, residual_tokens = _launch_residual(arguments, draft_vocab.contiguous(), len(rows.logits))
    tiles = 1 if residual_scores is None else residual_scores.shape[1]
    token_ids, num_accepted, logprobs, entropies, max_probs = results
    finish_rejection[(rows.batch,)](
        **arguments,
        scores=scores,
        tokens=tokens,
        residual_scores=residual_scores,
        residual_tokens=residual_tokens,
        column_of=column_of,
        row_starts=rows.row_starts,
        token_ids=token_ids,
        num_accepted=num_accepted,
        logprobs=logprobs,
        entropies=entropies,
        max_probs=max_probs,
        tiles=tiles,
        ACCEPT_STREAM=int(Stream.ACCEPT),
        ONE_HOT=one_hot,
        TILES=triton.next_power_of_2(triton.cdiv(rows.logits.shape[1], RESIDUAL_TILE)),
        num_warps=1,
    )
    return results


def _inverted(draft_vocab: torch.Tensor, vocab: int) -> torch.Tensor:
    """Column of every token of the vocabulary, -1 for tokens without one: int32 `[vocab]`."""
    columns = torch.arange(len(draft_vocab), dtype=torch.int32, device=draft_vocab.device)
    return columns.new_full((vocab,), -1).index_copy_(0, draft_vocab, columns)


def _launch_residual(
    arguments: dict[str, Any], draft_vocab: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual_splits` over all rows: its scores and tokens `[rows, tiles]`."""
    tiles = max(triton.cdiv(len(draft_vocab), RESIDUAL_TILE), 1)
    scores = torch.empty(num_rows, tiles, dtype=torch.float64, device=draft_vocab.device)
    tokens = torch.empty(num_rows, tiles, dtype=torch.int32, device=draft_vocab.device)
    residual_splits[(num_rows, tiles)](
        **arguments,
        draft_vocab=draft_vocab,
        residual_scores=scores,
        residual_tokens=tokens,
        STREAM=int(Stream.RECOVER),
        TILE=RESIDUAL_TILE,
        num_warps=RESIDUAL_WARPS,
    )
    return scores, tokens
