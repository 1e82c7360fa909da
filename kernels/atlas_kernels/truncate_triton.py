"""The Triton kernel of `truncate`: one program per row searches for the least kept logit in passes over the row.

Nothing is sorted. A search halves an interval of float32 bit patterns twice per pass: at most 16 passes, each over
logits that are in cache after the first. Tiles without a logit in the interval cost one comparison. See
`docs/kernels.md`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atlas_kernels import truncate_reference
from atlas_kernels.truncation import Truncation
from atlas_kernels.verify_triton import processed_logits

TOKENS = 4096
"""Tokens per step, 8 per thread."""
NUM_WARPS = 16
_INTERPRETED_TOKENS = 1024
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (tl.constexpr(each) for each in truncate_reference.COEFFICIENTS)
_FRACTION_BITS = tl.constexpr(truncate_reference.FRACTION_BITS)
_FRACTION_MASK = tl.constexpr(2**truncate_reference.FRACTION_BITS - 1)
_FRACTION_SHIFT = tl.constexpr(32 - truncate_reference.FRACTION_BITS)
_STEPS_PER_NAT = tl.constexpr(truncate_reference.STEPS_PER_NAT)
_MOST_STEPS = tl.constexpr(float(truncate_reference.MOST_STEPS))


@triton.jit
def ordered(x):
    """int32 in the order of the float32 numbers `x`; the two zeros are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weights(x, peak):
    """As `truncate_reference.weights`, from the high halves of 32-bit products."""
    steps = tl.minimum((peak - x) * _STEPS_PER_NAT, _MOST_STEPS).to(tl.int32)
    # Twice the reference's fraction: the high half of its product with a multiple of 2**-31 is one again.
    fraction = ((steps & _FRACTION_MASK) << _FRACTION_SHIFT).to(tl.uint32)
    series = tl.full(fraction.shape, _C6, tl.uint32)
    series = _C5 - tl.umulhi(fraction, series)
    series = _C4 - tl.umulhi(fraction, series)
    series = _C3 - tl.umulhi(fraction, series)
    series = _C2 - tl.umulhi(fraction, series)
    series = _C1 - tl.umulhi(fraction, series)
    series = _C0 - tl.umulhi(fraction, series)
    mantissa = (1 << 31) - tl.umulhi(fraction, series).to(tl.int64)
    return (mantissa << 9) >> (steps >> _FRACTION_BITS).to(tl.int64)


@triton.jit
def boundary(
    logits, vocab, temperature, peak, least, target, WEIGHED: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """`(key, below)`: the least key up to which tokens sum to more than `target`, and the sum of those below it; int64.

    Only tokens with keys from `least` on count, each as 1 or, if WEIGHED, by its weight.
    """
    low = least.to(tl.int64)
    high = ordered(peak).to(tl.int64)
    below = tl.zeros([], tl.int64)
    while low < high:
        step = (high - low) // 4 + 1
        first, second, third = low + step - 1, low + 2 * step - 1, low + 3 * step - 1
        to_first, to_second, to_third = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        for start in range(0, vocab, TOKENS):
            ids = start + tl.arange(0, TOKENS)
            x = processed_logits(logits, logits, ids, vocab, temperature, SCALED, False)
            key = ordered(x).to(tl.int64)
            near = (ids < vocab) & (key >= low) & (key <= high)
            if tl.max(near.to(tl.int32), axis=0) > 0:
                count = tl.where(near, weights(x, peak) if WEIGHED else near.to(tl.int64), 0)
                to_first += tl.sum(tl.where(key <= first, count, 0), axis=0)
                to_second += tl.sum(tl.where(key <= second, count, 0), axis=0)
                to_third += tl.sum(tl.where(key <= third, count, 0), axis=0)
        if below + to_first > target:
            high = tl.minimum(first, high)
        elif below + to_second > target:
            low, high, below = first + 1, tl.minimum(second, high), below + to_first
        elif below + to_third > target:
            low, high, below = second + 1, tl.minimum(third, high), below + to_second
        else:
            low, below = third + 1, below + to_third
    return low, below


@triton.jit
def row_sums(logits, vocab, temperature, SCALED: tl.constexpr, TOKENS: tl.constexpr):
    """`(largest logit, whether the row is a distribution)`."""
    peak = float("-inf")
    undefined = 0
    for start in range(0, vocab, TOKENS):
        x = processed_logits(logits, logits, start + tl.arange(0, TOKENS), vocab, temperature, SCALED, False)
        undefined += tl.sum((x != x).to(tl.int32), axis=0)
        peak = tl.maximum(peak, tl.max(x, axis=0))
    return peak, (undefined == 0) & (peak > float("-inf")) & (peak < float("inf"))


@triton.jit
def total_weight(logits, vocab, temperature, peak, least, SCALED: tl.constexpr, TOKENS: tl.constexpr):
    """Total weight of a row's tokens with keys from `least` on."""
    total = tl.zeros([], tl.int64)
    for start in range(0, vocab, TOKENS):
        x = processed_logits(logits, logits, start + tl.arange(0, TOKENS), vocab, temperature, SCALED, False)
        total += tl.sum(tl.where(ordered(x) >= least, weights(x, peak), 0), axis=0)
    return total


@triton.jit
def share_of(total, share):
    """As `truncate_reference.share_of`."""
    return (total >> 31) * share + ((total & 0x7FFFFFFF) * share >> 31)


@triton.jit(do_not_specialize=["top_k", "dropped_share", "least_share"])
def truncate_rows(
    logits, out, temperature, vocab, logits_stride, out_stride, top_k, dropped_share, least_share,
    SCALED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Truncates one row; grid `[rows]`. `out` may be `logits`: each tile is read before it is written."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    out += row * out_stride
    negative_infinity = float("-inf")
    peak, defined = row_sums(logits, vocab, temperature, SCALED, TOKENS)
    least = ordered(tl.full([], negative_infinity, tl.float32))
    surplus = tl.zeros([], tl.int64)  # tokens at `least` that are dropped: those with the lowest ids
    if defined:
        if TOP_K:
            found, _ = boundary(logits, vocab, temperature, peak, least, vocab - top_k, False, SCALED, TOKENS)
            least = found.to(tl.int32)
        if TOP_P:
            total = total_weight(logits, vocab, temperature, peak, least, SCALED, TOKENS)
            target = share_of(total, dropped_share)
            found, below = boundary(logits, vocab, temperature, peak, least, target, True, SCALED, TOKENS)
            least = found.to(tl.int32)
            logit = (least ^ ((least >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            surplus = (target - below) // weights(logit, peak)
    for start in range(0, vocab, TOKENS):
        ids = start + tl.arange(0, TOKENS)
        x = processed_logits(logits, logits, ids, vocab, temperature, SCALED, False)
        key = ordered(x)
        kept = key >= least
        if TOP_P:
            equal = ((key == least) & (ids < vocab)).to(tl.int32)
            here = tl.sum(equal, axis=0)
            if (surplus > 0) & (here > 0):
                kept = kept & ((equal == 0) | (tl.cumsum(equal, axis=0) > surplus))
                surplus -= here
        if MIN_P:
            kept = kept & ((weights(x, peak) >> 9) >= least_share)
        if not defined:
            kept = ids < vocab
        tl.store(out + ids, tl.where(kept, x, negative_infinity), mask=ids < vocab)


def truncate_triton(
    logits: torch.Tensor, truncation: Truncation, temperature: float, out: torch.Tensor
) -> torch.Tensor:
    """`out`; arguments as in `atlas_kernels.truncate.truncate`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    if rows:
        truncate_rows[(rows,)](
            logits,
            out,
            float(temperature),
            vocab,
            logits.stride(0) if rows > 1 else vocab,
            out.stride(0) if rows > 1 else vocab,
            min(truncation.top_k, vocab),
            truncation.dropped_share,
            truncation.least_share,
            SCALED=temperature != 1,
            TOP_K=0 < truncation.top_k < vocab,
            TOP_P=truncation.top_p < 1,
            MIN_P=truncation.min_p > 0,
            TOKENS=TOKENS if logits.device.type == "cuda" else _INTERPRETED_TOKENS,
            num_warps=NUM_WARPS,
        )
    return out
