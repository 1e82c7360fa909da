"""`silu(gate) * up` of a gated layer in float32 on a CPU, compiled: one pass, in the threads that computed both.

A thread of `few_rows_cpu` writes some columns of a product, and these stay in its core's cache. torch computes so small a
gate in one thread, which waits for the lines of all others. Here every thread takes the columns that it wrote.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

from atlas_kernels.addresses import floats_at
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.openmp import share_threads

share_threads()  # before a parallel kernel is compiled

_GRAIN = 1 << 13  # numbers that are worth another thread
_LEAST_POWER, _MOST_POWER = np.float32(-152), np.float32(146)  # of two, of the exponentials of -104 and 100


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Multiply `up` into `silu(gate)` (Shazeer, arXiv 2002.05202), up to rounding; without gradients.

    Nothing is checked.

    Args:
        gate: Contiguous float32 `[rows, columns]` on a CPU, which nobody else reads; overwritten.
        up: Like `gate`.

    Returns:
        `gate`.
    """
    multiply_gates(gate.data_ptr(), up.data_ptr(), *gate.shape, num_parts(gate.numel()))
    return gate


def num_parts(numbers: int) -> int:
    """Threads that gates of so many numbers are divided among."""
    return min(torch.get_num_threads(), 1 + numbers // _GRAIN)


def compile_gate() -> None:
    """Compile the kernel."""
    gate, up = torch.ones(2, 1, 2, dtype=torch.float32, device="cpu")
    multiply_gates(gate.data_ptr(), up.data_ptr(), 1, 2, 1)


@cached_njit(nogil=True, parallel=True)
def _all_columns(gate_at, up_at, rows, columns, parts):
    for part in numba.prange(parts):
        _some_columns(gate_at, up_at, rows, columns, np.int64(part), parts)


@cached_njit(nogil=True)
def multiply_gates(gate_at, up_at, rows, columns, parts):
    """`silu_times` of arrays at addresses, by several threads or one."""
    if parts == 1:
        _some_columns(gate_at, up_at, rows, columns, 0, 1)
    else:
        _all_columns(gate_at, up_at, rows, columns, parts)


@cached_njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _some_columns(gate_at, up_at, rows, columns, part, parts):
    gates, ups = floats_at(gate_at, (rows, columns)), floats_at(up_at, (rows, columns))
    begin, end = columns * part // parts, columns * (part + 1) // parts
    for row in range(rows):
        gate, up = gates[row, begin:end], ups[row, begin:end]
        for column in range(end - begin):
            x = gate[column]
            gate[column] = x / (np.float32(1) + _exp(-x)) * up[column]


if config.DISABLE_JIT:

    def _float_of(bits):
        return np.int32(bits).view(np.float32)

else:

    @intrinsic
    def _float_of(typing_context, bits):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.int32), generate


@numba.njit(inline="always")
def _exp(x):
    """Exponential as torch computes it for whole vectors, to the bit where a processor multiplies and adds in one operation.

    That is SLEEF's `expf` (Shibata and Petrogalli, arXiv 2001.09258): the nearest power of two times a polynomial.
    The system's function is called number by number, which takes ten times as long.
    """
    power = np.rint(x * np.float32(1.442695040888963407359924681001892137))
    rest = x - power * np.float32(0.693145751953125)
    rest = rest - power * np.float32(1.428606765330187045e-06)
    total = np.float32(0.000198527617612853646278381)
    total = total * rest + np.float32(0.00139304355252534151077271)
    total = total * rest + np.float32(0.00833336077630519866943359)
    total = total * rest + np.float32(0.0416664853692054748535156)
    total = total * rest + np.float32(0.166666671633720397949219)
    total = total * rest + np.float32(0.5)
    total = np.float32(1) + ((rest * rest) * total + rest)
    whole = np.int32(min(max(power, _LEAST_POWER), _MOST_POWER))
    half = whole >> np.int32(1)  # powers of two that are numbers, where their product may be none
    total = total * _power_of_two(half) * _power_of_two(whole - half)
    return np.float32(0) if x < np.float32(-104) else (np.float32(np.inf) if x > np.float32(100) else total)


@numba.njit(inline="always")
def _power_of_two(exponent):
    return _float_of((exponent + np.int32(127)) << np.int32(23))
