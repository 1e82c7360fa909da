"""Generating changes how a policy's modules run; this module limits the change to the generating thread.

Guarantees:

- Generation calls of a process run one at a time, whatever engines and policies they belong to. A second thread waits.
- A plain forward of the policy in another thread neither waits nor changes. It has the policy's own attention, linear
  layers, dropout and training mode, whether it begins before, during or after a call. The same holds for its backward
  pass.
- A copy or a pickle of the policy that any thread makes during a call is the same as outside of calls.
- Calls of one thread may be nested (a draft LM inside a policy's call) and interleaved (greenlets).
- If a call is interrupted, at any point, its changes are undone at its end or, if that was interrupted as well, at the
  beginning of the next call.

Three mechanisms: `GENERATING` is the one lock of the process, so that threads cannot wait for each other in a cycle.
Whatever must differ between threads is an attribute of a guise (`policy/guise.py`) that modules and configuration have
during a change, as `torch.nn.utils.parametrize` and FSDP2 do it. So nothing is written into an object that another
thread reads. And every change is listed before it is made, so that it can be undone without asking who made it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ParamSpec, TypeVar

from torch import nn

from atlas_rl.policy.guise import class_of, guise_of, own_attribute, put_class
from atlas_rl.policy.parts import HasModules

GENERATING = threading.RLock()
"""Held by the thread that generates, audits or refreshes drafters; `generating` takes it."""

_EVALUATED, _ATTENDING, _FORWARD, _WATCHED = "evaluated", "attending", "forward", "watched"
_NONE: Mapping[str, list[Any]] = {}
_OWN = [None]
_owned = threading.Condition(GENERATING)  # the one public way to ask a lock whether this thread has it

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """One kind of change: for each changed thing, by its id, its value under the change."""

    kind: str
    things: Mapping[int, tuple[Any, Any]]


class _Changes:
    """All present changes.

    Attributes:
        owner: The thread that holds the lock and sees the changes; None if no thread does.
        open: Present changes, in order.
        values: Derived from `open`: by the id of a thing and by kind, the values of its changes, in order.
        touched: Everything that may have a guise.
        number: How often replacements of forwards have begun or ended.
    """

    def __init__(self) -> None:
        self.owner: int | None = None
        self.open: list[_Change] = []
        self.values: dict[int, dict[str, list[Any]]] = {}
        self.touched: dict[int, Any] = {}
        self.number = 0

    def begin(self, change: _Change) -> None:
        self.touched.update((key, thing) for key, (thing, _) in change.things.items())
        self.open.append(change)
        self._follow(change)

    def end(self, change: _Change) -> None:
        self.open = [each for each in self.open if each is not change]
        self._follow(change)

    def restore(self) -> None:
        """Undo everything; may be interrupted and called again."""
        self.owner = None  # from here on guises do nothing
        self.open, self.values, self.number = [], {}, self.number + 1
        for thing in self.touched.values():
            put_class(thing, class_of(thing))
        self.touched = {}

    def seen(self, thing: Any) -> Mapping[str, list[Any]]:
        """The values that this thread sees of a changed thing, by kind."""
        return self.values.get(id(thing), _NONE) if self.owner == threading.get_ident() else _NONE

    def _follow(self, change: _Change) -> None:
        """Apply the changes in `open`."""
        self.number += change.kind == _FORWARD and bool(change.things)
        for key, (thing, _) in change.things.items():
            values: dict[str, list[Any]] = {}
            for each in self.open:
                if key in each.things:
                    values.setdefault(each.kind, []).append(each.things[key][1])
            self.values[key] = values
            put_class(thing, _seen_by_thread(class_of(thing), frozenset(values)))
            if not values:
                del self.values[key]


_changes = _Changes()


@contextmanager
def generating() -> Iterator[None]:
    """Context in which this thread holds the lock; remains of interrupted calls are undone first."""
    outermost = not _is_owned()
    with GENERATING:
        if outermost:
            _changes.restore()
        _changes.owner = threading.get_ident()
        try:
            yield
        finally:
            # Changes that are open now belong to a call interleaved with this one, or were left by an interrupt.
            if outermost and not _changes.open:
                _changes.restore()


def _is_owned() -> bool:
    try:
        _owned.notify()
    except RuntimeError:
        return False
    return True


def one_at_a_time(method: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Make `method` wait until no other generation runs in this process."""

    @functools.wraps(method)
    def waiting(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with generating():
            return method(*args, **kwargs)

    return waiting


@contextmanager
def evaluation_mode(model: HasModules) -> Iterator[None]:
    """Context with dropout off in this thread. No training flag is written; writes of other threads stay."""
    # Wrappers of torch.compile have no flag of their own; the module inside has one, and is listed as well.
    with generating(), _changed(_EVALUATED, [(m, True) for m in model.modules() if m.__dict__.get("training")]):
        yield


@contextmanager
def attending(name: str, config: Any) -> Iterator[None]:
    """Context in which this thread finds the attention implementation `name` in a model's configuration."""
    with _changed(_ATTENDING, [(config, name)]):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context in which `forward(module, *args, **kwargs)` replaces a module's forward, in this thread."""
    with _changed(_FORWARD, forwards.items()):
        yield


def stand_ins() -> tuple[Callable[..., Any], ...]:
    """The present replacements of modules' forwards in this thread: the first of every change.

    Two results are equal while the changes are the same. Holding a result keeps its functions alive, so that no new one
    can be taken for them.
    """
    if _changes.owner != threading.get_ident():
        return ()
    firsts = (next(iter(change.things.values()), None) for change in _changes.open if change.kind == _FORWARD)
    return tuple(first[1] for first in firsts if first is not None)


def stand_ins_of(modules: Iterable[nn.Module]) -> list[Callable[..., Any] | None]:
    """The latest present replacement of each module's forward in this thread; None for its own."""
    values = _changes.values if _changes.owner == threading.get_ident() else {}
    return [values.get(id(module), _NONE).get(_FORWARD, _OWN)[-1] for module in modules]


def num_changes() -> int:
    """How often replacements have begun or ended; `stand_ins_of` is the same in this thread while this number is."""
    return _changes.number


@contextmanager
def watched_forwards(watchers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context in which this thread calls `watcher(forward, *args, **kwargs)` instead of a module's forward."""
    with _changed(_WATCHED, watchers.items()):
        yield


@contextmanager
def _changed(kind: str, things: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    change = _Change(kind, {id(thing): (thing, value) for thing, value in things})
    with generating():
        try:
            _changes.begin(change)
            yield
        finally:
            _changes.end(change)


class _Forward:
    """`forward` of a guise: the thread's replacement, or else the module's own."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self._own.forward
        changes = _changes.seen(module)  # read once: this runs at every call of every layer
        if _FORWARD in changes:
            forward: Any = MethodType(changes[_FORWARD][-1], module)
        elif "forward" in module.__dict__:
            forward = module.__dict__["forward"]
        else:
            forward = own_attribute(module, "forward")
        for watcher in changes.get(_WATCHED, ()):
            forward = functools.update_wrapper(functools.partial(watcher, forward), forward)
        return forward

    def __set__(self, module: Any, forward: Any) -> None:
        module.__dict__["forward"] = forward

    def __delete__(self, module: Any) -> None:
        if "forward" not in module.__dict__:
            raise AttributeError("forward")
        del module.__dict__["forward"]


def _training(module: nn.Module) -> bool:
    return bool(module.__dict__["training"]) and _EVALUATED not in _changes.seen(module)


def _set_training(module: nn.Module, value: bool) -> None:
    module.__dict__["training"] = value


def _attention(own: Any) -> property:
    kept = own._attn_implementation

    def implementation(config: Any) -> Any:
        changes = _changes.seen(config)
        return changes[_ATTENDING][-1] if _ATTENDING in changes else kept.fget(config)

    return property(implementation, kept.fset)


@functools.cache
def _seen_by_thread(own: type, kinds: frozenset[str]) -> type:
    """The class that replaces `own` while there are changes of these kinds; `own` if there are none."""
    if not kinds:
        return own
    attributes: dict[str, Any] = {}
    if _EVALUATED in kinds:
        attributes["training"] = property(_training, _set_training)
    if _ATTENDING in kinds:
        attributes["_attn_implementation"] = _attention(own)
    if kinds & {_FORWARD, _WATCHED}:
        attributes["forward"] = _Forward(own)
    return guise_of(own, attributes)
