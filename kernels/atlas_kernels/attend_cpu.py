"""Attention of one new token per cache row in float32 on a CPU, compiled: the tokens are stored in the same pass.

torch attends over a rectangle: rows are padded to the longest, a mask says which cells count, and writing the cache, folding
heads and unfolding them are operations of their own. Here a task is one token and one of its key-value heads. Tasks of one
token read its row block by block, as far as it is filled, once for scores and once for values.

Exponentials are computed by a polynomial (Cephes' `expf`, within 2e-7), because that is vectorised and a call of the C
library is not.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from atlas_kernels.addresses import floats_at, integers_at
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.openmp import share_threads

share_threads()  # before a parallel kernel is compiled

# Sums may be reordered, so that they are vectorised. Their order depends on sizes alone.
_FAST = {"reassoc", "contract"}
_BLOCK = 1 << 13  # numbers of a row's cache that are read at once: 32 KB, which any core's cache holds
_GRAIN = 1 << 16  # numbers of the cache that are worth another thread, as torch has a least size for its own


def attend_single(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Store each token's key and value in its own row, then let its query attend to the row up to there.

    Args:
        query: float32 `[tokens, heads, dim]` on a CPU, contiguous, as are all other tensors.
        key: float32 `[tokens, kv_heads, dim]`; `kv_heads` divides `heads`.
        value: float32 `[tokens, kv_heads, value_dim]`.
        keys: float32 `[rows, cells, kv_heads, dim]`; written to.
        values: float32 `[rows, cells, kv_heads, value_dim]`, with its own numbers of rows and cells; written to.
        rows: int64 `[tokens]`, row of each token, no two alike; must be inside the cache, which is not checked.
        positions: int64 `[tokens]`, cell of each token; likewise.
        context: The largest position and one.
        scale: Factor on the scores.
        window: Most cells that a query sees, its own included; None is all up to its own.

    Returns:
        float32 `[tokens, heads, value_dim]`.

    Raises:
        ValueError: A shape or type does not fit.
    """
    floats, integers = (query, key, value, keys, values), (rows, positions)
    (tokens, heads, dim), (kv_heads, value_dim) = query.shape, value.shape[1:]
    if (
        (key.shape, value.shape) != ((tokens, kv_heads, dim), (tokens, kv_heads, value_dim))
        or (keys.shape[2:], values.shape[2:]) != ((kv_heads, dim), (kv_heads, value_dim))
        or heads % kv_heads
        or len(rows) != tokens
        or len(positions) != tokens
        or any(tensor.dtype != torch.float32 for tensor in floats)
        or any(tensor.dtype != torch.int64 for tensor in integers)
        or not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in (*floats, *integers))
    ):
        raise ValueError(
            "query, key and value must be contiguous float32 [tokens, heads, dim], the cache [rows, cells, heads, dim], got "
            + ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in (*floats, *integers))
        )
    return attend_single_unchecked(query, key, value, keys, values, rows, positions, context, scale, window)


def attend_single_unchecked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`attend_single` for a caller that has made these tensors itself: memory is written by their addresses."""
    (tokens, heads, dim), (_, kv_heads, value_dim) = query.shape, value.shape
    # The kernel writes float32 in the host's memory, whatever torch's default type and device are.
    out = torch.empty(tokens, heads, value_dim, dtype=torch.float32, device="cpu")
    at = [each.data_ptr() for each in (query, key, value, keys, values, rows, positions, out)]
    sizes = tokens, heads, kv_heads, dim, value_dim, *keys.shape[:2], *values.shape[:2], context, window or context
    call = np.array((*at, *sizes), np.int64)
    numbers = tokens * context * kv_heads * (dim + value_dim)
    _attend(call, float(scale), tokens * kv_heads, min(torch.get_num_threads(), 1 + numbers // _GRAIN))
    return out


def compile_attention() -> None:
    """Compile both forms: on one thread, and on several."""
    new, cache, places, out = (
        torch.ones(1, 1, 2, dtype=torch.float32, device="cpu"),
        torch.ones(1, 1, 1, 2, dtype=torch.float32, device="cpu"),
        torch.zeros(1, dtype=torch.int64, device="cpu"),
        torch.ones(2, dtype=torch.float32, device="cpu"),
    )
    tensors = new, new, new, cache, cache, places, places, out
    call = np.array([*(tensor.data_ptr() for tensor in tensors), 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 1], np.int64)
    for threads in (1, 2):
        _attend(call, 1.0, 1, threads)


def _attend(call: np.ndarray, scale: float, tasks: int, threads: int) -> None:
    if threads == 1:
        _some_tasks(call, scale, 0, tasks)
    else:
        _all_tasks(call, scale, tasks, threads)


@cached_njit(nogil=True, parallel=True)
def _all_tasks(call, scale, tasks, parts):
    for part in numba.prange(parts):
        index = np.int64(part)  # unsigned otherwise, and its product with a signed number a float
        _some_tasks(call, scale, index * tasks // parts, (index + 1) * tasks // parts)


@cached_njit(nogil=True, error_model="numpy")
def _some_tasks(call, scale, begin, end):
    tokens, heads, kv_heads, dim, value_dim = call[8], call[9], call[10], call[11], call[12]
    query, key = floats_at(call[0], (tokens, heads, dim)), floats_at(call[1], (tokens, kv_heads, dim))
    value = floats_at(call[2], (tokens, kv_heads, value_dim))
    keys = floats_at(call[3], (call[13], call[14], kv_heads, dim))
    values = floats_at(call[4], (call[15], call[16], kv_heads, value_dim))
    rows, positions = integers_at(call[5], (tokens,)), integers_at(call[6], (tokens,))
    out = floats_at(call[7], (tokens, heads, value_dim))
    shares, largest = np.empty((heads, call[17]), np.float32), np.empty(heads, np.float32)
    seen = np.empty(1, np.float32)
    task = begin
    while task < end:
        token, first_head = task // kv_heads, task % kv_heads
        end_head = min(kv_heads, first_head + end - task)
        row, position = rows[token], positions[token]
        for kv_head in range(first_head, end_head):
            keys[row, position, kv_head] = key[token, kv_head]
            values[row, position, kv_head] = value[token, kv_head]
        first = max(0, position + 1 - call[18])
        count = position + 1 - first
        _score_all(
            query[token], keys[row], first_head, end_head, first, count, np.float32(scale), shares, largest, seen
        )
        for head in range(first_head * (heads // kv_heads), end_head * (heads // kv_heads)):
            total = _exponentials(shares[head], count, largest[head])
            _divide(shares[head], count, total)
        _mix_all(values[row], first_head, end_head, first, count, shares, out[token], seen)
        task += end_head - first_head


@cached_njit(nogil=True, error_model="numpy")
def _score_all(query, keys, first_head, end_head, first, count, scale, shares, largest, seen):
    """Scores of the queries `[heads, dim]` of some key-value heads for `count` cells of a row; the largest of each."""
    group, block = len(query) // keys.shape[1], _cells_of_block(keys)
    largest[:] = -np.inf
    for begin in range(0, count, block):
        size = min(block, count - begin)
        seen[0] = _read(keys, first + begin, size)
        for kv_head in range(first_head, end_head):
            for head in range(kv_head * group, (kv_head + 1) * group):
                scores = shares[head, begin : begin + size]
                most = _score(query[head], keys, kv_head, first + begin, size, scale, scores)
                largest[head] = max(largest[head], most)


@cached_njit(nogil=True, error_model="numpy")
def _mix_all(values, first_head, end_head, first, count, shares, out, seen):
    """Sums of the values of some key-value heads by their shares, `[heads, value_dim]`."""
    group, block = len(out) // values.shape[1], _cells_of_block(values)
    out[first_head * group : end_head * group] = 0
    for begin in range(0, count, block):
        size = min(block, count - begin)
        seen[0] = _read(values, first + begin, size)
        for kv_head in range(first_head, end_head):
            for head in range(kv_head * group, (kv_head + 1) * group):
                _mix(values, kv_head, first + begin, size, shares[head, begin : begin + size], out[head])


@cached_njit(nogil=True)
def _cells_of_block(cache):
    """Cells of a block that a core's cache holds; a multiple of four, as cells are summed in fours."""
    return max(4, _BLOCK // (cache.shape[1] * cache.shape[2]) // 4 * 4)


@cached_njit(nogil=True, fastmath=_FAST)
def _read(cache, first, size):
    """Read cells of a row, of all key-value heads, from one end to the other; returns their sum, so that it is not left out.

    A head's cells are apart, and a core that computes with them waits for each. This reads them at the rate of memory.
    """
    total = np.float32(0)
    cells = cache[first : first + size].reshape(-1)
    for number in range(len(cells)):
        total += cells[number]
    return total


@cached_njit(nogil=True, fastmath=_FAST)
def _score(query, keys, kv_head, first, count, scale, scores):
    """Scores of a query for `count` cells; returns the largest. The sums of four cells do not wait for each other."""
    largest = np.float32(-np.inf)
    for cell in range(0, count, 4):
        # At the end the last cell takes the place of those that are missing, and is computed again.
        second, third, fourth = min(cell + 1, count - 1), min(cell + 2, count - 1), min(cell + 3, count - 1)
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
def _exponentials(scores, count, largest):
    """Replace scores by their exponentials relative to the largest; returns the sum."""
    total = np.float32(0)
    for cell in range(count):
        share = _exp(scores[cell] - largest)
        scores[cell] = share
        total += share
    return total


# No `reassoc`: ln 2 is subtracted in two parts, and their order is what makes it exact.
@cached_njit(nogil=True, fastmath={"contract"})
def _exp(x):
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
def _divide(shares, count, total):
    factor = np.float32(1) / total
    for cell in range(count):
        shares[cell] *= factor


@cached_njit(nogil=True, fastmath=_FAST)
def _mix(values, kv_head, first, count, shares, out):
    """Add values by their shares. Four cells at a time: the sum is loaded and stored once for them."""
    fours = count // 4 * 4
    for cell in range(0, fours, 4):
        a, b, c, d = shares[cell], shares[cell + 1], shares[cell + 2], shares[cell + 3]
        for i in range(len(out)):
            out[i] += (
                a * values[first + cell, kv_head, i]
                + b * values[first + cell + 1, kv_head, i]
                + c * values[first + cell + 2, kv_head, i]
                + d * values[first + cell + 3, kv_head, i]
            )
    for cell in range(fours, count):
        share = shares[cell]
        for i in range(len(out)):
            out[i] += share * values[first + cell, kv_head, i]
