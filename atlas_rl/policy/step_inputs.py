"""Compiled packing of the inputs of a decode step of fixed shape (`step_graphs.py`)."""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit


@cached_njit(nogil=True)
def padded_tokens(size, tokens, starts, lengths, rows, behind):
    """The inputs of a step: its tokens, padded by repeating the last one, and what lies behind them.

    Args:
        size: Tokens of the shape, at least `len(tokens)`.
        tokens: int64 `[num_tokens]`.
        starts: int64 `[rows]`, position of each row's first token.
        lengths: int64 `[rows]`.
        rows: int64 `[rows]`, cache rows.
        behind: int64 `[n]`.

    Returns:
        int64 `[3 * size + n]`: token ids, positions, cache rows, `behind`.
    """
    numbers = np.empty(3 * size + len(behind), np.int64)
    at = 0
    for row in range(len(rows)):
        for place in range(lengths[row]):
            numbers[at] = tokens[at]
            numbers[size + at], numbers[2 * size + at] = starts[row] + place, rows[row]
            at += 1
    for row in range(3):
        numbers[row * size + at : (row + 1) * size] = numbers[row * size + at - 1]
    numbers[3 * size :] = behind
    return numbers
