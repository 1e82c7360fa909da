"""The sums of `attend_cpu` over a row's cells, compiled: scores of one query or two, exponentials, sums of values by shares.

A score is a sum over a key's numbers, so several cells and queries are computed side by side, whose sums do not wait for
each other. What is loaded serves all of them.

Exponentials are computed by a polynomial (Cephes' `expf`, within 2e-7), because that is vectorised and a call of the C
library is not.
"""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit

# Sums may be reordered, so that they are vectorised. Their order depends on sizes alone.
_FAST = {"reassoc", "contract"}
_BLOCK = 1 << 13  # numbers of a row's cache that are read at once: 32 KB, which any core's cache holds


@cached_njit(nogil=True)
def cells_of_block(cache):
    """Cells of a block that a core's cache holds; a multiple of four, as cells are summed in fours."""
    return max(4, _BLOCK // (cache.shape[1] * cache.shape[2]) // 4 * 4)


@cached_njit(nogil=True, fastmath=_FAST)
def read(cache, first, size):
    """Read cells of a row, of all key-value heads, from one end to the other; returns their sum, so that it is not left out.

    A head's cells are apart, and a core that computes with them waits for each. This reads them at the rate of memory.
    """
    total = np.float32(0)
    cells = cache[first : first + size].reshape(-1)
    for number in range(len(cells)):
        total += cells[number]
    return total


@cached_njit(nogil=True, fastmath=_FAST)
def score(query, keys, kv_head, first, scale, scores):
    """Scores of a query from cell `first` on; returns the largest. The sums of four cells do not wait for each other."""
    largest, last = np.float32(-np.inf), len(scores) - 1
    for cell in range(0, last + 1, 4):
        # At the end the last cell takes the place of those that are missing, and is computed again.
        second, third, fourth = min(cell + 1, last), min(cell + 2, last), min(cell + 3, last)
        a = b = c = d = np.float32(0)
        for i in range(len(query)):
            number = query[i]
            a += number * keys[first + cell, kv_head, i]
            b += number * keys[first + second, kv_head, i]
            c += number * keys[first + third, kv_head, i]
            d += number * keys[first + fourth, kv_head, i]
        a, b, c, d = a * scale, b * scale, c * scale, d * scale
        scores[cell], scores[second], scores[third], scores[fourth] = a, b, c, d
        largest = max(largest, max(max(a, b), max(c, d)))
    return largest


@cached_njit(nogil=True, fastmath=_FAST)
def score_two(query, other, keys, kv_head, first, scale, scores, others):
    """`score` of two queries that see the same cells."""
    largest, most, last = np.float32(-np.inf), np.float32(-np.inf), len(scores) - 1
    for cell in range(0, last + 1, 4):
        second, third, fourth = min(cell + 1, last), min(cell + 2, last), min(cell + 3, last)
        a = b = c = d = np.float32(0)
        e = f = g = h = np.float32(0)
        for i in range(len(query)):
            number, twin = query[i], other[i]
            k, p = keys[first + cell, kv_head, i], keys[first + second, kv_head, i]
            m, n = keys[first + third, kv_head, i], keys[first + fourth, kv_head, i]
            a, b, c, d = a + number * k, b + number * p, c + number * m, d + number * n
            e, f, g, h = e + twin * k, f + twin * p, g + twin * m, h + twin * n
        a, b, c, d = a * scale, b * scale, c * scale, d * scale
        e, f, g, h = e * scale, f * scale, g * scale, h * scale
        scores[cell], scores[second], scores[third], scores[fourth] = a, b, c, d
        others[cell], others[second], others[third], others[fourth] = e, f, g, h
        largest, most = max(largest, max(max(a, b), max(c, d))), max(most, max(max(e, f), max(g, h)))
    return largest, most


@cached_njit(nogil=True, fastmath=_FAST)
def exponentials(scores, largest):
    """Replace scores by their exponentials relative to the largest; returns the sum."""
    total = np.float32(0)
    for cell in range(len(scores)):
        share = exp(scores[cell] - largest)
        scores[cell] = share
        total += share
    return total


# No `reassoc`: ln 2 is subtracted in two parts, and their order is what makes it exact.
@cached_njit(nogil=True, fastmath={"contract"})
def exp(x):
    """`exp(x)` for x <= 0; NaN stays NaN."""
    if x < np.float32(-87):
        x = np.float32(-87)
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - whole * np.float32(0.693359375)
    rest = rest - whole * np.float32(-2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1)
    return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@cached_njit(nogil=True)
def divide(shares, total):
    """Divide shares by their sum."""
    factor = np.float32(1) / total
    for cell in range(len(shares)):
        shares[cell] *= factor


@cached_njit(nogil=True, fastmath=_FAST)
def mix(values, kv_head, first, shares, out):
    """Add values by their shares. Four cells at a time: the sum is loaded and stored once for them."""
    fours = len(shares) // 4 * 4
    for cell in range(0, fours, 4):
        a, b, c, d = shares[cell], shares[cell + 1], shares[cell + 2], shares[cell + 3]
        for i in range(len(out)):
            out[i] += (
                a * values[first + cell, kv_head, i]
                + b * values[first + cell + 1, kv_head, i]
                + c * values[first + cell + 2, kv_head, i]
                + d * values[first + cell + 3, kv_head, i]
            )
    for cell in range(fours, len(shares)):
        share = shares[cell]
        for i in range(len(out)):
            out[i] += share * values[first + cell, kv_head, i]


@cached_njit(nogil=True, fastmath=_FAST)
def mix_two(values, kv_head, first, shares, others, out, twin):
    """`mix` for two heads."""
    fours = len(shares) // 4 * 4
    for cell in range(0, fours, 4):
        a, b, c, d = shares[cell], shares[cell + 1], shares[cell + 2], shares[cell + 3]
        e, f, g, h = others[cell], others[cell + 1], others[cell + 2], others[cell + 3]
        for i in range(len(out)):
            k, p = values[first + cell, kv_head, i], values[first + cell + 1, kv_head, i]
            m, n = values[first + cell + 2, kv_head, i], values[first + cell + 3, kv_head, i]
            out[i] += a * k + b * p + c * m + d * n
            twin[i] += e * k + f * p + g * m + h * n
    for cell in range(fours, len(shares)):
        share, other = shares[cell], others[cell]
        for i in range(len(out)):
            number = values[first + cell, kv_head, i]
            out[i] += share * number
            twin[i] += other * number
