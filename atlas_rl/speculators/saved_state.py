"""Checks a drafter's saved state before anything is built from it.

Compiled code indexes by some of these numbers, and a disk may return other numbers than were written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

_INTEGERS, _FLOATS = "iu", "f"
_MAX_VERSION = 2**31 - 1  # policy versions are stored in 32 bits
NOT_SAVED: dict[str, Any] = {"not_saved": True}
"""Stands in a saved state for a drafter whose `state_dict` raised."""


def saved_part(part: Any) -> Any:
    """A drafter's part of a saved state; `ValueError` if nothing of it was saved."""
    if isinstance(part, Mapping) and set(part) == set(NOT_SAVED):
        raise ValueError("its state_dict() raised when the state was saved, which has nothing of it")
    return part


class SavedState:
    """A mapping whose values are checked when they are read.

    Args:
        values: A state dict, or a part of it.
        owner: Name used in errors, such as "history index".

    Raises:
        ValueError: Not a mapping.
    """

    def __init__(self, values: Any, owner: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{owner}: the state is a {type(values).__name__}, not a mapping")
        self._values, self._owner = values, owner

    def check_kind(self, kind: str, version: int) -> None:
        """Raise `ValueError` for the state of another kind of speculator, or one in another format."""
        found = self._values.get("kind"), self._values.get("version")
        if not (isinstance(found[0], str) and found[0] == kind):
            raise ValueError(f"not a state of the {self._owner}: kind is {_short(found[0])}")
        if type(found[1]) is not int or found[1] != version:
            raise ValueError(f"{self._owner}: the state has format {_short(found[1])}, expected {version}")

    def names(self) -> set[str]:
        """Names of its values."""
        return set(self._values)

    def part(self, name: str) -> SavedState:
        """A nested mapping."""
        return SavedState(self._value(name), f"{self._owner}: {name}")

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number in `[low, high]`."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
            raise ValueError(f"{self._owner}: {name} is {_short(value)}, expected a whole number in [{low}, {high}]")
        return int(value)

    def policy_version(self) -> int:
        """The policy's version when the state was saved; -1 before the first."""
        return self.integer("policy_version", -1, _MAX_VERSION)

    def integers(self, name: str, low: int, high: int) -> np.ndarray:
        """A list of whole numbers in `[low, high]`: int64 `[n]`."""
        found = self._array(name, _INTEGERS)
        if found.ndim != 1:
            raise ValueError(f"{self._owner}: {name} has shape {found.shape}, expected a list")
        if len(found) and not (low <= int(found.min()) and int(found.max()) <= high):
            raise ValueError(
                f"{self._owner}: {name} has values from {found.min()} to {found.max()}, expected [{low}, {high}]"
            )
        return found.astype(np.int64)

    def floats(self, name: str, shape: Sequence[int], low: float, high: float) -> np.ndarray:
        """Finite numbers in `[low, high]`: float64 of `shape`."""
        found = self._array(name, _FLOATS)
        if found.shape != tuple(shape):
            raise ValueError(f"{self._owner}: {name} has shape {found.shape}, expected {tuple(shape)}")
        found = found.astype(np.float64)
        if not ((found >= low) & (found <= high)).all():  # NaN is in no range
            raise ValueError(f"{self._owner}: {name} has values that are not finite numbers in [{low:g}, {high:g}]")
        return found

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise ValueError(f"{self._owner}: the state has no {name}")
        return self._values[name]

    def _array(self, name: str, kinds: str) -> np.ndarray:
        value = self._value(name)
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            wanted = "whole numbers" if kinds == _INTEGERS else "floating-point numbers"
            raise ValueError(f"{self._owner}: {name} is of type {found}, expected {wanted}")
        return value


def _short(value: Any) -> str:
    return repr(value)[:60]
