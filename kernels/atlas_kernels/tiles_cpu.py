"""A tile of a matrix product on a CPU: the products of some rows of a weight with some rows of numbers, summed in registers.

Memory and arithmetic units work at the same time only if weights are requested long before they are multiplied. While a tile
is computed, each of its steps therefore prefetches a little of the weights that follow, into the second cache: the first one
is full of what is multiplied now. A loop that numba vectorises cannot do this, because a prefetch keeps it from being
vectorised. So a tile is written in LLVM's vector instructions.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from atlas_kernels.addresses import floats_at

_FLOAT, _INT, _SHORT = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_ITEM_BYTES = 4
_SECOND_CACHE = 2  # LLVM's locality of a prefetch: 3 is the first cache, 0 none


def _sizes() -> tuple[int, int, int]:
    """Numbers in a vector, and outputs and rows of the largest tile whose sums stay in this processor's registers."""
    if platform.machine() in ("aarch64", "arm64"):
        return 4, 4, 6
    features = config.CPU_FEATURES  # none for processors that share compiled kernels
    if features is None:
        features = ",".join(f"+{name}" for name, has in llvmlite.binding.get_host_cpu_features().items() if has)
    has_32_registers = "+avx512vl" in features.split(",")
    return (8, 4, 6) if has_32_registers else (8, 3, 4)


LANES, OUTPUTS, ROWS = _sizes()
"""Numbers that are multiplied at once; outputs of every tile; most rows of a tile."""


def tile_of(rows: int) -> Any:
    """A compiled function for tiles of `OUTPUTS` outputs and this many rows, for use in numba's functions.

    Its arguments are int64; addresses and distances are in bytes:

    - `weight`, `weight_step`: the first output's weights, float32, and the distance of the next output's;
    - `x`, `x_step`: the first row of numbers, float32, and the distance of the next row;
    - `out`, `out_step`, `out_row_step`: place of the sum of the first output and row, float32, and the distances of the next
      output's and of the next row's;
    - `size`: bytes of the inputs to sum over, a multiple of `LANES` numbers; sums over none are 0;
    - `ahead`, `ahead_step`: what is prefetched: the first output's following weights, and by how much that moves on with
      every vector. Outputs are `weight_step` apart here too.
    """
    if config.DISABLE_JIT:
        return _uncompiled(rows)

    @intrinsic
    def tile(typing_context, weight, weight_step, x, x_step, out, out_step, out_row_step, size, ahead, ahead_step):
        def generate(context, builder, signature, arguments):
            _Tile(builder, rows).write(*arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


def _uncompiled(rows: int) -> Any:
    """The same in numpy, without prefetches."""

    def tile(weight, weight_step, x, x_step, out, out_step, out_row_step, size, ahead, ahead_step):
        count = size // _ITEM_BYTES
        for output in range(OUTPUTS):
            factors = floats_at(weight + output * weight_step, (count,))
            for row in range(rows):
                numbers = floats_at(x + row * x_step, (count,))
                floats_at(out + output * out_step + row * out_row_step, (1,))[0] = np.dot(factors, numbers)

    return tile


class _Tile:
    """Writes the instructions of one tile."""

    def __init__(self, builder: ir.IRBuilder, rows: int) -> None:
        self._builder, self._rows = builder, rows
        self._vector = ir.VectorType(_FLOAT, LANES)
        self._places = [(output, row) for row in range(rows) for output in range(OUTPUTS)]

    def write(self, weight, weight_step, x, x_step, out, out_step, out_row_step, size, ahead, ahead_step):
        """Write it, given the arguments of `tile_of`."""
        builder = self._builder
        weights, numbers = self._steps(weight, weight_step, OUTPUTS), self._steps(x, x_step, self._rows)
        begin, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
        none, zeros = _INT(0), ir.Constant(self._vector, [0.0] * LANES)
        builder.cbranch(builder.icmp_signed(">", size, none), loop, end)

        builder.position_at_end(loop)
        at, far = builder.phi(_INT), builder.phi(_INT)
        sums = {place: builder.phi(self._vector) for place in self._places}
        for line in self._steps(far, weight_step, OUTPUTS):
            self._prefetch(line)
        factors = [self._load(address, at) for address in weights]
        added = {}
        for row, address in enumerate(numbers):
            number = self._load(address, at)
            for output, factor in enumerate(factors):
                product = builder.fmul(factor, number, flags=("contract",))
                added[output, row] = builder.fadd(product, sums[output, row], flags=("contract",))
        following = builder.add(at, _INT(LANES * _ITEM_BYTES))
        for value, first, later in (
            (at, none, following),
            (far, ahead, builder.add(far, ahead_step)),
            *((sums[place], zeros, added[place]) for place in self._places),
        ):
            value.add_incoming(first, begin)
            value.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, end)

        builder.position_at_end(end)
        totals = {place: builder.phi(self._vector) for place in self._places}
        outs = self._steps(out, out_step, OUTPUTS)
        for (output, row), total in totals.items():
            total.add_incoming(zeros, begin)
            total.add_incoming(added[output, row], loop)
        for (output, row), total in totals.items():
            place = builder.add(outs[output], builder.mul(out_row_step, _INT(row)))
            builder.store(self._sum(total), builder.inttoptr(place, _FLOAT.as_pointer()))

    def _steps(self, first: ir.Value, step: ir.Value, count: int) -> list[ir.Value]:
        return [self._builder.add(first, self._builder.mul(step, _INT(index))) for index in range(count)]

    def _load(self, address: ir.Value, at: ir.Value) -> ir.Value:
        pointer = self._builder.inttoptr(self._builder.add(address, at), self._vector.as_pointer())
        return self._builder.load(pointer, align=_ITEM_BYTES)

    def _prefetch(self, address: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _SHORT, _SHORT, _SHORT])
        call = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0")
        pointer = self._builder.inttoptr(address, cgutils.voidptr_t)
        self._builder.call(call, [pointer, _SHORT(0), _SHORT(_SECOND_CACHE), _SHORT(1)])  # to read; data

    def _sum(self, vector: ir.Value) -> ir.Value:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, self._vector])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        call = cgutils.get_or_insert_function(self._builder.module, kind, name)
        return self._builder.call(call, [_FLOAT(0.0), vector], fastmath=("reassoc",))
