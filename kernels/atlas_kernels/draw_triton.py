"""The Triton kernels of `draw`: those of `verify` over a whole vocabulary, one for a reduced one, and a final join."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atlas_kernels.draw_call import DrawCall
from atlas_kernels.noise_triton import exponentials_of
from atlas_kernels.rows import PackedRows
from atlas_kernels.verify_triton import (
    add_weights,
    best_split,
    join_sums,
    launch_splits,
    likelier,
    most_splits,
    processed_logits,
    store_split,
)

TOKENS = 512
"""Tokens per step over a reduced vocabulary, 4 per thread."""
NUM_WARPS = 4
SPLITS = 64
"""Splits that `finish_draw` is compiled for, at least: a reduced vocabulary that grows to 32,768 tokens compiles it once."""
_INTERPRETED = (1024, 2)  # tokens per step and splits: the interpreter pays per operation, not per element


# As in `choose_splits`: not recompiled when sizes change from step to step or numbers per row move.
@triton.jit(
    do_not_specialize=["num_tokens", "logits_stride", "tiles_per_split", "step"],
    do_not_specialize_on_alignment=["keys", "positions"],
)
def choose_among_splits(
    logits, token_ids, keys, positions, scores, tokens, sums,
    temperature, num_tokens, logits_stride, tiles_per_split, step,
    STREAM: tl.constexpr, GREEDY: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`choose_splits` over a reduced vocabulary, with an explicit score per token; grid `[rows, splits]`.

    Writes `scores`, `tokens` (columns of the logits) and `sums` as `choose_splits` does. The noise is that of
    `positions + step`.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, position = tl.load(keys + row), tl.load(positions + row) + step
    logits += row * logits_stride
    negative_infinity = float("-inf")
    best_score, best_token, best_logit = tl.full([], negative_infinity, tl.float64), 0, negative_infinity
    peak = negative_infinity
    total = tl.zeros([TOKENS], tl.float32)
    moment = tl.zeros([TOKENS], tl.float32)
    begin = split * tiles_per_split * TOKENS
    end = tl.minimum(begin + tiles_per_split * TOKENS, num_tokens)
    for start in range(begin, end, TOKENS):
        index = start + tl.arange(0, TOKENS)
        x = processed_logits(logits, logits, index, num_tokens, temperature, SCALED, False)
        largest = tl.max(x, axis=0)
        peak, total, moment = add_weights(x, largest, peak, total, moment)
        if GREEDY:
            best_score, best_token, best_logit = likelier(
                x, index, num_tokens, largest, best_score, best_token, best_logit
            )
        else:
            ids = tl.load(token_ids + index, mask=index < num_tokens, other=0).to(tl.int32)
            score = x.to(tl.float64) - tl.log(exponentials_of(key, position, ids, STREAM).to(tl.float64))
            top = tl.max(score, axis=0)
            if top > best_score:
                best_score = top
                best_token = tl.min(tl.where(score == top, index, num_tokens), axis=0)
                best_logit = tl.max(tl.where(index == best_token, x, negative_infinity), axis=0)
    store_split(
        scores, tokens, sums, row * tl.num_programs(1) + split, best_score, best_token, best_logit, peak, total, moment
    )


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["indices", "max_probs"])
def finish_draw(scores, tokens, sums, indices, max_probs, splits, SPLITS: tl.constexpr):
    """Writes the choice of a row, and its largest probability; grid `[rows]`."""
    row = tl.program_id(0)
    _, token, _ = best_split(scores, tokens, row, splits, SPLITS)
    _, total, _ = join_sums(sums, row, splits, SPLITS)
    tl.store(indices + row, token.to(tl.int64))
    tl.store(max_probs + row, 1.0 / total)


def draw_triton(call: DrawCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The fields of `atlas_kernels.draw.RowDraws`."""
    num_rows, device = len(call.logits), call.logits.device
    indices = torch.empty(num_rows, dtype=torch.int64, device=device)
    max_probs = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows and call.token_ids is not None:
        draw_among(call, call.token_ids.contiguous(), indices, max_probs)
    elif num_rows:
        # `choose_splits` reads neither drafts nor the first rows of requests.
        rows = PackedRows(
            call.logits, call.positions, call.positions, call.keys, call.positions, call.temperature, None
        )
        scores, tokens, sums = launch_splits(rows.contiguous(), stream=call.stream)
        most = most_splits(call.logits.shape[1], device)
        finish_draw[(num_rows,)](scores, tokens, sums, indices, max_probs, scores.shape[1], SPLITS=most, num_warps=1)
    return indices, max_probs


def draw_among(
    call: DrawCall, token_ids: torch.Tensor, indices: torch.Tensor, max_probs: torch.Tensor, step: int = 0
) -> None:
    """Draw over a reduced vocabulary into `indices` int64 and `max_probs` float32 `[rows]`, at least one row.

    Args:
        call: The call; its positions are `step` less than those whose noise is drawn.
        token_ids: int64 `[tokens]`, contiguous.
        indices: Receives the drawn columns.
        max_probs: Receives the largest probabilities.
        step: See `call`.
    """
    logits = call.logits if call.logits.stride(1) == 1 else call.logits.contiguous()
    (num_rows, num_tokens), device = logits.shape, logits.device
    tile, splits, tiles_per_split = split_tokens(num_rows, num_tokens, device)
    scores = torch.empty(num_rows, splits, dtype=torch.float64, device=device)
    tokens = torch.empty(num_rows, splits, dtype=torch.int32, device=device)
    sums = torch.empty(num_rows, splits, 4, dtype=torch.float32, device=device)
    choose_among_splits[(num_rows, splits)](
        logits,
        token_ids,
        call.keys.contiguous(),
        call.positions.contiguous(),
        scores,
        tokens,
        sums,
        float(call.temperature),
        num_tokens,
        logits.stride(0),
        tiles_per_split,
        step,
        STREAM=int(call.stream),
        GREEDY=call.temperature == 0,
        SCALED=call.temperature not in (0, 1),
        TOKENS=tile,
        num_warps=NUM_WARPS,
    )
    most = max(SPLITS, triton.next_power_of_2(split_tokens(1, num_tokens, device)[1]))
    finish_draw[(num_rows,)](scores, tokens, sums, indices, max_probs, splits, SPLITS=most, num_warps=1)


def split_tokens(rows: int, tokens: int, device: torch.device) -> tuple[int, int, int]:
    """Tokens per step, splits, and steps per split; about four programs per multiprocessor, as in `verify_triton`."""
    tile, splits = _INTERPRETED
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        tile, splits = TOKENS, triton.cdiv(4 * processors, max(rows, 1))
    tiles = triton.cdiv(tokens, tile)
    tiles_per_split = triton.cdiv(tiles, min(splits, tiles))
    return tile, triton.cdiv(tiles, tiles_per_split), tiles_per_split
