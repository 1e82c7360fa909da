"""Attention of the new tokens of a ragged batch in float32 on a CPU, compiled: the tokens are stored in the same pass.

torch attends over a rectangle: rows are padded to the longest, a mask says which cells count, and writing the cache, folding
heads and unfolding them are operations of their own. Here a task is a row's tokens and one of its key-value heads. Tasks of
one row read it block by block, as far as it is filled, once for scores and once for values.

A token's numbers do not depend on the other tokens: it has the same in a plain step and among drafts.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch

from atlas_kernels.addresses import floats_at, integers_at, short_integers_at
from atlas_kernels.attend_sums import cells_of_block, divide, exponentials, mix, mix_two, read, score, score_two
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.openmp import share_threads

share_threads()  # before a parallel kernel is compiled

_GRAIN = 1 << 16  # numbers of the cache that are worth another thread, as torch has a least size for its own
_AT_ONCE = 32  # tokens of a row whose scores are held at a time


class Cache(NamedTuple):
    """Keys and values of all rows, and where the new tokens go: see `attend_rows`."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    context: int


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    offsets: torch.Tensor,
    context: int,
    scale: float,
    window: int | None,
    *,
    checked: bool = True,
) -> torch.Tensor:
    """Store each token's key and value in its row, then let its query attend to the row up to there.

    Args:
        query: float32 `[tokens, heads, dim]` on a CPU, contiguous, as are all other tensors.
        key: float32 `[tokens, kv_heads, dim]`; `kv_heads` divides `heads`.
        value: float32 `[tokens, kv_heads, value_dim]`.
        keys: float32 `[rows, cells, kv_heads, dim]`; written to.
        values: float32 `[rows, cells, kv_heads, value_dim]`, with its own numbers of rows and cells; written to.
        rows: int64 `[tokens]`, row of each token; must be inside the cache, which is not checked.
        positions: int64 `[tokens]`, cell of each token; likewise. Those of a row follow one another.
        offsets: int32 `[batch + 1]`, where each row's tokens begin, and where the last one's end; the first is 0. Every row
            has tokens, and no row occurs twice, which is not checked.
        context: The largest position and one; not checked either.
        scale: Factor on the scores.
        window: Most cells that a query sees, its own included; None is all up to its own.
        checked: False for a caller that has made these tensors itself. Memory is written by their addresses.

    Returns:
        float32 `[tokens, heads, value_dim]`.

    Raises:
        ValueError: A shape or type does not fit.
    """
    if checked:
        _check((query, key, value, keys, values), (rows, positions), offsets)
    (tokens, heads, dim), (_, kv_heads, value_dim) = query.shape, value.shape
    # The kernel writes float32 in the host's memory, whatever torch's default type and device are.
    out = torch.empty(tokens, heads, value_dim, dtype=torch.float32, device="cpu")
    at = [each.data_ptr() for each in (query, key, value, keys, values, rows, positions, offsets, out)]
    sizes = tokens, heads, kv_heads, dim, value_dim
    cache = *keys.shape[:2], *values.shape[:2], context, window or context, len(offsets) - 1
    parts = num_parts(tokens * context * kv_heads * (dim + value_dim))
    attend(np.array((*at, *sizes, *cache), np.int64), float(scale), parts)
    return out


def num_parts(numbers: int) -> int:
    """Threads that reading so many numbers of the cache is divided among."""
    return min(torch.get_num_threads(), 1 + numbers // _GRAIN)


def _check(
    floats: tuple[torch.Tensor, ...], integers: tuple[torch.Tensor, torch.Tensor], offsets: torch.Tensor
) -> None:
    query, key, value, keys, values = floats
    (tokens, heads, dim), (kv_heads, value_dim) = query.shape, value.shape[1:]
    if (
        (key.shape, value.shape) != ((tokens, kv_heads, dim), (tokens, kv_heads, value_dim))
        or (keys.shape[2:], values.shape[2:]) != ((kv_heads, dim), (kv_heads, value_dim))
        or heads % kv_heads
        or any(len(tensor) != tokens for tensor in integers)
        or int(offsets[-1]) != tokens
        or any(tensor.dtype != torch.float32 for tensor in floats)
        or any(tensor.dtype != torch.int64 for tensor in integers)
        or offsets.dtype != torch.int32
        or not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in (*floats, *integers, offsets))
    ):
        raise ValueError(
            "query, key and value must be contiguous float32 [tokens, heads, dim], the cache [rows, cells, heads, dim], got "
            + ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in (*floats, *integers, offsets))
        )


def compile_attention() -> None:
    """Compile the kernel."""
    new, cache, places, offsets, out = (
        torch.ones(1, 1, 2, dtype=torch.float32, device="cpu"),
        torch.ones(1, 1, 1, 2, dtype=torch.float32, device="cpu"),
        torch.zeros(1, dtype=torch.int64, device="cpu"),
        torch.tensor([0, 1], dtype=torch.int32, device="cpu"),
        torch.ones(2, dtype=torch.float32, device="cpu"),
    )
    tensors = new, new, new, cache, cache, places, places, offsets, out
    call = np.array([*(tensor.data_ptr() for tensor in tensors), 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 1, 1], np.int64)
    attend(call, 1.0, 1)


@cached_njit(nogil=True, parallel=True)
def _all_tasks(call, scale, parts):
    for part in numba.prange(parts):
        index = np.int64(part)  # unsigned otherwise, and its product with a signed number a float
        _some_tasks(call, scale, _first_task(call, index, parts), _first_task(call, index + 1, parts))


@cached_njit(nogil=True)
def _first_task(call, part, parts):
    """The first task of one of several parts that take about as long: a row is read once, and again for each token."""
    kv_heads, batch = call[11], call[20]
    positions, offsets = integers_at(call[6], (call[9],)), short_integers_at(call[7], (batch + 1,))
    total = 0
    for number in range(batch):
        total += (1 + offsets[number + 1] - offsets[number]) * (1 + positions[offsets[number + 1] - 1])
    before, wanted = 0, kv_heads * total * part // parts
    for number in range(batch):
        head_costs = (1 + offsets[number + 1] - offsets[number]) * (1 + positions[offsets[number + 1] - 1])
        if before + kv_heads * head_costs > wanted:
            return number * kv_heads + (wanted - before) // head_costs
        before += kv_heads * head_costs
    return batch * kv_heads


@cached_njit(nogil=True, error_model="numpy")
def _some_tasks(call, scale, begin, end):
    tokens, heads, kv_heads, dim, value_dim = call[9], call[10], call[11], call[12], call[13]
    query, key = floats_at(call[0], (tokens, heads, dim)), floats_at(call[1], (tokens, kv_heads, dim))
    value = floats_at(call[2], (tokens, kv_heads, value_dim))
    keys = floats_at(call[3], (call[14], call[15], kv_heads, dim))
    values = floats_at(call[4], (call[16], call[17], kv_heads, value_dim))
    rows, positions = integers_at(call[5], (tokens,)), integers_at(call[6], (tokens,))
    offsets = short_integers_at(call[7], (call[20] + 1,))
    out = floats_at(call[8], (tokens, heads, value_dim))
    at_once, seen = min(_AT_ONCE, tokens - call[20] + 1), np.empty(1, np.float32)
    shares, largest = np.empty((at_once, heads, call[18]), np.float32), np.empty((at_once, heads), np.float32)
    task = begin
    while task < end:
        number, first_head = task // kv_heads, task % kv_heads
        end_head = min(kv_heads, first_head + end - task)
        first_token, end_token = np.int64(offsets[number]), np.int64(offsets[number + 1])
        row = rows[first_token]
        for token in range(first_token, end_token):
            for kv_head in range(first_head, end_head):
                keys[row, positions[token], kv_head] = key[token, kv_head]
                values[row, positions[token], kv_head] = value[token, kv_head]
        own = first_head, end_head
        for token in range(first_token, end_token, at_once):
            until = min(end_token, token + at_once)
            ends = positions[token:until] + 1
            firsts = np.maximum(0, ends - call[19])
            _score_all(query[token:until], keys[row], firsts, ends, own, np.float32(scale), shares, largest, seen)
            _softmax(firsts, ends, own, heads // kv_heads, shares, largest)
            _mix_all(values[row], firsts, ends, own, shares, out[token:until], seen)
        task += end_head - first_head


@cached_njit(nogil=True)
def attend(call, scale, parts):
    """Attend by several threads, or one.

    `call` is int64: addresses of `attend_rows`'s queries, keys, values, cached keys and values, rows, positions, offsets and
    results; numbers of tokens, heads, key-value heads, and numbers of a head's key and value; rows and cells of the cached
    keys, and of the values; context, window, and number of rows with tokens.
    """
    if parts == 1:
        _some_tasks(call, scale, 0, call[11] * call[20])
    else:
        _all_tasks(call, scale, parts)


@cached_njit(nogil=True, error_model="numpy")
def _score_all(query, keys, firsts, ends, own, scale, shares, largest, seen):
    """Scores of the queries `[tokens, heads, dim]` of some key-value heads for the cells they see; the largest of each."""
    group, block = query.shape[1] // keys.shape[1], cells_of_block(keys)
    largest[:] = -np.inf
    begin = firsts[0]
    while begin < ends[-1]:
        end = min(ends[-1], (begin // block + 1) * block)
        seen[0] = read(keys, begin, end - begin)
        for token in range(len(query)):
            first, count = max(begin, firsts[token]), min(end, ends[token]) - max(begin, firsts[token])
            if count > 0:
                at = slice(first - firsts[0], first - firsts[0] + count)
                for kv_head in range(own[0], own[1]):
                    _score_group(query[token], keys, kv_head, group, first, scale, shares[token, :, at], largest[token])
        begin = end


@cached_njit(nogil=True, error_model="numpy")
def _score_group(query, keys, kv_head, group, first, scale, scores, largest):
    """Scores of a token's heads that share a key-value head. Two heads at a time: a key is loaded once for both."""
    end = (kv_head + 1) * group
    for head in range(kv_head * group, end - 1, 2):
        most, other = score_two(
            query[head], query[head + 1], keys, kv_head, first, scale, scores[head], scores[head + 1]
        )
        largest[head], largest[head + 1] = max(largest[head], most), max(largest[head + 1], other)
    if group % 2:
        most = score(query[end - 1], keys, kv_head, first, scale, scores[end - 1])
        largest[end - 1] = max(largest[end - 1], most)


@cached_njit(nogil=True, error_model="numpy")
def _softmax(firsts, ends, own, group, shares, largest):
    """Replace scores by shares, whose sum is one."""
    for token in range(len(ends)):
        at = slice(firsts[token] - firsts[0], ends[token] - firsts[0])
        for head in range(own[0] * group, own[1] * group):
            scores = shares[token, head, at]
            divide(scores, exponentials(scores, largest[token, head]))


@cached_njit(nogil=True, error_model="numpy")
def _mix_all(values, firsts, ends, own, shares, out, seen):
    """Sums of the values of some key-value heads by their shares, `[tokens, heads, value_dim]`."""
    group, block = out.shape[1] // values.shape[1], cells_of_block(values)
    out[:, own[0] * group : own[1] * group] = 0
    begin = firsts[0]
    while begin < ends[-1]:
        end = min(ends[-1], (begin // block + 1) * block)
        seen[0] = read(values, begin, end - begin)
        for token in range(len(out)):
            first, count = max(begin, firsts[token]), min(end, ends[token]) - max(begin, firsts[token])
            if count > 0:
                at = slice(first - firsts[0], first - firsts[0] + count)
                for kv_head in range(own[0], own[1]):
                    _mix_group(values, kv_head, group, first, shares[token, :, at], out[token])
        begin = end


@cached_njit(nogil=True, error_model="numpy")
def _mix_group(values, kv_head, group, first, shares, out):
    """Add values to the sums of the heads that share a key-value head, two heads at a time."""
    end = (kv_head + 1) * group
    for head in range(kv_head * group, end - 1, 2):
        mix_two(values, kv_head, first, shares[head], shares[head + 1], out[head], out[head + 1])
    if group % 2:
        mix(values, kv_head, first, shares[end - 1], out[end - 1])
