"""Products of a few float32 rows with weights on a CPU, compiled: weights are read once, as they are stored.

Libraries are made for many rows: on an AMD EPYC, MKL took three times as long for one row as reading the weights. oneDNN is
faster, but with a copy of the weights in a layout of its own.

Up to three rows, outputs are computed one by one, so that a weight is read from one end to the other, at the rate of memory.
With more rows, the sums of four outputs and four or six rows are computed side by side: what is loaded serves all of them.
These outputs are a quarter of the weight apart, so that each quarter is read from one end to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch

from atlas_kernels.addresses import floats_at, weight_address
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.openmp import share_threads

share_threads()  # before a parallel kernel is compiled

# Sums may be reordered, so that they are vectorised.
_FAST = {"reassoc", "contract"}
_GRAIN = 1 << 16  # numbers of the weights that are worth another thread


def few_rows_linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Products of rows with each of some weights, as by `torch.nn.functional.linear`, up to rounding; without gradients.

    Args:
        x: float32 `[rows, in]` on a CPU. Any number of rows is allowed; many take longer than by other routes.
        weights: float32 `[out, in]` on a CPU. One that is not contiguous is copied.

    Returns:
        float32 `[rows, out]` for each weight.

    Raises:
        ValueError: A shape or type does not fit.
        RuntimeError: The memory of a weight was given back.
    """
    (rows, inputs), x = x.shape, x.contiguous()
    call, numbers, outs, kept = [x.data_ptr(), rows, inputs], 0, [], []
    for weight in weights:
        outputs, width = weight.shape
        if width != inputs or not _is_float(weight) or not _is_float(x):
            raise ValueError(
                f"rows and weights must be float32 [rows, in] and [out, in] on a CPU, got {_shown(x)} and {_shown(weight)}"
            )
        if not weight.is_contiguous():
            weight = weight.contiguous()
            kept.append(weight)
        out = x.new_empty((rows, outputs))
        call += weight_address(weight), out.data_ptr(), outputs
        numbers += outputs * inputs
        outs.append(out)
    _multiply(np.array(call, np.int64), min(torch.get_num_threads(), 1 + numbers // _GRAIN))
    return tuple(outs)


def compile_products() -> None:
    """Compile both forms: on one thread, and on several."""
    number, out = (torch.ones(1, dtype=torch.float32, device="cpu") for _ in range(2))
    call = np.array([number.data_ptr(), 1, 1, number.data_ptr(), out.data_ptr(), 1], np.int64)
    for threads in (1, 2):
        _multiply(call, threads)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _multiply(call: np.ndarray, threads: int) -> None:
    if threads == 1:
        _some_outputs(call, 0, 1)
    else:
        _all_outputs(call, threads)


@cached_njit(nogil=True, parallel=True)
def _all_outputs(call, parts):
    for part in numba.prange(parts):
        _some_outputs(call, np.int64(part), parts)


@cached_njit(nogil=True)
def _some_outputs(call, part, parts):
    """A part of every weight's outputs."""
    rows, inputs = call[1], call[2]
    x = floats_at(call[0], (rows, inputs))
    for at in range(3, len(call), 3):
        outputs = call[at + 2]
        weight, out = floats_at(call[at], (outputs, inputs)), floats_at(call[at + 1], (rows, outputs))
        begin, end = outputs * part // parts, outputs * (part + 1) // parts
        if rows >= 4:
            quarter = (end - begin) // 4
            _by_quarters(x, weight[begin:], out[:, begin:], quarter)
            begin += 4 * quarter
        _one_by_one(x, weight, out, begin, end)


@cached_njit(nogil=True)
def _one_by_one(x, weight, out, begin, end):
    for row in range(0, len(x), 3):
        rows = min(3, len(x) - row)
        for output in range(begin, end):
            if rows == 3:
                _three_rows(x[row], x[row + 1], x[row + 2], weight[output], out[row:, output])
            elif rows == 2:
                _two_rows(x[row], x[row + 1], weight[output], out[row:, output])
            else:
                out[row, output] = _one_row(x[row], weight[output])


@cached_njit(nogil=True)
def _by_quarters(x, weight, out, quarter):
    """The first outputs, four times a quarter, of at least four rows.

    Of an odd number of rows one is computed twice; of five, three are.
    """
    rows = len(x)
    for output in range(quarter):
        second, third = output + quarter, output + 2 * quarter
        four = weight[output], weight[second], weight[third], weight[third + quarter]
        outs = out[:, output], out[:, second], out[:, third], out[:, third + quarter]
        row = 0
        while row < rows:
            left = (rows - row + 1) // 2 * 2
            if rows >= 6 and (left >= 12 or left % 4 == 2):
                _four_by_six(x, min(row, rows - 6), four, outs)
                row += 6
            else:
                _four_by_four(x, min(row, rows - 4), four, outs)
                row += 4


@cached_njit(nogil=True, fastmath=_FAST)
def _one_row(x, weight):
    total = np.float32(0)
    for i in range(len(weight)):
        total += x[i] * weight[i]
    return total


@cached_njit(nogil=True, fastmath=_FAST)
def _two_rows(x, y, weight, out):
    a = b = np.float32(0)
    for i in range(len(weight)):
        number = weight[i]
        a += x[i] * number
        b += y[i] * number
    out[0], out[1] = a, b


@cached_njit(nogil=True, fastmath=_FAST)
def _three_rows(x, y, z, weight, out):
    a = b = c = np.float32(0)
    for i in range(len(weight)):
        number = weight[i]
        a += x[i] * number
        b += y[i] * number
        c += z[i] * number
    out[0], out[1], out[2] = a, b, c


@cached_njit(nogil=True, fastmath=_FAST)
def _four_by_four(x, row, weights, outs):
    p, q, r, s = weights
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for i in range(len(p)):
        a, b, c, d = p[i], q[i], r[i], s[i]
        number = x0[i]
        a0, b0, c0, d0 = a0 + number * a, b0 + number * b, c0 + number * c, d0 + number * d
        number = x1[i]
        a1, b1, c1, d1 = a1 + number * a, b1 + number * b, c1 + number * c, d1 + number * d
        number = x2[i]
        a2, b2, c2, d2 = a2 + number * a, b2 + number * b, c2 + number * c, d2 + number * d
        number = x3[i]
        a3, b3, c3, d3 = a3 + number * a, b3 + number * b, c3 + number * c, d3 + number * d
    sums = (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3)
    for output in range(4):
        for at in range(4):
            outs[output][row + at] = sums[output][at]


@cached_njit(nogil=True, fastmath=_FAST)
def _four_by_six(x, row, weights, outs):
    p, q, r, s = weights
    x0, x1, x2, x3, x4, x5 = x[row], x[row + 1], x[row + 2], x[row + 3], x[row + 4], x[row + 5]
    a0 = a1 = a2 = a3 = a4 = a5 = b0 = b1 = b2 = b3 = b4 = b5 = np.float32(0)
    c0 = c1 = c2 = c3 = c4 = c5 = d0 = d1 = d2 = d3 = d4 = d5 = np.float32(0)
    for i in range(len(p)):
        a, b, c, d = p[i], q[i], r[i], s[i]
        number = x0[i]
        a0, b0, c0, d0 = a0 + number * a, b0 + number * b, c0 + number * c, d0 + number * d
        number = x1[i]
        a1, b1, c1, d1 = a1 + number * a, b1 + number * b, c1 + number * c, d1 + number * d
        number = x2[i]
        a2, b2, c2, d2 = a2 + number * a, b2 + number * b, c2 + number * c, d2 + number * d
        number = x3[i]
        a3, b3, c3, d3 = a3 + number * a, b3 + number * b, c3 + number * c, d3 + number * d
        number = x4[i]
        a4, b4, c4, d4 = a4 + number * a, b4 + number * b, c4 + number * c, d4 + number * d
        number = x5[i]
        a5, b5, c5, d5 = a5 + number * a, b5 + number * b, c5 + number * c, d5 + number * d
    sums = (
        (a0, a1, a2, a3, a4, a5),
        (b0, b1, b2, b3, b4, b5),
        (c0, c1, c2, c3, c4, c5),
        (d0, d1, d2, d3, d4, d5),
    )
    for output in range(4):
        for at in range(6):
            outs[output][row + at] = sums[output][at]
