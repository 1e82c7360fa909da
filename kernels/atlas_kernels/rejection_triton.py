"""The Triton kernels of `rejection`: `choose_splits` with exclusions, a pass over the draft vocabulary, and the decision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atlas_kernels.noise_triton import BLOCK, block_minima, excess, uniform
from atlas_kernels.verify_triton import best_split, empty_results, join_sums, launch_splits, processed_logits
from atlas_rl.rollout.noise import Stream

RESIDUAL_TILE = 1024
"""Draft tokens per program of the second pass."""
RESIDUAL_WARPS = 4


@triton.jit
def residual_splits(
    logits,
    allowed,
    draft_token_ids,
    draft_probs,
    draft_vocab,
    keys,
    positions,
    sums,
    residual_scores,
    residual_tokens,
    temperature,
    vocab,
    num_draft_tokens,
    logits_stride,
    allowed_stride,
    splits,
    STREAM: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The best of `(p - q)+` over a tile of the draft vocabulary; grid `[rows, tiles]`, as are both results.

    A draw is an argmax, so p need not be normalised: with m and Z = sum exp(l - m) of the first pass, `(exp(l - m) - q Z)+`
    will do, and its scores are on the first pass's scale once m is added.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, position = tl.load(keys + row), tl.load(positions + row)
    peak, total, _ = join_sums(sums, row, splits, SPLITS)
    column = tl.arange(0, TILE) + tile * TILE
    inside = column < num_draft_tokens
    ids = tl.load(draft_vocab + column, mask=inside, other=vocab).to(tl.int32)
    row_logits, row_allowed = logits + row * logits_stride, allowed + row * allowed_stride
    x = processed_logits(row_logits, row_allowed, ids, vocab, temperature, SCALED, HAS_ALLOWED)
    # A row without a draft draws from p: there nothing is taken off it, whatever its draft probabilities hold.
    drafted = tl.where(tl.load(draft_token_ids + row) >= 0, num_draft_tokens, 0)
    q = tl.load(draft_probs + row * num_draft_tokens + column, mask=column < drafted, other=0.0)
    residual = tl.maximum(tl.exp(x - peak) - q * total, 0.0)
    minimum, lane = block_minima(key, position, ids // BLOCK, STREAM)
    e = tl.where(ids % BLOCK == lane, minimum, minimum + excess(key, position, ids, STREAM))
    score = tl.log(residual.to(tl.float64)) - tl.log(e.to(tl.float64)) + peak.to(tl.float64)
    best = tl.max(score, axis=0)
    at = row * tl.num_programs(1) + tile
    tl.store(residual_scores + at, best)
    tl.store(residual_tokens + at, tl.min(tl.where(score == best, ids, vocab), axis=0))


@triton.jit
def finish_rejection(
    logits,
    allowed,
    scores,
    tokens,
    sums,
    residual_scores,
    residual_tokens,
    draft_token_ids,
    draft_probs,
    column_of,
    row_starts,
    keys,
    positions,
    token_ids,
    num_accepted,
    logprobs,
    entropies,
    max_probs,
    temperature,
    vocab,
    num_draft_tokens,
    logits_stride,
    allowed_stride,
    splits,
    tiles,
    ACCEPT_STREAM: tl.constexpr,
    ONE_HOT: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Decision and figures of every row of one request, and its accepted count; grid `[batch]`."""
    request = tl.program_id(0)
    accepted, standing = 0, 1
    for row in range(tl.load(row_starts + request), tl.load(row_starts + request + 1)):
        draft = tl.load(draft_token_ids + row)
        has_draft = draft >= 0
        score, recovered, _ = best_split(scores, tokens, row, splits, SPLITS)
        peak, total, moment = join_sums(sums, row, splits, SPLITS)
        q = 1.0
        if not ONE_HOT:
            residual_score, residual_token, _ = best_split(residual_scores, residual_tokens, row, tiles, TILES)
            recovered = tl.where(residual_score > score, residual_token, recovered)
            score = tl.maximum(score, residual_score)
            column = tl.load(column_of + draft, mask=has_draft, other=-1)
            q = tl.load(draft_probs + row * num_draft_tokens + column, mask=column >= 0, other=0.0)
        row_logits, row_allowed = logits + row * logits_stride, allowed + row * allowed_stride
        drafted = tl.where(has_draft, draft, vocab)  # beyond the vocabulary: probability 0
        drafted_logit = processed_logits(row_logits, row_allowed, drafted, vocab, temperature, SCALED, HAS_ALLOWED)
        p = tl.exp(drafted_logit - peak) / total
        likely = uniform(tl.load(keys + row), tl.load(positions + row), ACCEPT_STREAM) * q < p
        stands = has_draft & (likely | (score == float("-inf")))
        token = tl.where(stands, draft, recovered)
        logit = processed_logits(row_logits, row_allowed, token, vocab, temperature, SCALED, HAS_ALLOWED)
        tl.store(token_ids + row, token)
        tl.store(logprobs + row, logit - peak - tl.log(total))
        tl.store(entropies + row, tl.log(total) - moment / total)
        tl.store(max_probs + row, 1.0 / total)
        standing = tl.where(stands, standing, 0)
        accepted += standing
    tl.store(num_accepted + request, accepted)


def rejection_triton(
    logits: torch.Tensor,
    draft_token_ids: torch.Tensor,
    row_starts: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: float,
    allowed: torch.Tensor | None,
    draft_probs: torch.Tensor | None,
    draft_vocab: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Arguments and results as in `atlas_kernels.rejection.verify_by_rejection`."""
    (rows, vocab), device = logits.shape, logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    draft_token_ids, row_starts = draft_token_ids.contiguous(), row_starts.contiguous()
    keys, positions = keys.contiguous(), positions.contiguous()
    results = empty_results(rows, len(row_starts) - 1, device)
    if not rows:
        return results[0], results[1].zero_(), *results[2:]
    one_hot = draft_probs is None or draft_vocab is None
    # Pointers must be passed even where nothing is read through them.
    column_of, mask = draft_token_ids, logits
    residual_scores, residual_tokens, tiles, num_draft_tokens = None, None, 1, 0
    if allowed is not None:
        mask = allowed.contiguous().view(torch.uint8)
    if draft_probs is not None and draft_vocab is not None:
        draft_probs, draft_vocab = draft_probs.contiguous(), draft_vocab.contiguous()
        num_draft_tokens = len(draft_vocab)
        column_of = torch.full((vocab,), -1, dtype=torch.int32, device=device)
        column_of[draft_vocab] = torch.arange(num_draft_tokens, dtype=torch.int32, device=device)
        tiles = max(triton.cdiv(num_draft_tokens, RESIDUAL_TILE), 1)
    scores, tokens, sums = launch_splits(
        logits,
        keys,
        positions,
        temperature,
        allowed,
        stream=Stream.RECOVER,
        exclude=1 if one_hot else 2,
        excluded=column_of,
    )
    splits = scores.shape[1]
    options = {
        "SCALED": temperature != 1,
        "HAS_ALLOWED": allowed is not None,
        "SPLITS": triton.next_power_of_2(splits),
    }
    if not one_hot:
        residual_scores = torch.empty(rows, tiles, dtype=torch.float64, device=device)
        residual_tokens = torch.empty(rows, tiles, dtype=torch.int32, device=device)
        residual_splits[(rows, tiles)](
            logits,
            mask,
            draft_token_ids,
            draft_probs,
            draft_vocab,
            keys,
            positions,
            sums,
            residual_scores,
            residual_tokens,
            float(temperature),
            vocab,
            num_draft_tokens,
            logits.stride(0),
            mask.stride(0),
            splits,
            STREAM=int(Stream.RECOVER),
            TILE=RESIDUAL_TILE,
            num_warps=RESIDUAL_WARPS,
            **options,
        )
    finish_rejection[(len(row_starts) - 1,)](
        logits,
        mask,
        scores,
        tokens,
        sums,
        residual_scores,
        residual_tokens,
        draft_token_ids,
        draft_probs,
        column_of,
        row_starts,
        keys,
        positions,
        *results,
        float(temperature),
        vocab,
        num_draft_tokens,
        logits.stride(0),
        mask.stride(0),
        splits,
        tiles,
        ACCEPT_STREAM=int(Stream.ACCEPT),
        ONE_HOT=one_hot,
        TILES=triton.next_power_of_2(tiles),
        num_warps=1,
        **options,
    )
    return results
