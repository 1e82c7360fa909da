"""Runs a policy's linear layers on a CPU by the fastest route for each (`linear_routes.py`), during a call.

A packed copy of a weight costs its bytes once more and the time of some forwards, and is valid only for the weight that
it was made from. Layers of a shape are packed once a call has lasted so long that packing would have paid a good part
of its cost. A copy is used while the weight keeps its address and version counter, and is freed at the end of the call,
before training. Copies take only memory that is available to caches (`memory.py`).

Under autocast a layer computes in another type than its weights', and adds its bias before rounding. So every layer
keeps PyTorch's route there, and `autocast.py` saves the conversions.

Drafters' own weights are small, stay in the processor's caches, and are read by nothing else. Stored column by column,
they need neither repacking nor a transposed product (`by_columns`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from atlas_rl.policy.guise import class_of
from atlas_rl.policy.linear_routes import (
    BUCKETS,
    MIN_BYTES,
    PACKED,
    ROUTES,
    Contest,
    RouteTable,
    bucket_of,
    packed,
    packed_type,
    packed_weight,
    timing,
)
from atlas_rl.policy.memory import free_bytes
from atlas_rl.policy.parts import HasModules
from atlas_rl.policy.threads import replaced_forwards
from atlas_rl.policy.weight_copy import WeightCopy, can_be_copied

Product = Callable[[nn.Linear, torch.Tensor], torch.Tensor]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PILOTS = 3  # layers of a shape that are packed first, to time the packed route
_WORTH = 0.25  # share of the packing cost lost without it before a shape is packed: long calls tend to go on


def by_columns(weight: torch.Tensor) -> torch.Tensor:
    """The same weight `[out, in]`, stored column by column on a CPU; unchanged elsewhere."""
    return weight.t().contiguous().t() if weight.device.type == "cpu" else weight


@dataclass(slots=True)
class _Shape:
    """Layers of one shape and type: their contests by rows, their packed copies, and the cost of not having these."""

    layers: list[nn.Linear]
    contests: dict[int, Contest]
    copies: dict[nn.Linear, WeightCopy] = field(default_factory=dict)
    lost_s: float = 0.0
    product: Product = field(init=False)

    def __post_init__(self) -> None:
        self.product = _product_of(self)

    def prepare(self, contest: Contest) -> None:
        """Pack the layers that a forward with this contest should have packed."""
        if PACKED not in contest.seconds:
            return
        missing = [layer for layer in self.layers if layer not in self.copies]
        if contest.winner is None or (contest.gain_s and contest.pack_s is None):
            pilots = [layer for layer in self.layers[:_PILOTS] if layer in missing]
            if pilots and _fits(pilots):
                self._pack(pilots)
            elif pilots and contest.winner is None:
                contest.leave_out_packed()
            return
        self.lost_s += contest.gain_s * len(missing)
        if missing and contest.gain_s and self.lost_s > _WORTH * (contest.pack_s or 0.0) * len(missing):
            self.lost_s = float("-inf")  # once per call: without memory for it, packing is not retried in every step
            if _fits(missing):
                self._pack(missing)

    def _pack(self, layers: list[nn.Linear]) -> None:
        """Pack layers, and tell the contests of every number of rows what that takes."""
        began_s = time.perf_counter()
        for layer in layers:
            self.copies[layer] = WeightCopy.of(layer.weight, packed_weight(layer.weight))
        pack_s = (time.perf_counter() - began_s) / len(layers)
        for contest in self.contests.values():
            contest.pack_s = pack_s if contest.pack_s is None else min(contest.pack_s, pack_s)


class FastLinears:
    """Runs the linear layers of a model by their fastest routes.

    Args:
        model: Model; its `nn.Linear` layers of float32, bfloat16 or float16 on a CPU take part.
        table: Timings of routes; None for those of this machine.

    Attributes:
        packing_s: Seconds spent on packing in the latest session.
        most_packed_bytes: Peak bytes of packed copies in the latest session.
    """

    def __init__(self, model: nn.Module, table: RouteTable | None = None) -> None:
        self.packing_s, self.most_packed_bytes = 0.0, 0
        self._given = table
        self._model = model
        self._shapes: list[_Shape] = []
        self._products: dict[nn.Linear, Product] = {}

    @contextmanager
    def installed(self, parts: HasModules | None = None) -> Iterator[None]:
        """Context in which this thread's layers take their routes; afterwards no route and no copy is left.

        A layer's result keeps its type, and its value up to rounding. `parts` are the model's modules, if already
        listed.
        """
        if not self._shapes:
            self.packing_s, self.most_packed_bytes = 0.0, 0
        outer, table = self._shapes, self._given or RouteTable.of_this_machine()
        known = {layer for shape in outer for layer in shape.layers}
        inner = _by_shape([m for m in (parts or self._model).modules() if m not in known and _takes_part(m)], table)
        forwards: dict[nn.Module, Any] = {layer: _forward_of(shape) for shape in inner for layer in shape.layers}
        try:
            self._take(outer + inner)
            with replaced_forwards(forwards):
                yield
        finally:
            self._take(outer)
            if inner:
                table.save()

    def _take(self, shapes: list[_Shape]) -> None:
        self._shapes = shapes
        self._products = {layer: shape.product for shape in shapes for layer in shape.layers}

    def product(self, layer: nn.Linear) -> Product:
        """What multiplies a layer with rows `[rows, in]` of its type, outside of autocast, in the present session."""
        return self._products.get(layer, _plain)

    def prepare(self, num_rows: int) -> None:
        """Pack the layers for which it pays, before a forward over `num_rows` tokens, in the context that it will run in."""
        if torch.is_autocast_enabled("cpu"):  # layers keep PyTorch's route
            return
        began_s, num_copies = time.perf_counter(), sum(len(shape.copies) for shape in self._shapes)
        for shape in self._shapes:
            if num_rows in _rows_in_contests(shape.layers[0].weight.dtype):
                shape.prepare(shape.contests[bucket_of(num_rows)])
        if sum(len(shape.copies) for shape in self._shapes) != num_copies:
            self.packing_s += time.perf_counter() - began_s
            packed_bytes = sum(_packed_bytes(layer) for shape in self._shapes for layer in shape.copies)
            self.most_packed_bytes = max(self.most_packed_bytes, packed_bytes)


def _by_shape(layers: list[Any], table: RouteTable) -> list[_Shape]:
    groups: dict[object, list[nn.Linear]] = {}
    for layer in layers:
        groups.setdefault((layer.weight.shape, layer.weight.dtype, layer.bias is None), []).append(layer)
    return [
        _Shape(same, {rows: table.contest(same[0].weight, same[0].bias is not None, rows) for rows in BUCKETS})
        for same in groups.values()
    ]


def _takes_part(module: Any) -> bool:
    if class_of(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        weight.dtype in _TYPES
        and weight.device.type == "cpu"
        and weight.numel() * weight.element_size() >= MIN_BYTES
        and can_be_copied(weight, module.in_features * module.out_features)
    )


def _packed_bytes(layer: nn.Linear) -> int:
    kind = packed_type(layer.weight.dtype)
    return 0 if kind is None else layer.weight.numel() * kind.itemsize


def _fits(layers: list[nn.Linear]) -> bool:
    return sum(map(_packed_bytes, layers)) <= free_bytes(torch.device("cpu"))


def _forward_of(shape: _Shape) -> Callable[[nn.Linear, torch.Tensor], torch.Tensor]:
    """The replacement forward for layers of a shape."""
    dtype, inputs, product = shape.layers[0].weight.dtype, shape.layers[0].in_features, shape.product

    def forward(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:  # some policies pass it by name
        if not input.numel() or input.dtype != dtype or torch.is_autocast_enabled("cpu"):
            return functional.linear(input, layer.weight, layer.bias)
        return product(layer, input.reshape(-1, inputs)).view(*input.shape[:-1], -1)

    return forward


def _product_of(shape: _Shape) -> Product:
    """Multiplies rows `[rows, in]` of the layers' own type, outside of autocast, by the fastest route."""
    contests, copies = shape.contests, shape.copies
    rows_in_contests = _rows_in_contests(shape.layers[0].weight.dtype)

    def product(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
        number = rows.shape[0]
        if number not in rows_in_contests:
            return functional.linear(rows, layer.weight, layer.bias)
        contest, copy = contests[bucket_of(number)], copies.get(layer)
        if copy is not None and not copy.is_of(layer.weight):
            del copies[layer]
            copy = None
        if contest.winner is None:
            return _timed(contest, rows, layer, copy, copies)
        return _by(contest.winner if copy is not None else contest.runner_up, rows, layer, copy)

    return product


def _rows_in_contests(dtype: torch.dtype) -> range:
    """Row counts with contests for a type; with many float32 rows BLAS is fastest anyway."""
    return range(1, BUCKETS[-1] + 1 if dtype == torch.float32 else sys.maxsize)


def _plain(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return functional.linear(rows, layer.weight, layer.bias)


def _timed(
    contest: Contest, x: torch.Tensor, layer: nn.Linear, copy: WeightCopy | None, copies: dict[nn.Linear, WeightCopy]
) -> torch.Tensor:
    route = contest.next(may_pack=copy is not None)
    if route == PACKED:
        # oneDNN compiles a product when it first sees a number of rows, which takes up to ten times as long as the product.
        # It does so here for another layer's weight: after that, this one's is still read from memory.
        another = next((other for of, other in copies.items() if of is not layer), copy)
        _by(PACKED, x, layer, another)
    with timing(contest, route, len(x)):
        return _by(route, x, layer, copy)


def _by(route: str, x: torch.Tensor, layer: nn.Linear, copy: WeightCopy | None) -> torch.Tensor:
    if route == PACKED:
        assert copy is not None, "layers without a copy have another route"
        return packed(x, copy.made, layer.bias)
    return ROUTES[route](x, layer.weight, layer.bias)
