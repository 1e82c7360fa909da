"""A model's modules, listed once for frequent iteration, and what was found out about them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from atlas_rl.policy.guise import class_of

_Result = TypeVar("_Result")


class HasModules(Protocol):
    """A model, or a list of its modules."""

    def modules(self) -> Iterator[nn.Module]:
        """Every module, the model itself first."""
        ...


class ListedModules:
    """The modules that a model has now, in the order of `model.modules()`.

    Iterating over the modules of a model of thirty layers takes torch half a millisecond, and a session does it for
    every kind of change that it makes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = tuple(model.modules())
        self._made: dict[Callable[..., Any], Any] = {}
        self._state = _state_of(self._modules)

    def modules(self) -> Iterator[nn.Module]:
        """Every module, the model itself first."""
        return iter(self._modules)

    def are_unchanged(self) -> bool:
        """Whether the modules are what they were when they were listed.

        That is: their classes, the forwards of these, patches, hooks, submodules, the weights and their addresses,
        and whether adapters are merged, disabled or others.
        Values of weights may differ.
        """
        (things, numbers), (now, numbers_now) = self._state, _state_of(self._modules)
        return numbers == numbers_now and len(things) == len(now) and all(map(operator.is_, things, now))

    def kept(self, make: Callable[[HasModules], _Result]) -> _Result:
        """`make` of these modules, called once: the result is valid while they are unchanged."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]


def kept(model: HasModules, make: Callable[[HasModules], _Result]) -> _Result:
    """`make(model)`; of a list of modules, the same result every time."""
    return model.kept(make) if isinstance(model, ListedModules) else make(model)


def _state_of(modules: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """What decides how modules run: objects, and numbers that say which objects belong to which module."""
    things: list[Any] = [
        *torch_modules._global_forward_hooks.values(),
        *torch_modules._global_forward_pre_hooks.values(),
    ]
    numbers = [len(things)]
    for module in modules:
        own = class_of(module)
        hooks, early = module._forward_hooks, module._forward_pre_hooks
        children, weights, buffers = module._modules, module._parameters, module._buffers
        attributes = vars(module)
        things += (own, getattr(own, "forward", None), attributes.get("forward"))
        if _MERGED in attributes:  # a layer of PEFT, whose state decides what it computes
            things.append(attributes.get("_active_adapter"))
            numbers += (len(attributes[_MERGED]), bool(attributes.get("_disable_adapters")))
        if hooks or early:
            things += (*hooks.values(), *early.values())
        numbers += (len(hooks), len(early), len(children), len(weights), len(buffers))
        things += children.values()
        for held in (weights, buffers):
            for tensor in held.values():
                things.append(tensor)
                if type(tensor) in _PLAIN:  # others may have no address
                    numbers.append(tensor.data_ptr())
    return things, numbers


_MERGED = "merged_adapters"
_PLAIN = (torch.Tensor, nn.Parameter)
