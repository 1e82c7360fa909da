"""Generating changes how a policy's modules run; this module keeps that change to the thread that generates.

What is promised:

- Generation calls of a process run one at a time, whatever engines and policies they belong to. A second thread waits.
- A plain forward of the policy in another thread neither waits nor changes. It has the policy's own attention, linear
  layers, dropout and training mode, whether it begins before, during or after a call; so has its backward pass.
- Calls of one thread may be nested (a draft LM inside a policy's call) and taken in turns (greenlets).

Two means. `GENERATING` is the lock of the process: with one lock there is no order in which two threads could wait for each
other. Whatever must differ between threads is a property, of a subclass that modules and configuration have for the time of
a call, as `torch.nn.utils.parametrize` and FSDP2 do it. So nothing is ever written that another thread reads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, ParamSpec, TypeVar

from torch import nn

GENERATING = threading.RLock()
"""Held by the thread that generates, audits or refreshes drafters."""

_MARK = "_atlas_rl_own_class"

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class _ThisThread(threading.local):
    """What is going on in a thread.

    Attributes:
        num_evaluating: Contexts of `evaluation_mode` that are open.
        attention: Name of the attention of the forward that runs, and the configuration that is to have it.
    """

    num_evaluating: int = 0
    attention: tuple[str, Any] | None = None


_this_thread = _ThisThread()


def one_at_a_time(method: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Let `method` wait for whatever else generates in this process."""

    @functools.wraps(method)
    def waiting(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with GENERATING:
            return method(*args, **kwargs)

    return waiting


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off in this thread. No training flag is written, and what others write meanwhile stays."""
    with GENERATING:
        # A module that is shared appears once; one that an outer context changed is left to that.
        # Wrappers of torch.compile have no flag of their own: what they wrap has one, and is among the modules.
        own = [module for module in model.modules() if "training" in vars(module)]
        changed = [module for module in own if module.training and not _is_changed(module)]
        _this_thread.num_evaluating += 1
        try:
            for module in changed:
                _set_class(module, _evaluated(class_of(module)))
            yield
        finally:
            _this_thread.num_evaluating -= 1
            _put_back(changed)


@contextmanager
def attention_by_thread(config: Any) -> Iterator[None]:
    """Inside, `attending` can give this thread another attention of a model with this configuration."""
    with GENERATING:
        changed = [] if _is_changed(config) else [config]
        try:
            for each in changed:
                _set_class(each, _attending(class_of(each)))
            yield
        finally:
            _put_back(changed)


@contextmanager
def attending(name: str, config: Any) -> Iterator[None]:
    """Inside, this thread finds the attention implementation `name` in `config`, which is in `attention_by_thread`."""
    before = _this_thread.attention
    try:
        _this_thread.attention = name, config
        yield
    finally:
        _this_thread.attention = before


def in_this_thread(forward: Callable[..., Any], module: nn.Module) -> MethodType:
    """`forward` as a method of `module`, for calls of this thread; other threads get the module's own."""
    owner, before = threading.get_ident(), module.__dict__.get("forward")

    def dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == owner:
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)

    return MethodType(dispatch, module)


def _training(module: nn.Module) -> bool:
    return bool(module.__dict__["training"]) and not _this_thread.num_evaluating


def _set_training(module: nn.Module, value: bool) -> None:
    module.__dict__["training"] = value


@functools.cache
def _evaluated(own: type) -> type:
    """`own`, whose training flag is off in a thread that evaluates."""
    return _seen_by_thread(own, {"training": property(_training, _set_training)})


@functools.cache
def _attending(own: type) -> type:
    """`own`, a configuration, whose attention implementation is another one in a thread that runs our forward."""
    kept: Any = own._attn_implementation  # type: ignore[attr-defined]

    def implementation(config: Any) -> Any:
        attention = _this_thread.attention
        return attention[0] if attention is not None and attention[1] is config else kept.fget(config)

    return _seen_by_thread(own, {"_attn_implementation": property(implementation, kept.fset)})


def _seen_by_thread(own: type, properties: dict[str, Any]) -> type:
    # Its own of these, lest a base that makes dataclasses of its subclasses gives it others.
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__init__", "__eq__", "__hash__")}
    return type(own.__name__, (own,), names | {"__reduce_ex__": _reduced, _MARK: own} | properties)


def _reduced(thing: Any, protocol: int) -> Any:
    """Copies that another thread makes meanwhile have the class that there was before."""
    own = class_of(thing)
    reduced = own.__reduce_ex__(thing, protocol)
    if isinstance(reduced, tuple) and len(reduced[1]) and reduced[1][0] is type(thing):
        return object.__new__, (own,), *reduced[2:]
    return reduced


def class_of(thing: Any) -> Any:
    """The class that a module or configuration has outside of a call."""
    return vars(type(thing)).get(_MARK, type(thing))


def _is_changed(thing: Any) -> bool:
    return _MARK in vars(type(thing))


def _set_class(thing: Any, new: type) -> None:
    object.__setattr__(thing, "__class__", new)  # not the module's own way, which looks for parameters first


def _put_back(things: Iterable[Any]) -> None:
    for thing in things:
        _set_class(thing, class_of(thing))
