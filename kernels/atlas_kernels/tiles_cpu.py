"""A tile of a matrix product on a CPU: the products of some rows of a weight with some rows of numbers, summed in registers.

Memory and arithmetic units work at the same time only if weights are requested long before they are multiplied. While a tile
is computed, each of its steps therefore prefetches a little of the weights that follow. A loop that numba vectorises cannot
do this, because a prefetch keeps it from being vectorised. So a tile is written in LLVM's vector instructions.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from atlas_kernels.addresses import floats_at

_FLOAT, _INT, _SHORT = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_ITEM_BYTES = 4


class Form(NamedTuple):
    """How a tile is written: numbers that are multiplied at once, and the cache that the weights are fetched into."""

    lanes: int
    cache: int


def _sizes() -> tuple[tuple[Form, ...], int, int]:
    """Forms of a tile for this processor, and outputs and rows of the largest tile whose sums stay in its registers."""
    if platform.machine() in ("aarch64", "arm64"):
        return (Form(4, cache=2),), 4, 6
    features = config.CPU_FEATURES  # none for processors that share compiled kernels
    if features is None:
        features = ",".join(f"+{name}" for name, has in llvmlite.binding.get_host_cpu_features().items() if has)
    has_32_registers = "+avx512vl" in features.split(",")
    narrow = Form(8, cache=2)
    return ((narrow, Form(16, cache=1)), 4, 6) if has_32_registers else ((narrow,), 3, 4)


FORMS, OUTPUTS, ROWS = _sizes()
"""Forms of tiles, to be timed against each other; outputs of every tile; most rows of a tile.

Processors differ in what suits them: on an AMD EPYC, vectors of 16 numbers took up to 20% longer, and fetching into the
first cache was slower. On an Intel Xeon both gain (`docs/kernels.md`).
"""


if config.DISABLE_JIT:

    def tile(form, rows, weight, weight_step, x, x_step, out, out_step, out_row_step, size, ahead, ahead_step):
        """The same in numpy, without prefetches; see below."""
        count = size // _ITEM_BYTES
        for output in range(OUTPUTS):
            factors = floats_at(weight + output * weight_step, (count,))
            for row in range(rows):
                numbers = floats_at(x + row * x_step, (count,))
                floats_at(out + output * out_step + row * out_row_step, (1,))[0] = np.dot(factors, numbers)

else:

    @intrinsic
    def tile(
        typing_context,
        form,
        rows,
        weight,
        weight_step,
        x,
        x_step,
        out,
        out_step,
        out_row_step,
        size,
        ahead,
        ahead_step,
    ):
        """Compute one tile, for use in numba's functions.

        Arguments are int64; addresses and distances are in bytes:

        - `form`, `rows`: index in `FORMS`, and number of rows, 1 to `ROWS`; others are not checked;
        - `weight`, `weight_step`: the first output's weights, float32, and the distance of the next output's;
        - `x`, `x_step`: the first row of numbers, float32, and the distance of the next row;
        - `out`, `out_step`, `out_row_step`: place of the sum of the first output and row, float32, and the distances of the
          next output's and of the next row's;
        - `size`: bytes of the inputs to sum over, a multiple of the form's lanes; sums over none are 0;
        - `ahead`, `ahead_step`: what is prefetched: the first output's following weights, and by how much that moves on
          with every vector. Outputs are `weight_step` apart here too.
        """

        def generate(context, builder, signature, arguments):
            chosen, height, *others = arguments
            wrong, end = builder.append_basic_block(), builder.append_basic_block()
            choice = builder.switch(builder.add(builder.mul(chosen, _INT(ROWS)), height), wrong)
            for index, each in enumerate(FORMS):
                for count in range(1, ROWS + 1):
                    block = builder.append_basic_block()
                    choice.add_case(_INT(index * ROWS + count), block)
                    builder.position_at_end(block)
                    _Tile(builder, count, each).write(*others)
                    builder.branch(end)
            builder.position_at_end(wrong)
            builder.unreachable()
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), generate


class _Tile:
    """Writes the instructions of one tile.

    Addresses in the loop are one moving address plus multiples of a distance. A register for every row and output would be
    more than a processor has, and each that it lacks is another load.
    """

    def __init__(self, builder: ir.IRBuilder, rows: int, form: Form) -> None:
        self._builder, self._rows = builder, rows
        self._lanes, self._locality = form.lanes, 4 - form.cache  # LLVM's locality of a prefetch: 3 is the first cache
        self._vector = ir.VectorType(_FLOAT, form.lanes)
        self._places = [(output, row) for row in range(rows) for output in range(OUTPUTS)]

    def write(self, weight, weight_step, x, x_step, out, out_step, out_row_step, size, ahead, ahead_step):
        """Write it, given the arguments of `tile` after the first two."""
        builder = self._builder
        outputs, rows = self._multiples(weight_step, OUTPUTS), self._multiples(x_step, self._rows)
        begin, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
        zeros, vector = ir.Constant(self._vector, [0.0] * self._lanes), _INT(self._lanes * _ITEM_BYTES)
        stop = builder.add(weight, size)
        builder.cbranch(builder.icmp_signed(">", size, _INT(0)), loop, end)

        builder.position_at_end(loop)
        weights, numbers, far = builder.phi(_INT), builder.phi(_INT), builder.phi(_INT)
        sums = {place: builder.phi(self._vector) for place in self._places}
        for distance in outputs:
            self._prefetch(builder.add(far, distance))
        factors = [self._load(builder.add(weights, distance)) for distance in outputs]
        added = {}
        for row, distance in enumerate(rows):
            number = self._load(builder.add(numbers, distance))
            for output, factor in enumerate(factors):
                product = builder.fmul(factor, number, flags=("contract",))
                added[output, row] = builder.fadd(product, sums[output, row], flags=("contract",))
        following = builder.add(weights, vector)
        for value, first, later in (
            (weights, weight, following),
            (numbers, x, builder.add(numbers, vector)),
            (far, ahead, builder.add(far, ahead_step)),
            *((sums[place], zeros, added[place]) for place in self._places),
        ):
            value.add_incoming(first, begin)
            value.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, stop), loop, end)

        builder.position_at_end(end)
        totals = {place: builder.phi(self._vector) for place in self._places}
        for place, total in totals.items():
            total.add_incoming(zeros, begin)
            total.add_incoming(added[place], loop)
        for row, row_step in enumerate(self._multiples(out_row_step, self._rows)):
            four = self._sums_of_four([totals[min(output, OUTPUTS - 1), row] for output in range(4)])
            for output, step in enumerate(self._multiples(out_step, OUTPUTS)):
                place = builder.add(builder.add(out, row_step), step)
                builder.store(
                    builder.extract_element(four, _SHORT(output)), builder.inttoptr(place, _FLOAT.as_pointer())
                )

    def _multiples(self, distance: ir.Value, count: int) -> list[ir.Value]:
        return [self._builder.mul(distance, _INT(index)) for index in range(count)]

    def _sums_of_four(self, vectors: list[ir.Value]) -> ir.Value:
        """Sums of each of four vectors, in one: in a third of the instructions that four sums take one by one.

        Neighbours are added in pairs, twice, within every four numbers; then all fours are added.
        """
        first, second, third, fourth = vectors
        pairs = self._added(first, second, (0, 1), (2, 3)), self._added(third, fourth, (0, 1), (2, 3))
        fours, lanes = self._added(*pairs, (0, 2), (1, 3)), self._lanes
        while lanes > 4:
            lanes //= 2
            halves = [self._picked(fours, fours, range(begin, begin + lanes)) for begin in (0, lanes)]
            fours = self._builder.fadd(*halves)
        return fours

    def _added(self, left: ir.Value, right: ir.Value, *picks: tuple[int, int]) -> ir.Value:
        """The sum of two vectors, each of which has some numbers of every four of `left`, then the same of `right`."""
        fours = range(0, self._lanes, 4)
        vectors = [
            self._picked(left, right, [side + four + at for four in fours for side in (0, self._lanes) for at in pick])
            for pick in picks
        ]
        return self._builder.fadd(*vectors)

    def _picked(self, left: ir.Value, right: ir.Value, places: Iterable[int]) -> ir.Value:
        chosen = list(places)
        return self._builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_SHORT, len(chosen)), chosen))

    def _load(self, address: ir.Value) -> ir.Value:
        pointer = self._builder.inttoptr(address, self._vector.as_pointer())
        return self._builder.load(pointer, align=_ITEM_BYTES)

    def _prefetch(self, address: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _SHORT, _SHORT, _SHORT])
        call = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0")
        pointer = self._builder.inttoptr(address, cgutils.voidptr_t)
        self._builder.call(call, [pointer, _SHORT(0), _SHORT(self._locality), _SHORT(1)])  # to read; data
