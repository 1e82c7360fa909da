"""The Triton kernels of `draft_head`: `advance` the state, `score` its tokens, `finish_draft`; `draft_whole` does all.

Each step reads from memory what the previous step wrote. A barrier separates steps within one program, and a launch
separates them across programs.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import triton
import triton.language as tl

from atlas_kernels.head_call import DraftHeadWeights, HeadCall
from atlas_kernels.noise_triton import exponentials_of

TILE = {"ROWS": 16, "UNITS": 16, "TOKENS": 32, "INNER": 32}
"""Rows, state units or tokens, and depth of the products per step (16 are the least `tl.dot` takes); 64 tokens spill."""
_INTERPRETED_TILE = {"ROWS": 16, "UNITS": 256, "TOKENS": 1024, "INNER": 256}
CHUNK = 1024
"""Tokens per step where logits are turned into probabilities."""
SPLITS = 32
"""Splits that are joined at a time: 64 take twice the registers."""
NUM_WARPS = 4
WHOLE_BYTES = 2 << 20
"""Weights up to this size are read by one program per 16 rows, at all k steps. Planned, not measured."""
_SIZES = (
    *("step", "row_tile", "unit_tile", "split", "row", "batch"),
    *("num_tokens", "num_steps", "splits", "tiles_per_split"),
)
_PER_ROW = ("newest", "keys", "positions", "token_ids")
"""No reason to compile anew: what changes from step to step, or with the vocabulary, and where a few numbers lie."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_EPSILON = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, from operations that the interpreter supports."""
    t = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)


@triton.jit
def state_tile(states, row, inner, batch, size, ELEMENT: tl.constexpr, COMPUTE: tl.constexpr):
    """`[INNER, ROWS]` of the states, rounded to the weights' type, and unrounded in float32."""
    at = states + row[None, :].to(tl.int64) * size + inner[:, None]
    x = tl.load(at, mask=(row[None, :] < batch) & (inner[:, None] < size), other=0.0)
    return x.to(ELEMENT).to(COMPUTE), x


@triton.jit
def joined(scores, tokens, row, inside, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """The token with the best score over a row's splits, read `SPLITS` at a time: int32 `[ROWS]`."""
    at = row.to(tl.int64) * splits
    best = tl.full([ROWS], float("-inf"), tl.float64)
    winner = tl.zeros([ROWS], tl.int32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        known = inside[:, None] & (split[None, :] < splits)
        candidates = tl.load(scores + at[:, None] + split[None, :], mask=known, other=float("-inf"))
        top = tl.max(candidates, axis=1)
        # Splits are in vocabulary order, so the first of equal splits has the first token.
        found = tl.min(tl.where(candidates == top[:, None], split[None, :], first + SPLITS), axis=1)
        winner = tl.where(top > best, found, winner)
        best = tl.maximum(best, top)
    return tl.load(tokens + at + winner, mask=inside, other=0)


@triton.jit
def gates_of_state(
    state_gates, before, row, unit, batch, size,
    ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The state's part of the reset, update and new gates of some units, without bias: float32 `[UNITS, ROWS]` each."""
    reset = tl.zeros([UNITS, ROWS], tl.float32)
    update = tl.zeros([UNITS, ROWS], tl.float32)
    new = tl.zeros([UNITS, ROWS], tl.float32)
    for first in range(0, size, INNER):
        inner = first + tl.arange(0, INNER)
        x, _ = state_tile(before, row, inner, batch, size, ELEMENT, COMPUTE)
        at = state_gates + unit[:, None] * size + inner[None, :]
        inside = (unit[:, None] < size) & (inner[None, :] < size)
        # "ieee" is for float32 weights, which tf32 would round.
        w = tl.load(at, mask=inside, other=0.0).to(COMPUTE)
        reset = tl.dot(w, x, reset, input_precision="ieee")
        w = tl.load(at + size * size, mask=inside, other=0.0).to(COMPUTE)
        update = tl.dot(w, x, update, input_precision="ieee")
        w = tl.load(at + 2 * size * size, mask=inside, other=0.0).to(COMPUTE)
        new = tl.dot(w, x, new, input_precision="ieee")
    return reset, update, new


@triton.jit
def absorbed_token(
    newest, scores, tokens, row, step, batch, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The token that the state absorbs at a step: int32 `[ROWS]`; first the newest committed token, then drawn ones."""
    of_step = (step - 1) * batch * splits
    # One of the two masks is always empty.
    given = tl.load(newest + row, mask=row < tl.where(step == 0, batch, 0), other=0).to(tl.int32)
    drawn = row < tl.where(step == 0, 0, batch)
    return given + joined(scores + of_step, tokens + of_step, row, drawn, splits, ROWS, SPLITS)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_ROW)
def advance(
    input_gates, state_gates, state_bias, states, newest, scores, tokens,
    step, row_tile, unit_tile, batch, size, splits,
    ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    INNER: tl.constexpr, CALLED: tl.constexpr = False,
):  # fmt: skip
    """Computes some units of `states[step + 1]` from `states[step]` and one more token; float32 `[batch, size]` each.

    Launched over rows and units, or called for one tile of each.
    """
    if not CALLED:
        row_tile, unit_tile = tl.program_id(0), tl.program_id(1)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    unit = unit_tile * UNITS + tl.arange(0, UNITS)
    one_state = batch * size
    before = states + step * one_state
    reset, update, new = gates_of_state(
        state_gates, before, row, unit, batch, size, ELEMENT, COMPUTE, ROWS, UNITS, INNER
    )
    token = absorbed_token(newest, scores, tokens, row, step, batch, splits, ROWS, SPLITS)
    known = unit[:, None] < size
    inside = known & (row[None, :] < batch)
    bias = state_bias + unit[:, None]
    gate = input_gates + token[None, :].to(tl.int64) * 3 * size + unit[:, None]
    reset += tl.load(bias, mask=known, other=0.0).to(tl.float32) + tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    update += tl.load(bias + size, mask=known, other=0.0).to(tl.float32)
    update += tl.load(gate + size, mask=inside, other=0.0).to(tl.float32)
    new += tl.load(bias + 2 * size, mask=known, other=0.0).to(tl.float32)
    new = tanh(tl.load(gate + 2 * size, mask=inside, other=0.0).to(tl.float32) + tl.sigmoid(reset) * new)
    own = row[None, :].to(tl.int64) * size + unit[:, None]
    former = tl.load(before + own, mask=inside, other=0.0)
    tl.store(before + one_state + own, new + tl.sigmoid(update) * (former - new), mask=inside)


@triton.jit
def logits_of_tile(
    outputs, bias, after, row, index, known, temperature, batch, size,
    ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Logits of a vocabulary tile from states: float32 `[TOKENS, ROWS]`, `-inf` for tokens that are not `known`."""
    x = tl.zeros([TOKENS, ROWS], tl.float32)
    squares = tl.zeros([INNER, ROWS], tl.float32)
    for first in range(0, size, INNER):
        inner = first + tl.arange(0, INNER)
        s, exact = state_tile(after, row, inner, batch, size, ELEMENT, COMPUTE)
        squares += exact * exact
        at = outputs + index[:, None].to(tl.int64) * size + inner[None, :]
        w = tl.load(at, mask=known[:, None] & (inner[None, :] < size), other=0.0).to(COMPUTE)
        x = tl.dot(w, s, x, input_precision="ieee")
    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / size + _EPSILON)
    x = x * inverse[None, :] + tl.load(bias + index, mask=known, other=0.0).to(tl.float32)[:, None]
    if SCALED:
        x = tl.div_rn(x, temperature + tl.zeros_like(x))
    return tl.where(known[:, None], x, float("-inf"))


@triton.jit
def noisy(x, token_ids, index, known, key, position, STREAM: tl.constexpr, ROWS: tl.constexpr):
    """Scores of logits `[TOKENS, ROWS]`, float64: each logit minus the log of its token's exponential."""
    ids = tl.load(token_ids + index, mask=known, other=0).to(tl.int32)[:, None] + tl.zeros([1, ROWS], tl.int32)
    return x.to(tl.float64) - tl.log(exponentials_of(key, position, ids, STREAM).to(tl.float64))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_ROW)
def score(
    outputs, bias, token_ids, states, keys, positions, scores, tokens, sums, probs,
    temperature, step, row_tile, split, batch, size, num_tokens, num_steps, splits, tiles_per_split,
    ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, STREAM: tl.constexpr, GREEDY: tl.constexpr, SCALED: tl.constexpr,
    WITH_PROBS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, INNER: tl.constexpr,
    CALLED: tl.constexpr = False,
):  # fmt: skip
    """Finds the best token of one split of the reduced vocabulary, and the split's sums, for `ROWS` rows.

    Writes `scores` float64 and `tokens` int32 `[num_steps, batch, splits]`; `sums` float32
    `[num_steps, batch, splits, 2]` (the largest logit m and sum exp(l - m)); and, with probabilities, the logits to
    `probs`. Launched over rows and splits, or called for one of each.
    """
    if not CALLED:
        row_tile, split = tl.program_id(0), tl.program_id(1)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    alive = row < batch
    after = states + (step + 1) * batch * size
    key = tl.load(keys + row, mask=alive, other=0)[None, :]
    position = (tl.load(positions + row, mask=alive, other=0) + step)[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float64)
    best_token = tl.zeros([ROWS], tl.int32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        index = tile * TOKENS + tl.arange(0, TOKENS)
        known = index < num_tokens
        x = logits_of_tile(
            outputs, bias, after, row, index, known, temperature, batch, size,
            ELEMENT, COMPUTE, SCALED, ROWS, TOKENS, INNER,
        )  # fmt: skip
        if WITH_PROBS:
            at = probs + (row[None, :].to(tl.int64) * num_steps + step) * num_tokens + index[:, None]
            tl.store(at, x, mask=known[:, None] & alive[None, :])
        # A split's first tile contains a valid token, so the peak is finite from there on.
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak[None, :]), axis=0)
        peak = new_peak
        score = x.to(tl.float64) if GREEDY else noisy(x, token_ids, index, known, key, position, STREAM, ROWS)
        top = tl.max(score, axis=0)
        token = tl.min(tl.where(score == top[None, :], index[:, None], num_tokens), axis=0)
        best_token = tl.where(top > best, token, best_token)
        best = tl.maximum(best, top)
    slot = (step * batch + row) * splits + split
    tl.store(scores + slot, best, mask=alive)
    tl.store(tokens + slot, best_token, mask=alive)
    tl.store(sums + 2 * slot, peak, mask=alive)
    tl.store(sums + 2 * slot + 1, total, mask=alive)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_ROW)
def finish_draft(
    scores, tokens, sums, probs, indices, confidence,
    step, row, batch, num_tokens, num_steps, splits,
    GREEDY: tl.constexpr, WITH_PROBS: tl.constexpr, MOST_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    CALLED: tl.constexpr = False,
):  # fmt: skip
    """Writes token and confidence of one row at one step, and turns the logits in `probs` into probabilities.

    Launched over rows and steps, or called for one of each.
    """
    if not CALLED:
        row, step = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, MOST_SPLITS)
    inside = split < splits
    at = (step * batch + row) * splits
    candidates = tl.load(scores + at + split, mask=inside, other=float("-inf"))
    best = tl.max(candidates, axis=0)
    token = tl.load(tokens + at + tl.min(tl.where(candidates == best, split, splits - 1), axis=0))
    peaks = tl.load(sums + 2 * (at + split), mask=inside, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    totals = tl.load(sums + 2 * (at + split) + 1, mask=inside, other=0.0)
    total = tl.sum(totals * tl.exp(peaks - peak), axis=0)
    out = tl.cast(row, tl.int64) * num_steps + step
    tl.store(indices + out, token.to(tl.int64))
    tl.store(confidence + out, 1.0 / total)
    if WITH_PROBS:
        for first in range(0, num_tokens, CHUNK):
            index = first + tl.arange(0, CHUNK)
            x = tl.load(probs + out * num_tokens + index, mask=index < num_tokens, other=float("-inf"))
            q = tl.where(index == token, 1.0, 0.0) if GREEDY else tl.exp(x - peak) / total
            tl.store(probs + out * num_tokens + index, q, mask=index < num_tokens)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_ROW)
def draft_whole(
    input_gates, state_gates, state_bias, outputs, bias, token_ids, states, newest, keys, positions, scores, tokens,
    sums, probs, indices, confidence,
    temperature, batch, size, num_tokens, num_steps, splits, tiles_per_split,
    ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, STREAM: tl.constexpr, GREEDY: tl.constexpr, SCALED: tl.constexpr,
    WITH_PROBS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, TOKENS: tl.constexpr, INNER: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Drafts all steps of `ROWS` rows; grid over rows, one split."""
    row_tile = tl.program_id(0)
    for step in range(0, num_steps):
        for unit_tile in range(0, tl.cdiv(size, UNITS)):
            advance(
                input_gates, state_gates, state_bias, states, newest, scores, tokens, step, row_tile, unit_tile, batch,
                size, splits, ELEMENT, COMPUTE, 1, ROWS, UNITS, INNER, True,
            )  # fmt: skip
        tl.debug_barrier()
        score(
            outputs, bias, token_ids, states, keys, positions, scores, tokens, sums, probs, temperature, step, row_tile, 0,
            batch, size, num_tokens, num_steps, splits, tiles_per_split, ELEMENT, COMPUTE, STREAM, GREEDY, SCALED,
            WITH_PROBS, ROWS, TOKENS, INNER, True,
        )  # fmt: skip
        tl.debug_barrier()
    for row in range(row_tile * ROWS, tl.minimum((row_tile + 1) * ROWS, batch)):
        for step in range(0, num_steps):
            finish_draft(
                scores, tokens, sums, probs, indices, confidence, step, row, batch, num_tokens, num_steps, splits, GREEDY,
                WITH_PROBS, 1, CHUNK, True,
            )  # fmt: skip


def draft_head_triton(
    call: HeadCall, *, whole_bytes: int = WHOLE_BYTES
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The fields of `atlas_kernels.draft_head.HeadDraft`. Weights of up to `whole_bytes` take a single launch."""
    weights, state, num_steps = call.weights, call.state, call.num_tokens
    (batch, size), device, tokens = state.shape, state.device, len(weights.token_ids)
    tile, compute = tile_on(device, weights)
    whole = weights.num_bytes <= whole_bytes
    splits, tiles_per_split = split_tokens(batch, tokens, tile, device, whole=whole)
    states = torch.empty(num_steps + 1, batch, size, device=device, dtype=torch.float32)
    states[0] = state
    arguments: dict[str, Any] = tile | {
        **{field.name: getattr(weights, field.name).contiguous() for field in fields(weights)},
        "states": states,
        "newest": call.newest.contiguous(),
        "keys": call.keys.contiguous(),
        "positions": call.positions.contiguous(),
        "scores": torch.empty(num_steps, batch, splits, dtype=torch.float64, device=device),
        "tokens": torch.empty(num_steps, batch, splits, dtype=torch.int32, device=device),
        "sums": torch.empty(num_steps, batch, splits, 2, device=device, dtype=torch.float32),
        "probs": torch.empty(batch, num_steps, tokens, device=device, dtype=torch.float32) if call.with_probs else None,
        "indices": torch.empty(batch, num_steps, dtype=torch.int64, device=device),
        "confidence": torch.empty(batch, num_steps, device=device, dtype=torch.float32),
        "temperature": float(call.temperature),
        "batch": batch,
        "size": size,
        "num_tokens": tokens,
        "num_steps": num_steps,
        "splits": splits,
        "tiles_per_split": tiles_per_split,
        "ELEMENT": element_of(weights),
        "COMPUTE": compute,
        "STREAM": int(call.stream),
        "GREEDY": call.temperature == 0,
        "SCALED": call.temperature not in (0, 1),
        "WITH_PROBS": call.with_probs,
        "SPLITS": SPLITS,
        "MOST_SPLITS": triton.next_power_of_2(_programs(device)),
        "CHUNK": CHUNK,
        # Set by calls within a kernel; launched programs take their tile from the grid.
        **dict.fromkeys(("row_tile", "unit_tile", "split", "row", "step"), 0),
        "CALLED": False,
    }
    row_tiles = triton.cdiv(batch, tile["ROWS"])
    if batch and whole:
        launch(draft_whole, (row_tiles,), arguments)
    elif batch:
        for step in range(num_steps):
            launch(advance, (row_tiles, triton.cdiv(size, tile["UNITS"])), arguments | {"step": step})
            launch(score, (row_tiles, splits), arguments | {"step": step})
        launch(finish_draft, (batch, num_steps), arguments)
    return arguments["indices"], arguments["confidence"], arguments["probs"]


def element_of(weights: DraftHeadWeights) -> Any:
    """Triton's type of the weights."""
    return _TYPES[weights.outputs.dtype]


def tile_on(device: torch.device, weights: DraftHeadWeights) -> tuple[dict[str, int], Any]:
    """Tile sizes, and the type that products are computed in."""
    return (TILE, element_of(weights)) if device.type == "cuda" else (_INTERPRETED_TILE, tl.float32)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch `kernel` with the arguments that it takes."""
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, num_warps=NUM_WARPS)


def split_tokens(
    batch: int, tokens: int, tile: dict[str, int], device: torch.device, *, whole: bool
) -> tuple[int, int]:
    """Number of splits of the reduced vocabulary, and tiles per split.

    One split if a single launch does everything, else enough for about two programs per multiprocessor.
    """
    tiles = triton.cdiv(tokens, tile["TOKENS"])
    if whole:
        return 1, tiles
    splits = _programs(device)
    if device.type == "cuda":
        splits = triton.cdiv(splits, triton.cdiv(max(batch, 1), tile["ROWS"]))
    tiles_per_split = triton.cdiv(tiles, min(splits, tiles))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def _programs(device: torch.device) -> int:
    """Programs that fill the device, and the most splits; for the interpreter, enough splits to test them."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
