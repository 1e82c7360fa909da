"""Temporarily gives a module or configuration another class that stays invisible to other code.

Other code asks an object for its class, copies and pickles it, and keeps registries of classes. None of it may see a
guise. So the object still reports its own class, copies and pickles have its own class, and no subclass hook runs when
a guise is made: neither `__init_subclass__` nor a metaclass can register or refuse it.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

_MARK = "_atlas_rl_own_class"
_put: Any = vars(object)["__class__"].__set__  # guises override `__class__`, and other classes may


class _Unannounced:
    """First base of every guise: keeps the other bases from hearing of a new subclass.

    It has no `__slots__`: objects can be given the guise because it and their class have the same layout.
    """

    def __init_subclass__(cls, **_options: Any) -> None:
        """Do nothing, so that no other base is called."""


def guise_of(own: type, attributes: dict[str, Any]) -> type:
    """A subclass of `own` with other attributes; `put_class` assigns it to objects of `own`."""
    names: dict[str, Any] = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    names |= {"__class__": property(lambda _: own, put_class), "__reduce_ex__": _reduced, _MARK: own}
    # The metaclass is kept but its `__new__` is skipped, except ABCMeta's, which does necessary bookkeeping.
    maker: Any = ABCMeta if issubclass(type(own), ABCMeta) else type
    made: type = maker.__new__(type(own), own.__name__, (_Unannounced, own), names | attributes)
    return made


def class_of(thing: Any) -> Any:
    """The class of a module or configuration outside of a call."""
    return vars(type(thing)).get(_MARK, type(thing))


def own_attribute(thing: Any, name: str) -> Any:
    """The value that an object with a guise would find under a name in its own class."""
    return getattr(super(_Unannounced, thing), name)


def put_class(thing: Any, new: type) -> None:
    """Set an object's class, bypassing its own `__setattr__`."""
    _put(thing, new)


def _reduced(thing: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of an object with a guise: copies and pickles have the object's own class."""
    own, guise = class_of(thing), type(thing)
    reduced = own.__reduce_ex__(thing, protocol)
    if not isinstance(reduced, tuple):
        return reduced
    maker, arguments, *state = reduced
    arguments = tuple(own if argument is guise else argument for argument in arguments)
    return (own if maker is guise else maker, arguments, *state)
