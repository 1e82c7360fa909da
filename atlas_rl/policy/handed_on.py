"""Detects layers that attend to the keys and values of an earlier layer (Gemma 3n, Gemma 4)."""

from __future__ import annotations

import weakref

import torch


class HandedOn:
    """The keys and values of one forward."""

    def __init__(self) -> None:
        # Weak references keep nothing alive, and reveal an id that another tensor has reused.
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], int]] = {}

    def first_layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> int:
        """The first layer that passed these very tensors: `layer`, or an earlier one."""
        seen = self._seen.get(id(key))
        if seen is not None and seen[0]() is key and seen[1]() is value:
            return seen[2]
        self._seen[id(key)] = weakref.ref(key), weakref.ref(value), layer
        return layer
