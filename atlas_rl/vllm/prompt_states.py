"""Collects hidden states of whole prompts for drafters that read layers; engines run prompts in pieces and skip some.

A prompt may come in chunks, and vLLM never runs tokens that it finds in its prefix cache. Their states are then taken
from a recent prompt with the same beginning. If there is none, the drafter gets no states for that request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

_KEPT_TOKENS = 16_384  # tokens of recently run prompts


@dataclass(slots=True)
class _Piece:
    """States of a prompt's tokens from position `begin` on: per layer `[n, hidden]`."""

    begin: int
    layers: dict[int, torch.Tensor]

    @property
    def end(self) -> int:
        return self.begin + next(iter(self.layers.values())).shape[0]


class PromptPieces:
    """Assembles the pieces of prompts."""

    def __init__(self) -> None:
        self._pieces: dict[str, _Piece] = {}
        self._recent: OrderedDict[bytes, tuple[np.ndarray, dict[int, torch.Tensor]]] = OrderedDict()

    def add(self, name: str, begin: int, layers: dict[int, torch.Tensor]) -> None:
        """Add a piece of a prompt that was run: per layer `[n, hidden]`, from position `begin` on."""
        known = self._pieces.get(name)
        if known is not None and known.end == begin:
            layers = {n: torch.cat([known.layers[n], states]) for n, states in layers.items()}
            begin = known.begin
        self._pieces[name] = _Piece(begin, layers)

    def take(self, name: str, tokens: np.ndarray) -> dict[int, torch.Tensor] | None:
        """States of a complete prompt (int32 `[n]`): per layer `[n, hidden]`; None if its beginning is missing."""
        piece = self._pieces.pop(name, None)
        if piece is None or piece.end != len(tokens):
            return None
        layers = piece.layers
        if piece.begin:
            head = self._beginning(tokens[: piece.begin])
            if head is None:
                return None
            layers = {n: torch.cat([head[n], states]) for n, states in layers.items()}
        self._keep(tokens, layers)
        return layers

    def drop(self, name: str) -> None:
        """Drop a request that ended before its prompt was complete."""
        self._pieces.pop(name, None)

    def clear(self) -> None:
        """Drop everything after a weight change."""
        self._pieces.clear()
        self._recent.clear()

    def _beginning(self, tokens: np.ndarray) -> dict[int, torch.Tensor] | None:
        for known, layers in reversed(self._recent.values()):
            if len(known) >= len(tokens) and np.array_equal(known[: len(tokens)], tokens):
                return {n: states[: len(tokens)] for n, states in layers.items()}
        return None

    def _keep(self, tokens: np.ndarray, layers: dict[int, torch.Tensor]) -> None:
        key = tokens.tobytes()
        self._recent[key] = tokens.copy(), layers
        self._recent.move_to_end(key)
        while len(self._recent) > 1 and sum(len(known) for known, _ in self._recent.values()) > _KEPT_TOKENS:
            self._recent.popitem(last=False)
