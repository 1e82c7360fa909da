"""Runs layers with their own weights, such as MoE experts and routers, as copies ("twins") of half the size.

An MoE keeps the weights of all its experts in one tensor, and its own class multiplies by them. Under autocast every
product converts its operand: slices of that tensor, or rows gathered from it. Which products these are cannot be seen
from outside. So the forward runs in a twin, a copy of the layer that differs only in these tensors.

Autocast does not affect every product. `torch.nn.functional.grouped_mm`, transformers' default, computes in the
weights' own type without conversions, and some routers turn autocast off. A twin would change their results. So the
first forward of a call runs both ways, and a layer gets a twin only if both results are bit-equal. After the first
difference, further layers of that class get no twin in the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from atlas_rl.policy.guise import class_of
from atlas_rl.policy.parts import HasModules
from atlas_rl.policy.weight_copy import WeightCopy, can_be_copied


class HalfTwins:
    """Twins of a model's layers, for one call.

    Args:
        model: Model, or its modules; its layers that are not torch's and have no weights in sublayers take part.
        dtype: Type that autocast computes in.
        reserve: Takes the bytes that a twin needs (negative: gives back) and returns whether they are available.

    Attributes:
        layers: Layers that may get a twin.
    """

    def __init__(self, model: HasModules, dtype: torch.dtype, reserve: Callable[[int], bool]) -> None:
        self.layers = [module for module in model.modules() if _takes_part(module)]
        self._dtype, self._reserve = dtype, reserve
        self._twins: dict[nn.Module, _Twin | None] = {}  # of layers that were tried; None if they got none
        self._unequal: set[type] = set()  # classes whose twins gave other results

    def are_current(self) -> bool:
        """Whether no weight has changed since its twin was made."""
        return all(twin is None or twin.is_of(layer) for layer, twin in self._twins.items())

    def drop(self) -> None:
        """Free the twins, and make no others: layers run their own forwards from now on."""
        self._twins = dict.fromkeys(self.layers)

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """Replacements for `threads.replaced_forwards`."""
        return {layer: self._forward_of(layer, layer.forward) for layer in self.layers}

    def _forward_of(self, layer: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        device = _weights(layer)[0][1].device.type

        def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != self._dtype:
                return own(*args, **kwargs)
            if layer not in self._twins:
                return self._tried(layer, own, args, kwargs)
            twin = self._twins[layer]
            if twin is not None and not twin.is_of(layer):
                twin = self._twins[layer] = None
            return own(*args, **kwargs) if twin is None else twin.forward(*args, **kwargs)

        return forward

    def _tried(self, layer: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the layer and its twin; the twin is used from then on if both return the same."""
        kind = class_of(layer)
        if kind in self._unequal or _is_captured() or not all(map(_can_be_repeated, (*args, *kwargs.values()))):
            return own(*args, **kwargs)
        self._twins[layer] = None
        num_bytes = 2 * sum(weight.numel() for _, weight in _weights(layer))
        if not num_bytes or not self._reserve(num_bytes):
            return own(*args, **kwargs)
        twin = _Twin(layer, self._dtype)
        found = twin.forward(*map(_repeated, args), **{name: _repeated(value) for name, value in kwargs.items()})
        expected = own(*args, **kwargs)
        if _are_equal(found, expected):
            self._twins[layer] = twin
        else:
            self._unequal.add(kind)
            self._reserve(-num_bytes)
        return expected


class _Twin:
    """A copy of a layer in which weights of two and more dimensions are replaced."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self._copies = {name: WeightCopy.of(own, own.detach().to(dtype)) for name, own in _weights(layer)}
        twin = object.__new__(class_of(layer))
        made = {name: copy.made for name, copy in self._copies.items()}  # these shadow the parameters of the same names
        vars(twin).update(vars(layer) | made | {"training": False})
        self.forward: Callable[..., Any] = twin.forward

    def is_of(self, layer: Any) -> bool:
        found = [(copy, layer._parameters.get(name)) for name, copy in self._copies.items()]
        return all(own is not None and copy.is_of(own) for copy, own in found)  # None while an adapter computes it


def _weights(layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A layer's own parameters that it may multiply by."""
    return [(name, own) for name, own in layer._parameters.items() if own is not None and own.dim() > 1]


def _takes_part(module: nn.Module) -> bool:
    weights = _weights(module)
    return bool(
        weights
        and not class_of(module).__module__.startswith("torch.")  # linear layers have copies, convolutions are small
        and not isinstance(module, (nn.Embedding, Conv1D))  # lookups convert nothing, Conv1D layers have copies
        and "forward" not in module.__dict__
        and not any(True for child in module.children() for _ in child.parameters())
        and all(own.dtype == torch.float32 and can_be_copied(own, own.numel()) for _, own in weights)
    )


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _can_be_repeated(value: Any) -> bool:
    """Whether a forward with this argument can be repeated: it leaves no state behind, as a cache would."""
    return value is None or isinstance(value, (torch.Tensor, int, float, str))


def _repeated(value: Any) -> Any:
    """A copy of an argument for a second forward, which may write into it."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _are_equal(found: Any, expected: Any) -> bool:
    """Whether two results of a forward are bit-equal; the host waits for the answer."""
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, (tuple, list)):
        return len(found) == len(expected) and all(map(_are_equal, found, expected))
    return bool(found == expected)
