"""Keeps the training data of an EAGLE-3 head: states that the policy computed along its newest rollouts.

Whole drawn texts are kept, in half precision. Of a prompt, only the positions that an example can attend to are kept,
once for all siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atlas_rl.speculators.eagle3.unrolling import Batch, Stretch
from atlas_rl.speculators.recency import recency

_ROWS = 64  # positions of a text that one example learns from
_BEFORE = 512  # positions before these that an example attends to
_PROMPT_ROWS = _BEFORE + 1  # most positions of a prompt that `batch_of` reads: its last one is a row itself


@dataclass(frozen=True, slots=True)
class PromptStates:
    """States along the last `n` positions of a prompt.

    Attributes:
        start: Position of the first of them: tokens of the prompt before it.
        embeddings: float16 `[n - 1, hidden]`, of their tokens except the first.
        features: Per layer float16 `[n, hidden]`.
    """

    start: int
    embeddings: torch.Tensor
    features: dict[int, torch.Tensor]

    @staticmethod
    def start_of(num_tokens: int) -> int:
        """First position to keep of a prompt of so many tokens."""
        return max(0, num_tokens - _PROMPT_ROWS)

    @property
    def num_kept(self) -> int:
        """Positions with states."""
        return len(self.embeddings) + 1

    def __len__(self) -> int:
        """Tokens of the whole prompt."""
        return self.start + self.num_kept


@dataclass(frozen=True, slots=True)
class Text:
    """States along the first `m` drawn tokens of a rollout.

    Attributes:
        prompt: States of its prompt.
        embeddings: float16 `[m, hidden]`, of the drawn tokens.
        features: Per layer float16 `[m - 1, hidden]`, of the drawn tokens' positions except the last.
        drawn_from: float16 `[m, hidden]`, hidden state that each token was drawn from.
        version: Policy version.
    """

    prompt: PromptStates
    embeddings: torch.Tensor
    features: dict[int, torch.Tensor]
    drawn_from: torch.Tensor
    version: int

    def __len__(self) -> int:
        return len(self.embeddings)

    def feature(self, layer: int) -> torch.Tensor:
        """All kept features of a layer, from `prompt.start` to the text's last position but one: `[kept, hidden]`."""
        return torch.cat([self.prompt.features[layer], self.features[layer]])


class TextBuffer:
    """The newest texts, in whole calls; the oldest calls are dropped first.

    Args:
        max_tokens: Most positions kept, see `num_positions`. The newest call is kept in any case.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._calls: list[list[Text]] = []

    def add(self, texts: Sequence[Text]) -> None:
        """Add the texts of a call, except those of one token: the first that a head can predict is the second."""
        self._calls.append([text for text in texts if len(text) > 1])
        while len(self._calls) > 1 and sum(map(num_positions, self._calls)) > self._max_tokens:
            self._calls.pop(0)

    @property
    def has_texts(self) -> bool:
        """Whether the newest call has any usable text."""
        return bool(self._calls) and bool(self._calls[-1])

    def newest(self, size: int, rng: np.random.Generator) -> list[Text]:
        """At most `size` texts of the newest call."""
        call = self._calls[-1]
        return [call[n] for n in rng.choice(len(call), min(size, len(call)), replace=False)]

    def sample(self, size: int, version: int, rng: np.random.Generator) -> list[Text]:
        """At most `size` texts from the whole buffer, with more weight on recent policies."""
        texts = [text for call in self._calls for text in call]
        weights = recency(np.array([version - text.version for text in texts]))
        chosen = rng.choice(len(texts), min(size, len(texts)), replace=False, p=weights / weights.sum())
        return [texts[n] for n in chosen]


def num_positions(texts: Sequence[Text]) -> int:
    """Positions whose states these texts of a call hold: drawn tokens, and kept positions of each distinct prompt."""
    prompts = {id(text.prompt): text.prompt.num_kept for text in texts}
    return sum(prompts.values()) + sum(map(len, texts))


def batch_of(texts: Sequence[Text], layers: Sequence[int], rng: np.random.Generator) -> Batch:
    """A stretch of each text, at a random place if the text is longer, with the positions before it."""
    # Row r of a text is its prompt's last position plus r; the token after it is drawn token r.
    num_rows = np.array([len(text) + 1 for text in texts])
    firsts = rng.integers(0, np.maximum(1, num_rows - _ROWS + 1))
    ends = np.minimum(firsts + _ROWS, num_rows)
    places = np.array([len(text.prompt) - 1 for text in texts]) + firsts  # index of the first row in the text
    begins = np.maximum(0, places - _BEFORE)
    device = texts[0].embeddings.device
    rows = _Padded(int((ends - firsts).max()), len(texts), device)
    before = _Padded(int((places - begins).max()), len(texts), device)
    drawn = torch.zeros(len(texts), rows.width, dtype=torch.bool, device=device)
    for n, text in enumerate(texts):
        first, end, start = int(firsts[n]), int(ends[n]), text.prompt.start
        place, begin = int(places[n]) - start, int(begins[n]) - start  # among the kept positions
        after = torch.cat([text.prompt.embeddings, text.embeddings])  # embedding of the token after each position
        rows.put("embeddings", n, after[place : place + end - first])
        before.put("embeddings", n, after[begin:place])
        for layer in layers:
            states = text.feature(layer)
            rows.put(layer, n, states[place : place + end - first])
            before.put(layer, n, states[begin:place])
        # The token at row r is drawn token r - 1.
        rows.put("drawn_from", n, text.drawn_from[max(0, first - 1) : end - 1], int(first == 0))
        drawn[n, int(first == 0) : end - first] = True
    known = torch.arange(before.width, device=device)[None] < torch.from_numpy(places - begins).to(device)[:, None]
    return Batch(
        rows.stretch(layers, places),
        rows.parts["drawn_from"],
        drawn,
        before.stretch(layers, begins) if before.width else None,
        known,
    )


class _Padded:
    """Float32 tensors `[batch, width, hidden]` by name, zero-padded."""

    def __init__(self, width: int, batch: int, device: torch.device) -> None:
        self.width, self._batch, self._device = width, batch, device
        self.parts: dict[str | int, torch.Tensor] = {}

    def put(self, name: str | int, row: int, values: torch.Tensor, at: int = 0) -> None:
        if name not in self.parts:
            shape = self._batch, self.width, values.shape[1]
            self.parts[name] = torch.zeros(shape, dtype=torch.float32, device=self._device)
        self.parts[name][row, at : at + len(values)] = values

    def stretch(self, layers: Sequence[int], starts: np.ndarray) -> Stretch:
        features = {layer: self.parts[layer] for layer in layers}
        return Stretch(self.parts["embeddings"], features, torch.from_numpy(starts).to(self._device))
