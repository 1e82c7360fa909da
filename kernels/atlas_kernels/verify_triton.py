"""The Triton kernels of `verify`: a pass over the vocabulary in splits, then one program per request that joins them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from atlas_kernels.noise import BLOCK as NOISE_BLOCK
from atlas_kernels.noise import Stream
from atlas_kernels.noise_triton import BLOCK, block_minima, excesses
from atlas_kernels.rows import PackedRows

BLOCKS = 16
"""Noise blocks per step: 2,048 tokens, 16 per thread."""
NUM_WARPS = 4
# The interpreter pays per operation, not per element: large steps, and only enough splits to test them.
_INTERPRETED = (64, 2)
# log of float64 need not be monotone in the last place; a bound that is this much too high costs nothing.
_SLACK = tl.constexpr(1e-9)


@triton.jit
def processed_logits(logits, allowed, ids, vocab, temperature, SCALED: tl.constexpr, HAS_ALLOWED: tl.constexpr):
    """Logits of the sampled distribution for some tokens of a row: float32, `-inf` for excluded tokens and padding."""
    inside = ids < vocab
    x = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if SCALED:
        x = tl.div_rn(x, temperature)
    if HAS_ALLOWED:
        x = tl.where(tl.load(allowed + ids, mask=inside, other=0) != 0, x, float("-inf"))
    return x


@triton.jit
def without_excluded(x, ids, vocab, excluded, EXCLUDE: tl.constexpr):
    """`x` with `-inf` for the token at `excluded` (EXCLUDE 1), or wherever `excluded[id] >= 0` (EXCLUDE 2)."""
    if EXCLUDE == 1:
        x = tl.where(ids == tl.load(excluded), float("-inf"), x)
    if EXCLUDE == 2:
        x = tl.where(tl.load(excluded + ids, mask=ids < vocab, other=-1) >= 0, float("-inf"), x)
    return x


@triton.jit
def add_weights(x, top, peak, total, moment):
    """Adds a tile to the sums of `exp(x - peak)` and `exp(x - peak) (x - peak)`, by lane; `top` is its largest `x`."""
    new_peak = tl.maximum(peak, top)
    # While no token is allowed the peak is -inf, and -inf - -inf is NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    scale = tl.exp(peak - shift)
    # Logits that a policy masks with its type's least number are finite, and total * drift may overflow.
    drift = tl.where(scale > 0, peak - shift, 0.0)
    weight = tl.exp(x - shift)
    moment = scale * (moment + total * drift) + weight * tl.where(weight > 0, x - shift, 0.0)
    return new_peak, total * scale + weight, moment


@triton.jit
def race(
    logits, allowed, excluded,
    key, position, temperature, vocab, start, top, best_score, best_token, best_logit,
    STREAM: tl.constexpr, SCALED: tl.constexpr, HAS_ALLOWED: tl.constexpr, EXCLUDE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Updates the best score, its token and logit by the tile from `start`, whose blocks have largest logits `top`."""
    lanes, blocks = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    minima, lane_of_minimum = block_minima(key, position, blocks + start // BLOCK, STREAM)
    bounds = top.to(tl.float64) - tl.log(minima.to(tl.float64)) + _SLACK
    bound = tl.max(bounds, axis=0)
    while bound > best_score:
        # The most promising block first. Its logits are read again, from cache: keeping them would cost registers.
        block = tl.min(tl.where(bounds == bound, blocks, BLOCKS), axis=0)
        first = block * BLOCK + start
        least = tl.sum(tl.where(blocks == block, minima, 0.0), axis=0)
        lane = tl.sum(tl.where(blocks == block, lane_of_minimum, 0), axis=0)
        e = tl.where(lanes == lane, least, least + excesses(key, position, first, STREAM, BLOCK))
        x = processed_logits(logits, allowed, lanes + first, vocab, temperature, SCALED, HAS_ALLOWED)
        x = without_excluded(x, lanes + first, vocab, excluded, EXCLUDE)
        score = x.to(tl.float64) - tl.log(e.to(tl.float64))
        block_best = tl.max(score, axis=0)
        token = tl.min(tl.where(score == block_best, lanes, BLOCK), axis=0) + first
        if (block_best > best_score) | ((block_best == best_score) & (token < best_token)):
            best_score = block_best
            best_token = token
            best_logit = tl.max(tl.where(lanes + first == token, x, float("-inf")), axis=0)
        bounds = tl.where(blocks == block, float("-inf"), bounds)
        bound = tl.max(bounds, axis=0)
    return best_score, best_token, best_logit


@triton.jit
def likelier(x, ids, vocab, top, score, token, logit):
    """Updates the best score, its token and logit by a tile of logits `x` with largest value `top`, without noise."""
    if top > logit:
        logit = top
        token = tl.min(tl.where(x == top, ids, vocab))
        score = top.to(tl.float64)
    return score, token, logit


@triton.jit
def store_split(scores, tokens, sums, slot, score, token, logit, peak, total, moment):
    """Writes the best token of a split, and the split's sums (see `choose_splits`)."""
    tl.store(scores + slot, score)
    tl.store(tokens + slot, token)
    tl.store(sums + 4 * slot, logit)
    tl.store(sums + 4 * slot + 1, peak)
    tl.store(sums + 4 * slot + 2, tl.sum(total))
    tl.store(sums + 4 * slot + 3, tl.sum(moment))


# Sizes and addresses of the few numbers per row change from step to step and must not cause a recompilation. Properties
# that are fixed during a run stay specialised, so that rows of logits are read 16 bytes at a time.
@triton.jit(
    do_not_specialize=["tiles_per_split"], do_not_specialize_on_alignment=["keys", "positions", "excluded", "greedy"]
)
def choose_splits(
    logits, allowed, excluded, column_of, keys, positions, greedy, scores, tokens, sums,
    temperature, vocab, logits_stride, allowed_stride, tiles_per_split,
    STREAM: tl.constexpr, GREEDY: tl.constexpr, SCALED: tl.constexpr, HAS_ALLOWED: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Finds the best score of one split of one row, and the split's sums; grid `[rows, splits]`.

    Writes `scores` float64 and `tokens` int32 `[rows, splits]`, and `sums` float32 `[rows, splits, 4]`: the best token's
    logit, the largest logit m, sum exp(l - m), and sum exp(l - m) (l - m). Excluded tokens (see `without_excluded`) count in
    the sums, but are not chosen: `excluded` int64 `[rows]` has one per row, `column_of` int32 `[vocab]` marks those of
    all rows. Rows draw without noise if GREEDY is 1, or if it is 2 and `greedy[row]` is not 0.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, position = tl.load(keys + row), tl.load(positions + row)
    silent = tl.load(greedy + row) != 0 if GREEDY == 2 else GREEDY == 1
    logits += row * logits_stride
    allowed += row * allowed_stride
    if EXCLUDE == 1:
        excluded += row
    if EXCLUDE == 2:
        excluded = column_of
    lanes = tl.arange(0, BLOCK)
    blocks = tl.arange(0, BLOCKS)
    negative_infinity = float("-inf")

    best_score, best_token, best_logit = tl.full([], negative_infinity, tl.float64), 0, negative_infinity
    peak = negative_infinity
    total = tl.zeros([BLOCKS, BLOCK], tl.float32)
    moment = tl.zeros([BLOCKS, BLOCK], tl.float32)
    begin = split * tiles_per_split * BLOCKS * BLOCK
    end = tl.minimum(begin + tiles_per_split * BLOCKS * BLOCK, vocab)
    end = tl.where(position < 0, begin, end)  # padding: nothing is read
    for start in range(begin, end, BLOCKS * BLOCK):
        ids = blocks[:, None] * BLOCK + lanes[None, :] + start
        x = processed_logits(logits, allowed, ids, vocab, temperature, SCALED, HAS_ALLOWED)
        top = tl.max(x, axis=1)
        peak, total, moment = add_weights(x, tl.max(top, axis=0), peak, total, moment)
        if silent:
            best_score, best_token, best_logit = likelier(
                x, ids, vocab, tl.max(top, axis=0), best_score, best_token, best_logit
            )
        else:
            if EXCLUDE:
                top = tl.max(without_excluded(x, ids, vocab, excluded, EXCLUDE), axis=1)
            best_score, best_token, best_logit = race(
                logits, allowed, excluded, key, position, temperature, vocab, start, top, best_score, best_token,
                best_logit, STREAM, SCALED, HAS_ALLOWED, EXCLUDE, BLOCKS,
            )  # fmt: skip
    store_split(
        scores, tokens, sums, row * tl.num_programs(1) + split, best_score, best_token, best_logit, peak, total, moment
    )


@triton.jit
def best_split(scores, tokens, row, splits, SPLITS: tl.constexpr):
    """Best score of a row over its splits, its token, and the split that has it."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    candidates = tl.load(scores + row * splits + split, mask=inside, other=float("-inf"))
    score = tl.max(candidates, axis=0)
    # Splits are in vocabulary order, so the first of equal splits has the first token.
    winner = tl.min(tl.where(candidates == score, split, SPLITS), axis=0)
    return score, tl.load(tokens + row * splits + winner), winner


@triton.jit
def join_sums(sums, row, splits, SPLITS: tl.constexpr):
    """Joined sums of a row with largest logit m: `m, sum exp(l - m), sum exp(l - m) (l - m)`."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    at = sums + 4 * (row * splits + split)
    peaks = tl.load(at + 1, mask=inside, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    weight = tl.exp(peaks - peak)
    drift = tl.where(weight > 0, peaks - peak, 0.0)
    totals = tl.load(at + 2, mask=inside, other=0.0)
    moments = tl.load(at + 3, mask=inside, other=0.0)
    return peak, tl.sum(totals * weight, axis=0), tl.sum(weight * (moments + totals * drift), axis=0)


@triton.jit
def store_figures(logprobs, entropies, max_probs, row, logit, peak, total, moment):
    """Writes the logprob of a token with this logit, and the row's entropy and largest probability, from `join_sums`."""
    tl.store(logprobs + row, logit - peak - tl.log(total))
    tl.store(entropies + row, tl.log(total) - moment / total)
    tl.store(max_probs + row, 1.0 / total)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["draft_token_ids", "row_starts"])
def finish(
    scores, tokens, sums, draft_token_ids, row_starts, token_ids, num_accepted, logprobs, entropies, max_probs,
    splits,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes the choice and figures of every row of one request, and its accepted count; grid `[batch]`."""
    request = tl.program_id(0)
    accepted, standing = 0, 1
    for row in range(tl.load(row_starts + request), tl.load(row_starts + request + 1)):
        _, token, split = best_split(scores, tokens, row, splits, SPLITS)
        logit = tl.load(sums + 4 * (row * splits + split))
        peak, total, moment = join_sums(sums, row, splits, SPLITS)
        tl.store(token_ids + row, token.to(tl.int64))
        store_figures(logprobs, entropies, max_probs, row, logit, peak, total, moment)
        standing = tl.where(tl.load(draft_token_ids + row) == token, standing, 0)
        accepted += standing
    tl.store(num_accepted + request, accepted)


def verify_triton(rows: PackedRows) -> tuple[torch.Tensor, ...]:
    """The fields of `atlas_kernels.verify.Verification`."""
    rows = rows.contiguous()
    scores, tokens, sums = launch_splits(rows)
    results = empty_results(rows)
    splits = scores.shape[1]
    if rows.batch:
        finish[(rows.batch,)](
            scores,
            tokens,
            sums,
            rows.draft_token_ids,
            rows.row_starts,
            *results,
            splits,
            SPLITS=most_splits(rows.logits.shape[1], rows.logits.device),
            num_warps=1,
        )
    return results


def empty_results(rows: PackedRows) -> tuple[torch.Tensor, ...]:
    """Unwritten fields of a `Verification`."""
    num_rows, device = len(rows.logits), rows.logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    num_accepted = torch.empty(rows.batch, dtype=torch.int64, device=device)
    figures = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3))
    return token_ids, num_accepted, *figures


def row_arguments(rows: PackedRows) -> dict[str, Any]:
    """The common arguments of kernels over contiguous rows, by name."""
    # A pointer must be passed even if nothing is read through it.
    mask = rows.logits if rows.allowed is None else rows.allowed.view(torch.uint8)
    return {
        "logits": rows.logits,
        "allowed": mask,
        "keys": rows.keys,
        "positions": rows.positions,
        "temperature": float(rows.temperature),
        "vocab": rows.logits.shape[1],
        "logits_stride": _row_stride(rows.logits),
        "allowed_stride": _row_stride(mask),
        "SCALED": rows.temperature not in (0, 1),
        "HAS_ALLOWED": rows.allowed is not None,
    }


def _row_stride(rows: torch.Tensor) -> int:
    """Stride between rows; for a single row, whose stride is arbitrary, the stride of contiguous rows."""
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


def launch_splits(
    rows: PackedRows, *, stream: Stream = Stream.TARGET, exclude: int = 0, excluded: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`choose_splits` over contiguous rows; returns `(scores, tokens, sums)`."""
    (num_rows, vocab), device = rows.logits.shape, rows.logits.device
    blocks, splits, tiles_per_split = split_vocab(num_rows, vocab, device)
    flags = rows.greedy if rows.temperature > 0 else None
    scores = torch.empty(num_rows, splits, dtype=torch.float64, device=device)
    tokens = torch.empty(num_rows, splits, dtype=torch.int32, device=device)
    sums = torch.empty(num_rows, splits, 4, dtype=torch.float32, device=device)
    if num_rows:
        choose_splits[(num_rows, splits)](
            **row_arguments(rows),
            excluded=excluded if exclude == 1 else rows.keys,
            column_of=excluded if exclude == 2 else rows.logits,
            greedy=rows.logits if flags is None else flags.view(torch.uint8),
            scores=scores,
            tokens=tokens,
            sums=sums,
            tiles_per_split=tiles_per_split,
            STREAM=int(stream),
            GREEDY=int(rows.temperature == 0) if flags is None else 2,
            EXCLUDE=exclude,
            BLOCKS=blocks,
            num_warps=NUM_WARPS,
        )
    return scores, tokens, sums


def split_vocab(rows: int, vocab: int, device: torch.device) -> tuple[int, int, int]:
    """Noise blocks per step, number of splits, and steps per split.

    About four programs per multiprocessor, so that few rows use the whole device too.
    """
    blocks, programs = _blocks_and_programs(device)
    splits = triton.cdiv(programs, max(rows, 1)) if device.type == "cuda" else programs
    tiles = triton.cdiv(vocab, blocks * NOISE_BLOCK)
    tiles_per_split = triton.cdiv(tiles, min(splits, tiles))
    return blocks, triton.cdiv(tiles, tiles_per_split), tiles_per_split


def most_splits(vocab: int, device: torch.device) -> int:
    """A power of two that is never less than the number of splits."""
    blocks, programs = _blocks_and_programs(device)
    return triton.next_power_of_2(min(programs, triton.cdiv(vocab, blocks * NOISE_BLOCK)))


def _blocks_and_programs(device: torch.device) -> tuple[int, int]:
    """Noise blocks per step, and programs that fill the device; for the interpreter, splits."""
    if device.type != "cuda":
        return _INTERPRETED
    return BLOCKS, 4 * torch.cuda.get_device_properties(device).multi_processor_count
