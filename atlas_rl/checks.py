"""Checks of options and arguments: each returns the value or raises a `ValueError` with option, value and remedy.

Numbers may be numpy or torch scalars; the returned number is Python's. Neither `True` nor text counts as a number.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_LONGEST = 80  # characters of a value in a message


def wrong(name: str, wanted: str, value: Any) -> ValueError:
    """The error for an invalid option value; `wanted` describes valid values."""
    return ValueError(f"{name} must be {wanted}, got {shown(value)}")


def shown(value: Any) -> str:
    """`repr` of the value, shortened to one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({type(value).__name__})"


def plain(value: Any) -> Any:
    """The Python value of a numpy or torch scalar; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole(name: str, value: Any, least: int, most: int | None = None, *, hint: str = "") -> int:
    """Check for a whole number between `least` and `most`. `hint` follows the range in the message."""
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, Integral) or not _within(int(given), least, most):
        wanted = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
        raise wrong(name, f"{wanted} {hint}".strip(), value)
    return int(given)


def number(name: str, value: Any, wanted: str, fits: Callable[[Any], bool]) -> float:
    """Check for a number for which `fits` is true; `wanted` describes such numbers. NaN never fits."""
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, Real) or not fits(given):
        raise wrong(name, wanted, value)
    return float(given)


def flag(name: str, value: Any) -> bool:
    """Check for True or False; 0 and 1 are refused."""
    given = plain(value)
    if not isinstance(given, bool):
        raise wrong(name, "True or False", value)
    return given


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """Check for one of several words."""
    if not isinstance(value, str) or value not in known:
        raise wrong(name, " or ".join(filter(None, (", ".join(map(repr, known[:-1])), repr(known[-1])))), value)
    return value


def path(name: str, value: Any, what: str = "a path") -> Path:
    """Check for a path, as text or as `Path`; it need not exist."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise wrong(name, f"{what}, as text or pathlib.Path", value)
    return Path(text)


def instance(name: str, value: Any, kind: type, wanted: str) -> Any:
    """Check for an instance of a class. Passing the class itself gets its own message."""
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{name} must be {wanted}, got the class {value.__name__}: make one, {value.__name__}(...)")
    if not isinstance(value, kind):
        raise wrong(name, wanted, value)
    return value


def instances(name: str, value: Any, kind: type) -> list[Any]:
    """Check for instances of a class, in a list or another sequence."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong(name, f"a list of {kind.__name__} objects", value)
    return [instance(f"{name}[{index}]", each, kind, f"a {kind.__name__} object") for index, each in enumerate(value)]


def token_ids(name: str, value: Any, *, wanted: str = "a token id, or a flat list of token ids") -> tuple[int, ...]:
    """Check for one token id or several, in a list, tuple, set, array or tensor."""
    given = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable | Integral):
        raise wrong(name, wanted, value)
    tokens = [plain(token) for token in (given if isinstance(given, Iterable) else [given])]
    if any(isinstance(token, bool) or not isinstance(token, Integral) for token in tokens):
        raise wrong(name, wanted, value)
    return tuple(int(token) for token in tokens)


def equals(value: Any, other: Any) -> bool:
    """Whether two values are equal. An array of several values equals no scalar, and text equals no number."""
    given = plain(value)
    return not hasattr(given, "shape") and bool(given == other)


def empty(value: Any) -> bool:
    """Whether this is a collection without members; text is not a collection here."""
    given = plain(value)
    return hasattr(given, "__len__") and not isinstance(given, str | bytes) and len(given) == 0


def reject_unknown(
    options: Mapping[str, Any],
    known: Sequence[str],
    where: str,
    *,
    elsewhere: Mapping[str, str] | None = None,
    listed: str = "",
) -> None:
    """Raise `ValueError` for options that are not `known`, with the nearest known name.

    Args:
        options: Options by name.
        known: Names that exist.
        where: What takes the options, for the message.
        elsewhere: Known names by the names that other libraries use for them, or sentences about them without a stop.
        listed: Where the known names are listed, if they are too many for a message.
    """
    for name in options:
        if name not in known:
            near = [(elsewhere or {}).get(name), *difflib.get_close_matches(name, known, n=1)]
            found = next((each for each in near if each), "")
            hint = f"did you mean '{found}'? " if found in known else f"{found}. " if found else ""
            names = listed or f"it takes {', '.join(known)}"
            raise ValueError(f"{where} has no option '{name}': {hint}{names}")


def _within(number: int, least: int, most: int | None) -> bool:
    return least <= number <= (math.inf if most is None else most)
