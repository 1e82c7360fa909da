"""Speeds up autocast: weights that it would convert in every forward are converted once per call.

TRL trains float32 weights under bf16 autocast. A decode step needs each weight in bf16, and torch converts it in every
forward: its cache of converted weights is cleared at the end of an autocast region, trainers open one region per
forward, and frozen weights (those under LoRA) are never cached. So a step that could read 2 bytes per weight reads 4,
writes 2 and reads those 2. Likewise, rotary embeddings return float32 keys, and attention would convert the whole key
cache in every layer of every step.

Here the attention cache holds the type that attention computes in (`as_attended`), and during a call linear layers have
copies of their weights of half the size (`HalfWeights`). Both are what autocast would have made, so results are
bit-equal. MoE experts, whose weights are one tensor, and their routers have copies as well (`half_twins.py`). A draft LM
has a session for every draft of a call: sessions over one cache share their copies, unless a session finds a weight with
another address or version.

A processor without units for the type multiplies one number at a time: 64 rows took six times as long as in float32. On
a CPU, large products therefore take the fastest route (`linear_routes.py`), with equal results up to the order of
summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from atlas_rl.policy.guise import class_of
from atlas_rl.policy.half_twins import HalfTwins
from atlas_rl.policy.linear_routes import BUCKETS, MIN_BYTES, Contest, RouteTable, bucket_of, by_route
from atlas_rl.policy.parts import HasModules, kept
from atlas_rl.policy.threads import replaced_forwards
from atlas_rl.policy.weight_copy import WeightCopy, can_be_copied

_SHARE = 0.5  # of the memory available to caches; the rest is left to them


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Type that autocast computes in on a device, in this thread, now; None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def as_attended(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in the type that autocast gives attention."""
    dtype = autocast_type(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


class _Half:
    """A layer's weight and bias in a lower type; on a CPU also the routes to multiply by them."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self._weight, self._bias = (
            None if own is None else WeightCopy.of(own, own.detach().to(dtype)) for own in (layer.weight, layer.bias)
        )
        self.weight: Any = None if self._weight is None else self._weight.made
        self.bias: Any = None if self._bias is None else self._bias.made
        self.contests: dict[int, Contest] = {}  # by rows; empty if PyTorch's route is used

    def is_of(self, layer: Any) -> bool:
        pairs = ((self._weight, layer.weight), (self._bias, layer.bias))
        return all(copy is None or copy.is_of(own) for copy, own in pairs)


class _Lowered:
    """The latest input in a lower type, so that successive projections of one input convert it once.

    Args:
        dtype: The type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._of: WeightCopy | None = None
        self._input: torch.Tensor | None = None  # kept alive, so that its address is not reused

    def forget(self) -> None:
        """Let go of the latest input."""
        self._of = self._input = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.dtype or x.is_inference():  # without a version counter
            return x
        if self._of is None or x is not self._input or not self._of.is_of(x):
            self._input, self._of = x, WeightCopy.of(x, x.to(self.dtype))
        return self._of.made


class _Reserved:
    """Bytes that copies take: an object of its own, so that they can count them without referring to themselves.

    Attributes:
        num_bytes: The bytes.
    """

    def __init__(self) -> None:
        self.num_bytes = 0


class _Copies:
    """Copies of a model's layers in one type, and the forwards that multiply by them.

    Attributes:
        fit: Whether there was memory for them.
        layers: Layers that have a copy.
    """

    def __init__(
        self, modules: HasModules, dtype: torch.dtype, reserve: Callable[[_Reserved, int], bool], table: RouteTable
    ) -> None:
        self._reserved, self._dtype = _Reserved(), dtype
        self.layers = [m for m in modules.modules() if _takes_part(m)]
        self._twins = HalfTwins(modules, dtype, partial(reserve, self._reserved))
        self._lowered, self._halves = _Lowered(dtype), dict[Any, _Half]()
        self._owns: list[Any] = []
        self._forwards: dict[Any, Any] = {}
        self.fit = reserve(self._reserved, sum(2 * _size_of(layer) for layer in self.layers))
        if self.fit:
            self._halves |= {layer: _Half(layer, dtype) for layer in self.layers}
            _choose_routes(self._halves.values(), table)

    def are_of(self, dtype: torch.dtype) -> bool:
        """Whether they have this type, and no weight has changed since they were made."""
        return (
            self.fit
            and dtype == self._dtype
            and len(self._halves) == len(self.layers)
            and all(half.is_of(layer) for layer, half in self._halves.items())
            and self._twins.are_current()
        )

    def forwards(self) -> dict[Any, Any]:
        """Replacements for `threads.replaced_forwards`: the same as before if what they replace is the same."""
        owns = [layer.forward for layer in (*self.layers, *self._twins.layers)]
        if owns != self._owns:
            self._owns = owns
            halves = {
                layer: _forward_of(own, self._lowered, self._halves)
                for layer, own in zip(self.layers, owns, strict=False)
            }
            self._forwards = halves | self._twins.forwards()
        return self._forwards

    def rest(self) -> None:
        """Let go of activations, until the next session."""
        self._lowered.forget()

    def drop(self) -> None:
        """Free the copies, whoever still holds the forwards: these are the layers' own from now on."""
        self._halves.clear()
        self._twins.drop()
        self._reserved.num_bytes = 0


class _Kept:
    """What a list of modules keeps between sessions.

    Attributes:
        copies: The copies of the latest session; None if there are none.
    """

    def __init__(self, modules: HasModules) -> None:
        self.copies: _Copies | None = None


class HalfWeights:
    """The linear layers of a model with weights in autocast's type.

    Args:
        model: Model; its `nn.Linear` and `Conv1D` layers with float32 weights take part.
        free_bytes: Returns the bytes available to caches. If copies need more than half of them, none are made.
        table: Timings of routes; None for those of this machine.

    Attributes:
        most_bytes: Peak of `num_bytes` in the latest call.
    """

    def __init__(self, model: nn.Module, free_bytes: Callable[[], int], table: RouteTable | None = None) -> None:
        self.most_bytes = 0
        self._present: WeakSet[_Reserved] = WeakSet()
        self._model, self._free_bytes, self._given = model, free_bytes, table

    @property
    def num_bytes(self) -> int:
        """Bytes of the present copies."""
        return sum(reserved.num_bytes for reserved in self._present)

    @contextmanager
    def installed(self, dtype: torch.dtype | None, parts: HasModules | None = None) -> Iterator[bool]:
        """Context in which this thread's layers under autocast multiply by copies.

        It tells whether copies were dropped for newer ones: what was captured with those must not be replayed.

        Args:
            dtype: Expected autocast type; None makes no copies. They are not used if autocast turns out to use another
                type.
            parts: The model's modules, if already listed: copies then last as long as the list. Else they go with the
                context.
        """
        if not self.num_bytes:
            self.most_bytes = 0
        if dtype is None:
            yield False
            return
        modules, table = parts or self._model, self._given or RouteTable.of_this_machine()
        copies, dropped = self._copies_of(modules, dtype, table)
        if not copies.fit:
            yield dropped
            return
        try:
            with replaced_forwards(copies.forwards()):
                yield dropped
        finally:
            copies.rest()
            table.save()

    def _copies_of(self, modules: HasModules, dtype: torch.dtype, table: RouteTable) -> tuple[_Copies, bool]:
        """The copies that the list keeps, if they are up to date, or new ones; and whether others were dropped for them."""
        keep = kept(modules, _Kept)
        former = keep.copies
        if former is not None and former.are_of(dtype):
            return former, False
        if former is not None:
            former.drop()  # before others take their place
        keep.copies = _Copies(modules, dtype, self._reserve, table)
        return keep.copies, former is not None and former.fit

    def _reserve(self, reserved: _Reserved, num_bytes: int) -> bool:
        """Reserve bytes for copies, if they are free; negative numbers give back."""
        if num_bytes > _SHARE * self._free_bytes():
            return False
        self._present.add(reserved)
        reserved.num_bytes += num_bytes
        self.most_bytes = max(self.most_bytes, self.num_bytes)
        return True


def _choose_routes(halves: Iterable[_Half], table: RouteTable) -> None:
    """Give a CPU's layers their contests, one for all layers of a shape."""
    found: dict[tuple[torch.Size, bool], dict[int, Contest]] = {}
    for half in halves:
        weight, has_bias = half.weight, half.bias is not None
        if weight is not None and weight.device.type == "cpu" and weight.nbytes >= MIN_BYTES:
            if (weight.shape, has_bias) not in found:
                own = {rows: table.contest(weight, has_bias, rows, may_pack=False) for rows in BUCKETS}
                found[weight.shape, has_bias] = own
            half.contests = found[weight.shape, has_bias]


def _takes_part(module: Any) -> bool:
    return bool(
        class_of(module) in _PRODUCTS
        and "forward" not in module.__dict__
        and module.weight.dtype == torch.float32
        and module.weight.dim() == 2
        and can_be_copied(module.weight, _size_of(module))
    )


def _size_of(module: Any) -> int:
    """Number of elements of a layer's weight."""
    return module.nx * module.nf if isinstance(module, Conv1D) else module.in_features * module.out_features


def _linear(x: torch.Tensor, half: _Half) -> torch.Tensor:
    rows = x.numel() // half.weight.shape[1]
    if not half.contests or not rows:
        return functional.linear(x, half.weight, half.bias)
    flat = x.reshape(rows, -1).to(half.weight.dtype)
    with torch.autocast("cpu", enabled=False):
        out = by_route(half.contests[bucket_of(rows)], flat, half.weight, half.bias)
    return out.view(*x.shape[:-1], -1)


def _conv1d(x: torch.Tensor, half: _Half) -> torch.Tensor:
    out = torch.addmm(half.bias, x.view(-1, x.size(-1)), half.weight)
    return out.view(*x.shape[:-1], half.weight.shape[1])


_PRODUCTS: dict[type, Callable[[torch.Tensor, _Half], torch.Tensor]] = {nn.Linear: _linear, Conv1D: _conv1d}


def _forward_of(
    own: Callable[..., torch.Tensor], lowered: _Lowered, halves: dict[Any, _Half]
) -> Callable[..., torch.Tensor]:
    """The replacement for a layer's forward `own`."""

    def forward(layer: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        half = halves.get(layer)
        (x,) = args or kwargs.values()
        if half is None or autocast_type(x.device) != lowered.dtype or x.dtype == torch.float64:
            return own(x)
        if not half.is_of(layer):
            del halves[layer]
            return own(x)
        return _PRODUCTS[class_of(layer)](lowered.of(x), half)

    return forward
