"""Runs a policy's linear layers on a CPU by the fastest route for each (`linear_routes.py`), during a call.

A packed copy of a weight costs its bytes once more and the time of some forwards, and is valid only for the weight that
it was made from. Calls of a run resemble each other. So layers of a shape are packed at once if packing would have paid
in the call before that had the same purpose, and else when this call has lost the price without copies (the ski rental
rule: at most twice the least cost). A copy is used while the weight keeps its address and version counter, and is freed
at the end of the call, before training. Copies take only memory that is available to caches (`memory.py`).

Under autocast a layer computes in another type than its weights', and adds its bias before rounding. So every layer
keeps PyTorch's route there, and `autocast.py` saves the conversions.

Drafters' own weights are small, stay in the processor's caches, and are read by nothing else. Stored column by column,
they need neither repacking nor a transposed product (`by_columns`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from atlas_rl.policy.group_products import Copies, Group, by_one_route, timed
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.linear_routes import (
    BUCKETS,
    MIN_BYTES,
    PACKED,
    PLAIN,
    STREAMED,
    Contest,
    RouteTable,
    bucket_of,
    packed_type,
    packed_weight,
)
from atlas_rl.policy.memory import free_bytes
from atlas_rl.policy.parts import HasModules
from atlas_rl.policy.threads import replaced_forwards
from atlas_rl.policy.weight_copy import WeightCopy, can_be_copied

Products = Callable[[Group, torch.Tensor], tuple[torch.Tensor, ...]]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PILOTS = 3  # layers of a shape that are packed first, to time the packed route
_TRIES = 9  # times that pilots are packed for one contest: sessions of a single forward never time them


def by_columns(weight: torch.Tensor) -> torch.Tensor:
    """The same weight `[out, in]`, stored column by column on a CPU; unchanged elsewhere."""
    return weight.t().contiguous().t() if weight.device.type == "cpu" else weight


@dataclass(slots=True)
class _Once:
    """Seconds of work that is done once: packing, and timing routes that are not the fastest."""

    seconds: float = 0.0


@dataclass(slots=True)
class _Shape:
    """Groups of one shape and type: their contests by rows, their packed copies, and the cost of not having these.

    Attributes:
        before_s: Seconds that packed copies would have saved in the session before.
        gained_s: Seconds that they save in this one, or would save. `lost_s`: of these, what was lost without copies.
        price_s: Seconds that packing took in this session for forwards that recur.
        recurs: Whether a forward of this session recurred.
    """

    groups: list[Group]
    contests: dict[int, Contest]
    once: _Once
    before_s: float = 0.0
    copies: dict[Group, Copies] = field(default_factory=dict)
    gained_s: float = 0.0
    lost_s: float = 0.0
    price_s: float = 0.0
    recurs: bool = False
    times_copies: bool = False  # not in the forward that they are made for: they are in the processor's cache then
    products: Products = field(init=False)

    def __post_init__(self) -> None:
        self.products = _products_of(self)

    def prepare(self, contest: Contest, recurs: bool) -> None:
        """Pack the groups that a forward with this contest should have packed; for one that will not recur, none."""
        self.times_copies = True
        self.recurs = self.recurs or recurs
        if PACKED not in contest.seconds:
            return
        missing = [group for group in self.groups if group not in self.copies]
        if contest.winner is None or (contest.gain_s and contest.pack_s is None):
            pilots = [group for group in self.groups[:_PILOTS] if group in missing]
            if pilots and _fits(pilots) and contest.tries < _TRIES:
                contest.tries += 1
                self._pack(pilots)
            elif pilots and contest.winner is None:
                contest.leave_out_packed()
            return
        if not recurs or not contest.gain_s:
            return
        to_come_s = max(0.0, self.before_s - self.gained_s) * len(missing) / len(self.groups)
        self.gained_s += contest.gain_s * len(self.groups)
        self.lost_s += contest.gain_s * len(missing)
        if missing and max(self.lost_s, to_come_s) > (contest.pack_s or 0.0) * len(missing):
            self.before_s = self.lost_s = float("-inf")  # once per call: without memory for it, it is not retried
            if _fits(missing):
                self.price_s += self._pack(missing)

    def streamed_form(self, num_rows: int) -> int | None:
        """See `FastLinears.streamed`."""
        contest = self.contests[bucket_of(num_rows)]
        if contest.winner in (None, PACKED) or num_rows not in _rows_in_contests(_type(self)):
            return None
        timed = {contest.cost_s(route): form for route, form in STREAMED.items() if contest.seconds.get(route)}
        return timed[min(timed)] if timed else None

    def beside_s(self, forwards: Mapping[int, int]) -> float:
        """`FastLinears.beside_s` for this shape."""
        contests = {rows: self.contests[bucket_of(rows)] for rows in forwards}
        gains_s = sum(number * contests[rows].gain_s for rows, number in forwards.items()) * len(self.groups)
        each_s = max((contest.pack_s or 0.0 for contest in contests.values()), default=0.0)
        packed = len(self.copies) / len(self.groups)
        return min((self.price_s or each_s * len(self.groups)) - gains_s * (1 - packed), gains_s * packed)

    def _pack(self, groups: list[Group]) -> float:
        """Pack groups, and tell the contests of every number of rows what that takes; returns the seconds."""
        began_s = time.perf_counter()
        joined = _joined(groups)
        for group in groups:
            made = packed_weight(joined(group))
            self.copies[group] = tuple(WeightCopy.of(layer.weight, made) for layer in group)
        self.times_copies = False
        all_s = time.perf_counter() - began_s
        self.once.seconds += all_s
        for contest in self.contests.values():
            contest.price(all_s / len(groups))
        return all_s


class FastLinears:
    """Runs the linear layers of a model by their fastest routes.

    Args:
        model: Model; its `nn.Linear` layers of float32, bfloat16 or float16 on a CPU take part.
        table: Timings of routes; None for those of this machine.

    Attributes:
        purpose: What the next sessions are for, equal for those that resemble each other: with or without speculation.
        packing_s: Seconds spent on packing in the latest session.
        most_packed_bytes: Peak bytes of packed copies in the latest session.
    """

    def __init__(self, model: nn.Module, table: RouteTable | None = None) -> None:
        self.packing_s, self.most_packed_bytes = 0.0, 0
        self._given = table
        self._model = model
        self.purpose: Hashable = None
        self._gained_s: dict[Hashable, float] = {}  # `_Shape.gained_s` of the latest session, by purpose and shape
        self._shapes: list[_Shape] = []
        self._shape_of: dict[Group, _Shape] = {}
        self._contests: dict[Hashable, Contest] = {}
        self._once = _Once()

    @property
    def once_s(self) -> float:
        """Seconds that packing, and timing routes that are not the fastest, have taken in all sessions."""
        return self._once.seconds

    @contextmanager
    def installed(self, parts: HasModules | None = None) -> Iterator[None]:
        """Context in which this thread's layers take their routes; afterwards no route and no copy is left.

        A layer's result keeps its type, and its value up to rounding. `parts` are the model's modules, if already
        listed.
        """
        if not self._shapes:
            self.packing_s, self.most_packed_bytes = 0.0, 0
        outer, table = self._shapes, self._table
        known = {layer for shape in outer for group in shape.groups for layer in group}
        layers: list[Any] = [m for m in (parts or self._model).modules() if m not in known and _takes_part(m)]
        inner = self._by_shape([(layer,) for layer in layers])
        forwards: dict[nn.Module, Any] = {layer: _forward_of(shape) for shape in inner for (layer,) in shape.groups}
        try:
            self._take(outer + inner)
            with replaced_forwards(forwards):
                yield
        finally:
            for shape in self._shapes[len(outer) :]:
                if shape.recurs and shape.groups:
                    self._gained_s[self.purpose, _key(shape.groups[0])] = shape.gained_s
                shape.copies.clear()  # now: a shape and its products refer to each other, and wait for the garbage collector
            self._take(outer)
            if inner:
                table.save()

    @property
    def _table(self) -> RouteTable:
        return self._given or RouteTable.of_this_machine()

    def _take(self, shapes: list[_Shape]) -> None:
        self._shapes = shapes
        self._shape_of = {group: shape for shape in shapes for group in shape.groups}

    @property
    def has_routes(self) -> bool:
        """Whether any layer has routes in the present session; without, `products` are valid in others as well."""
        return bool(self._shape_of)

    def together(self, groups: list[Group]) -> None:
        """Multiply layers together that multiply the same rows, until the session ends.

        A group is left alone if one of its layers has routes of its own that differ, or none. A layer that is called by
        itself afterwards has no packed copy.
        """
        new = [group for group in groups if group not in self._shape_of and self._may_be_together(group)]
        members = {layer for group in new for layer in group}
        for shape in self._shapes:
            shape.groups = [group for group in shape.groups if not members.intersection(group)]
            shape.copies = {group: copy for group, copy in shape.copies.items() if not members.intersection(group)}
        self._take(self._shapes + self._by_shape(new))

    def _may_be_together(self, group: Group) -> bool:
        kinds = {(layer.weight.dtype, layer.weight.shape[1], layer.bias is None) for layer in group}
        return len(kinds) == 1 and all((layer,) in self._shape_of for layer in group)

    def products(self, group: Group) -> Products:
        """What multiplies the layers of a group with rows `[rows, in]` of their type, outside of autocast.

        It takes the group and the rows, and is valid in the present session. Results may be views of one tensor.
        """
        shape = self._shape_of.get(group)
        return self._one_by_one if shape is None else shape.products

    def streamed(self, group: Group) -> Callable[[int], int | None] | None:
        """What tells the fastest form of our kernel's tiles for a group and a number of rows, in the present session.

        It returns None while routes are timed, for rows and types that the kernel has no part in, and where a packed copy is
        faster. There is nothing to tell it if the group has no routes.
        """
        shape = self._shape_of.get(group)
        return None if shape is None else shape.streamed_form

    def contest(self, key: Hashable, num_rows: int, routes: Sequence[str]) -> Contest:
        """The contest of a layer's own routes for a number of rows; it lasts as long as this object, and is not stored."""
        name = key, bucket_of(num_rows), torch.get_num_threads()
        if name not in self._contests:
            self._contests[name] = Contest({route: [] for route in routes})
        return self._contests[name]

    def note(self, contest: Contest, route: str, seconds: float, num_rows: int) -> None:
        """Record a timing for a contest from `contest`; what a slower route took is work that is done once."""
        contest.note(route, seconds)
        self._once.seconds += max(0.0, seconds - contest.least_s(num_rows, may_pack=False))

    def _one_by_one(self, group: Group, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(group) == 1:
            return (functional.linear(rows, group[0].weight, group[0].bias),)
        return tuple(self.products((layer,))((layer,), rows)[0] for layer in group)

    def prepare(self, num_rows: int, recurs: bool = True) -> None:
        """Pack the layers for which it pays, before a forward over `num_rows` tokens, in the context that it will run in.

        `recurs` is whether more forwards like this one will follow in the session; those over prompts are few.
        """
        if torch.is_autocast_enabled("cpu"):  # layers keep PyTorch's route
            return
        began_s, num_copies = time.perf_counter(), sum(len(shape.copies) for shape in self._shapes)
        for shape in self._shapes:
            if shape.groups and num_rows in _rows_in_contests(_type(shape)):
                shape.prepare(shape.contests[bucket_of(num_rows)], recurs)
        if sum(len(shape.copies) for shape in self._shapes) != num_copies:
            self.packing_s += time.perf_counter() - began_s
            packed_bytes = sum(_packed_bytes(group) for shape in self._shapes for group in shape.copies)
            self.most_packed_bytes = max(self.most_packed_bytes, packed_bytes)

    def beside_s(self, forwards: Mapping[int, int]) -> float:
        """Seconds that packing adds to a session of other forwards, beside what they cost in the present one as it is now.

        That session packs layers, too, or does without copies that the present one has, or has copies that are missing
        here, whichever is least.

        Args:
            forwards: How many forwards it makes, by their number of tokens.
        """
        return sum(
            shape.beside_s({rows: n for rows, n in forwards.items() if rows in _rows_in_contests(_type(shape))})
            for shape in self._shapes
            if shape.groups
        )

    def _by_shape(self, groups: list[Group]) -> list[_Shape]:
        by_shape: dict[Hashable, list[Group]] = {}
        for group in groups:
            by_shape.setdefault(_key(group), []).append(group)
        return [
            _Shape(same, _contests(same[0], self._table), self._once, self._gained_s.get((self.purpose, key), 0.0))
            for key, same in by_shape.items()
        ]


def _key(group: Group) -> Hashable:
    """What groups of one `_Shape` share."""
    return tuple(layer.weight.shape for layer in group), group[0].weight.dtype, group[0].bias is None


def _type(shape: _Shape) -> torch.dtype:
    return shape.groups[0][0].weight.dtype


def _joined(groups: list[Group]) -> Callable[[Group], torch.Tensor]:
    """The weight of a group as one matrix, valid until the next is asked for.

    All are joined in one place: the kernel would clear the pages of a new one for every group, which takes longer than
    packing where pages are huge.
    """
    first = groups[0]
    if len(first) == 1:
        return lambda group: group[0].weight
    place = torch.cat([layer.weight.detach() for layer in first])
    return lambda group: torch.cat([layer.weight.detach() for layer in group], out=place)


def _contests(group: Group, table: RouteTable) -> dict[int, Contest]:
    weight, *others = (layer.weight for layer in group)
    has_bias = group[0].bias is not None
    return {rows: table.contest(weight, has_bias, rows, others=others) for rows in BUCKETS}


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


def _packed_bytes(group: Group) -> int:
    kind = packed_type(group[0].weight.dtype)
    return 0 if kind is None else sum(layer.weight.numel() for layer in group) * kind.itemsize


def _fits(groups: list[Group]) -> bool:
    return sum(map(_packed_bytes, groups)) <= free_bytes(torch.device("cpu"))


def _forward_of(shape: _Shape) -> Callable[[nn.Linear, torch.Tensor], torch.Tensor]:
    """The replacement forward for single layers of a shape."""
    ((first,), *_), products = shape.groups, shape.products
    dtype, inputs = first.weight.dtype, first.in_features

    def forward(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:  # some policies pass it by name
        if not input.numel() or input.dtype != dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return functional.linear(input, layer.weight, layer.bias)
        (out,) = products((layer,), input.reshape(-1, inputs))
        return out.view(*input.shape[:-1], -1)

    return forward


def _products_of(shape: _Shape) -> Products:
    """Multiplies rows `[rows, in]` of a group's own type, outside of autocast, by the fastest route."""
    contests = shape.contests
    rows_in_contests = _rows_in_contests(_type(shape))

    def products(group: Group, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        number, copies = rows.shape[0], shape.copies
        if number not in rows_in_contests:
            return by_one_route(PLAIN, rows, group, None)
        contest, copy = contests[bucket_of(number)], copies.get(group)
        if copy is not None and not all(of.is_of(layer.weight) for of, layer in zip(copy, group, strict=True)):
            del copies[group]
            copy = None
        if contest.winner is None:
            began_s = time.perf_counter()
            out = timed(contest, rows, group, copy if shape.times_copies else None, len(shape.groups) == 1)
            taken_s = time.perf_counter() - began_s
            shape.once.seconds += max(0.0, taken_s - contest.least_s(number, may_pack=copy is not None))
            return out
        return by_one_route(contest.winner if copy is not None else contest.runner_up, rows, group, copy)

    return products


def _rows_in_contests(dtype: torch.dtype) -> range:
    """Row counts with contests for a type; with many float32 rows BLAS is fastest anyway."""
    return range(1, BUCKETS[-1] + 1 if dtype == torch.float32 else sys.maxsize)
