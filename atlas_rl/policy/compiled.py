"""Runs policies compiled by `torch.compile` without compilation: a ragged forward has a new shape at every step.

A module is compiled in place (`module.compile()`) or wrapped (`torch.compile(module)`), as a whole or layer by layer.
Compiled code looks up attention functions and modes at compile time, and would be recompiled in every step. So the
generating thread runs the modules' own code. Other threads run the compiled code, as the trainer does in training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from atlas_rl.policy.guise import class_of
from atlas_rl.policy.parts import HasModules

_CALL = "_compiled_call_impl"  # nn.Module.__call__ calls it if it is set


def is_compiled(model: Any) -> bool:
    """Whether a module is a wrapper made by `torch.compile`."""
    # By name: most processes compile nothing, and torch._dynamo takes a second to import.
    return (
        isinstance(model, nn.Module) and "_orig_mod" in model._modules and class_of(model).__name__ == "OptimizedModule"
    )


@contextmanager
def uncompiled(model: HasModules) -> Iterator[None]:
    """Context in which this thread runs every module of `model` as if it had not been compiled."""
    owner = threading.get_ident()
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        own: Callable[..., Any]
        module: Any
        for module in model.modules():
            attributes = vars(module)
            if is_compiled(module):
                name, own = "forward", module._orig_mod
            elif attributes.get(_CALL) is not None:
                name, own = _CALL, module._call_impl
            else:
                continue
            changed.append((attributes, name, attributes[name]))
            attributes[name] = _for_thread(owner, own, attributes[name])
        yield
    finally:
        for attributes, name, before in reversed(changed):
            attributes[name] = before


def _for_thread(owner: int, own: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (own if threading.get_ident() == owner else compiled)(*args, **kwargs)

    return call
