"""Logs the states of one call's texts as verification hands them over; the head learns from them after the call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from atlas_rl.core import Prompts, Sequences, Verified
from atlas_rl.policy.upload import uploaded
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.drawn_rows import committed_places
from atlas_rl.speculators.eagle3_adaptive.texts import PromptStates, Text
from atlas_rl.speculators.learning import every_other

_LARGEST_HALF = 65504.0  # residual streams of some families exceed it


@dataclass(frozen=True, slots=True)
class _Entry:
    """Committed tokens of one step: int64 `[n]` requests and positions, and states `[n, hidden]`."""

    requests: np.ndarray
    positions: np.ndarray
    embeddings: torch.Tensor
    features: dict[int, torch.Tensor]
    drawn_from: torch.Tensor

    def of(self, kept: np.ndarray) -> _Entry:
        """The selected tokens only: bool `[n]`."""
        index = torch.from_numpy(np.flatnonzero(kept)).to(self.drawn_from.device)
        features = {layer: states[index] for layer, states in self.features.items()}
        return _Entry(
            self.requests[kept], self.positions[kept], self.embeddings[index], features, self.drawn_from[index]
        )


class CallLog:
    """Log of one call; see the module docstring.

    Args:
        sequences: All requests of the call.
        layers: Decoder layers that the head reads.
        max_tokens: Most positions kept: drawn tokens, and kept positions of each distinct prompt. A longer call is
            sampled: every n-th request that comes.
    """

    def __init__(self, sequences: Sequences, layers: tuple[int, ...], max_tokens: int) -> None:
        self.sequences = sequences
        self._layers, self._max_tokens = layers, max_tokens
        self._prompts: dict[int, PromptStates] = {}
        self._entries: list[_Entry] = []
        self._kept = np.zeros(
            len(sequences.lengths), bool
        )  # requests whose prompt is known and whose tokens are logged
        self._stride, self._num_started = 1, 0  # every n-th of the requests that have come is kept
        self._num_logged, self._num_prompt_rows = 0, 0
        self._full = False  # whether nothing is added any more

    def start(self, prompts: Prompts, policy: PolicyView) -> None:
        """Keep the states of prompts. Requests whose prompt the engine did not run are not used for learning."""
        for group, first in zip(prompts.groups, prompts.hidden.starts.tolist(), strict=True):
            order = self._num_started + np.arange(len(group))
            self._num_started += len(group)
            group = group[order % self._stride == 0]
            if self._full or not len(group):
                continue
            tokens = self.sequences.token_ids[group[0], : self.sequences.prompt_lengths[group[0]]].astype(np.int64)
            start, end = PromptStates.start_of(len(tokens)), first + len(tokens)
            features = {n: _half(prompts.hidden.layers[n][first + start : end]) for n in self._layers}
            states = PromptStates(start, _embedded(tokens[start + 1 :], policy), features)
            self._prompts |= dict.fromkeys(group.tolist(), states)
            self._kept[group] = True
            self._num_prompt_rows += states.num_kept
            self._fit()

    def observe(self, verified: Verified, lengths: np.ndarray, policy: PolicyView) -> None:
        """Log committed tokens.

        Args:
            verified: Committed tokens.
            lengths: int64 `[batch]`, tokens of each request's text, these included.
            policy: Provides token embeddings.
        """
        if not self._kept[verified.requests].any():
            return
        row, offset, places = committed_places(verified.hidden.starts, verified.num_committed)
        kept = self._kept[verified.requests[row]]
        row, offset, places = row[kept], offset[kept], places[kept]
        taken = uploaded(places, policy.device)
        hidden, tokens = verified.hidden, verified.token_ids[row, offset]
        entry = _Entry(
            verified.requests[row],
            (lengths - verified.num_committed)[row] + offset,
            _embedded(tokens, policy),
            {layer: _half(hidden.layers[layer][taken]) for layer in self._layers},
            _half(hidden.head_inputs[taken]),
        )
        self._entries.append(entry)
        self._num_logged += len(row)
        self._fit()

    def texts(self) -> list[Text]:
        """The logged states of each request."""
        if not self._num_logged:
            return []
        requests = np.concatenate([entry.requests for entry in self._entries])
        positions = np.concatenate([entry.positions for entry in self._entries])
        order = np.lexsort((positions, requests))
        index = torch.from_numpy(order).to(self._entries[0].drawn_from.device)
        embeddings, drawn_from = (
            torch.cat([getattr(entry, name) for entry in self._entries])[index] for name in ("embeddings", "drawn_from")
        )
        features = {n: torch.cat([entry.features[n] for entry in self._entries])[index] for n in self._layers}
        requests, positions = requests[order], positions[order]
        ends = np.flatnonzero(np.append(requests[1:] != requests[:-1], True)) + 1
        texts = []
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            request = int(requests[begin])
            first = int(self.sequences.prompt_lengths[request])
            if (positions[begin:end] == first + np.arange(end - begin)).all():
                # The first token was drawn from the prompt's last position, whose features are part of the prompt.
                own = {n: states[begin + 1 : end] for n, states in features.items()}
                texts.append(
                    Text(
                        self._prompts[request],
                        embeddings[begin:end],
                        own,
                        drawn_from[begin:end],
                        self.sequences.policy_version,
                    )
                )
        return texts

    def _fit(self) -> None:
        while self._num_logged + self._num_prompt_rows > self._max_tokens and not self._full:
            self._thin()

    def _thin(self) -> None:
        """Halve the logged requests. The last one keeps its log, but nothing is added any more."""
        if self._kept.sum() == 1:
            self._kept[:], self._full = False, True
            return
        self._stride *= 2
        self._kept = every_other(self._kept, [entry.requests for entry in self._entries])
        self._prompts = {request: states for request, states in self._prompts.items() if self._kept[request]}
        self._entries = [entry.of(self._kept[entry.requests]) for entry in self._entries]
        self._num_logged = sum(len(entry.requests) for entry in self._entries)
        self._num_prompt_rows = sum({id(states): states.num_kept for states in self._prompts.values()}.values())


def _half(states: torch.Tensor) -> torch.Tensor:
    return states.detach().float().clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16)


def _embedded(tokens: np.ndarray, policy: PolicyView) -> torch.Tensor:
    with torch.no_grad():
        return _half(policy.embed(uploaded(tokens, policy.device)))
