"""Products of a few float32 rows with weights on a CPU, compiled: weights are read once, as they are stored.

Libraries are made for many rows: on an AMD EPYC, MKL took three times as long for one row as reading the weights. oneDNN is
faster, but with a copy of the weights in a layout of its own.

Every thread divides its outputs into `OUTPUTS` streams, each read from one end to the other: neighbouring outputs would be
short streams, and a core waits at the begin of each. A tile (`tiles_cpu.py`) multiplies one output of each stream with up to
`ROWS` rows, while the next outputs are fetched from memory. So a few rows take as long as reading the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
import torch

from atlas_kernels.addresses import floats_at, weight_address
from atlas_kernels.jit_cache import cached_njit, content_key
from atlas_kernels.openmp import share_threads
from atlas_kernels.tiles_cpu import FORMS, OUTPUTS, ROWS, tile

share_threads()  # before a parallel kernel is compiled

_BYTES = 4  # of a float32
_LANES = tuple([form.lanes for form in FORMS])
_GRAIN = 1 << 16  # numbers of the weights that are worth another thread


def few_rows_linear(x: torch.Tensor, weights: Sequence[torch.Tensor], form: int = 0) -> tuple[torch.Tensor, ...]:
    """Products of rows with each of some weights, as by `torch.nn.functional.linear`, up to rounding; without gradients.

    Args:
        x: float32 `[rows, in]` on a CPU. Any number of rows is allowed; many take longer than by other routes.
        weights: float32 `[out, in]` on a CPU. One that is not contiguous is copied.
        form: Index of the form of tiles in `FORMS`.

    Returns:
        float32 `[rows, out]` for each weight.

    Raises:
        ValueError: A shape or type does not fit, or this processor has no such form.
        RuntimeError: The memory of a weight was given back.
    """
    if not 0 <= form < len(FORMS):
        raise ValueError(f"form must be at least 0 and less than {len(FORMS)} on this processor, got {form}")
    (rows, inputs), x = x.shape, x.contiguous()
    products: list[int] = []
    numbers, outs, kept = 0, [], []
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
        products += weight_address(weight), out.data_ptr(), outputs
        numbers += outputs * inputs
        outs.append(out)
    multiply(np.array([x.data_ptr(), rows, inputs, form, *products], np.int64), num_parts(numbers))
    return tuple(outs)


def num_parts(numbers: int) -> int:
    """Threads that weights of so many numbers are divided among."""
    return min(torch.get_num_threads(), 1 + numbers // _GRAIN)


def compile_products() -> None:
    """Compile the kernel."""
    number, out = (torch.ones(1, dtype=torch.float32, device="cpu") for _ in range(2))
    multiply(np.array([number.data_ptr(), 1, 1, 0, number.data_ptr(), out.data_ptr(), 1], np.int64), 1)


@cache
def kernel_version() -> str:
    """Changes with the kernel's code, so that stored timings of it can be told from those of another version."""
    return content_key(getattr(multiply, "py_func", multiply))


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


@cached_njit(nogil=True, parallel=True)
def _all_outputs(call, parts):
    for part in numba.prange(parts):
        _some_outputs(call, np.int64(part), parts)


@cached_njit(nogil=True)
def _some_outputs(call, part, parts):
    """A part of every weight's outputs."""
    x, rows, inputs, form = call[0], call[1], call[2], call[3]
    whole = inputs // _LANES[form] * _LANES[form]
    for at in range(4, len(call), 3):
        weight, out, outputs = call[at], call[at + 1], call[at + 2]
        begin, end = outputs * part // parts, outputs * (part + 1) // parts
        stream = (end - begin) // OUTPUTS
        last = begin + stream * OUTPUTS
        for output in range(begin, begin + stream):
            _some_rows(x, rows, inputs, form, whole, weight, out, outputs, output, stream)
        for output in range(last, end):  # the same output in all places of a tile
            _some_rows(x, rows, inputs, form, whole, weight, out, outputs, output, 0)
        if whole < inputs:
            numbers, weights = floats_at(x, (rows, inputs)), floats_at(weight, (outputs, inputs))
            _add_rest(numbers, weights, floats_at(out, (rows, outputs)), whole, begin, end)


@cached_njit(nogil=True)
def _some_rows(x, rows, inputs, form, whole, weight, out, outputs, output, stream):
    """One output of each stream for all rows, tile by tile. All tiles together prefetch the streams' next outputs once."""
    width, tiles = inputs * _BYTES, (rows + ROWS - 1) // ROWS
    begin, row = weight + output * width, 0
    for index in range(tiles):
        left = tiles - index
        height = (rows - row + left - 1) // left
        place = out + (row * outputs + output) * _BYTES
        ahead = begin + width + width * index // tiles
        call = begin, stream * width, x + row * width, width, place, stream * _BYTES, outputs * _BYTES
        tile(form, height, *call, whole * _BYTES, ahead, _LANES[form] * _BYTES // tiles)
        row += height


@cached_njit(nogil=True)
def multiply(call, parts):
    """Compute products by several threads, or one.

    `call` is int64: the rows' address, their number, their inputs, the form of tiles, then of each product the addresses of
    weights and results and the number of outputs.
    """
    if parts == 1:
        _some_outputs(call, 0, 1)
    else:
        _all_outputs(call, parts)


@cached_njit(nogil=True)
def _add_rest(x, weight, out, whole, begin, end):
    """Add the products of the last inputs, which are fewer than a vector."""
    for row in range(len(x)):
        for output in range(begin, end):
            total = out[row, output]
            for i in range(whole, x.shape[1]):
                total += x[row, i] * weight[output, i]
            out[row, output] = total
