"""The noise of `atlas_kernels.noise` in Triton: the same Philox words and the same float32 exponentials.

An exponential is a float64 logarithm rounded to float32. Libraries may differ in the logarithm's last place, which
changes the rounded number once in about 2**28 draws. `1 - u` is exact in float64, so `log(1 - u)` is as good as the
reference's `log1p(-u)`, and Triton supports it everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atlas_kernels import noise

BLOCK = tl.constexpr(noise.BLOCK)
_LOW = tl.constexpr(0xFFFFFFFF)
_U_SCALE = tl.constexpr(2.0**-32)
_PER_BLOCK = tl.constexpr(1.0 / noise.BLOCK)  # a power of two: exact


@triton.jit
def _words(key, counter, position, word2: tl.constexpr):
    """Philox4x32-10 with counter `(counter, position, word2, 0)`: four uint32 tensors like `counter` (int32)."""
    c0 = counter.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + (position & _LOW).to(tl.uint32)
    k0 = zero + (key & _LOW).to(tl.uint32)
    k1 = zero + ((key >> 32) & _LOW).to(tl.uint32)
    return tl.philox_impl(c0, c1, zero + word2, zero, k0, k1)


@triton.jit
def exponential_of_word(word):
    """Exp(1) in float64 from a 32-bit word."""
    return -tl.log(1.0 - (word.to(tl.float64) + 0.5) * _U_SCALE)


@triton.jit
def block_minima(key, position, blocks, STREAM: tl.constexpr):
    """`(M float32, lane* int32)` of noise blocks (int32, any shape) for one row."""
    w0, w1, _, _ = _words(key, blocks, position, 2 * STREAM)
    minimum = (exponential_of_word(w0) * _PER_BLOCK).to(tl.float32)
    return minimum, (w1 % BLOCK).to(tl.int32)


@triton.jit
def excesses(key, position, first, STREAM: tl.constexpr, TOKENS: tl.constexpr):
    """E' of the tokens `first .. first + TOKENS - 1`, both multiples of four: float32 `[TOKENS]`."""
    groups = tl.arange(0, TOKENS // 4) + first // 4
    w0, w1, w2, w3 = _words(key, groups, position, 2 * STREAM + 1)
    # After both joins the last axis has the pairs (w0, w2), (w1, w3): one reshape gives token order.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TOKENS])
    return exponential_of_word(words).to(tl.float32)


@triton.jit
def excess(key, position, tokens, STREAM: tl.constexpr):
    """E' of single tokens (int32, any shape): float32. One Philox block per token, where `excesses` has one per four."""
    w0, w1, w2, w3 = _words(key, tokens // 4, position, 2 * STREAM + 1)
    lane = tokens % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return exponential_of_word(word).to(tl.float32)


@triton.jit
def exponentials_of(key, position, tokens, STREAM: tl.constexpr):
    """E of single tokens (int32, any shape): float32, equal to `atlas_kernels.noise.exponentials_of`."""
    minimum, lane = block_minima(key, position, tokens // BLOCK, STREAM)
    return tl.where(tokens % BLOCK == lane, minimum, minimum + excess(key, position, tokens, STREAM))


@triton.jit
def uniform(key, position, STREAM: tl.constexpr):
    """One uniform variate in (0, 1): float64, for streams that draw no tokens."""
    word, _, _, _ = _words(key, tl.zeros([], tl.int32), position, 2 * STREAM)
    return (word.to(tl.float64) + 0.5) * _U_SCALE
