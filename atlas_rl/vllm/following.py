"""Follows the requests of one engine: their rows, the seen parts of their prompts, and their noise."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import torch

from atlas_kernels.noise import mix64
from atlas_rl.core import Hidden, Prompts
from atlas_rl.vllm.internals import Forward, ForwardBatch
from atlas_rl.vllm.prompt_states import PromptPieces
from atlas_rl.vllm.request_fields import announced_as, sampling_of
from atlas_rl.vllm.request_table import Arrival, RequestTable

_LEAST_ROWS, _LONG_BATCHES, _LONG_ROWS = 64, 8, 2048


def rows_of_epoch(max_batch: int, *, long: bool = False) -> int:
    """Rows of an epoch of unannounced requests on an engine that runs `max_batch` together.

    Two batches: running requests move into the next epoch, where they may take one half of the rows. A `long` one has rows
    for eight batches, but no more than 2,048 for that, because every row can become as long as the context.
    """
    rows = max(_LEAST_ROWS, 2 * max_batch)
    return max(rows, min(_LONG_BATCHES * max_batch, _LONG_ROWS)) if long else rows


class RequestFollower:
    """Finds an engine's requests by name.

    Args:
        max_length: Most tokens of a request, prompt included.
        max_batch: Most requests that run together.
        vocab_size: The policy's vocabulary.
        seed: Seed of the noise of requests that bring no seed of their own.

    Attributes:
        table: Requests that drafters know, as rows of `Sequences`.
        prompt_states: Hidden states of prompts, for drafters that need layers.
    """

    def __init__(self, max_length: int, max_batch: int, vocab_size: int, seed: int) -> None:
        self.table = RequestTable(rows_of_epoch(max_batch), max_length, vocab_size)
        self._max_batch = max_batch
        self.prompt_states = PromptPieces()
        self._seed, self._num_unseeded = seed, 0
        self._keys: dict[str, int] = {}

    def lengthen_epochs(self) -> None:
        """Let epochs of unannounced requests last longer, from the next one on.

        For a static head: it no longer knows the prompts of requests that move into the next epoch. Drafters that learn do
        so at the end of an epoch, hence less often.
        """
        self.table.num_rows = rows_of_epoch(self._max_batch, long=True)

    def keys(self, batch: ForwardBatch) -> np.ndarray:
        """Noise keys uint64 `[rows]` from the call, the request's seed, or its order of arrival; equal on every rank."""
        keys = list(map(self._keys.get, batch.names))
        if None in keys:
            for name in batch.names:
                if name not in self._keys:
                    self._keys[name] = self._key_of(batch.params_of(name))
            keys = list(map(self._keys.get, batch.names))
        return np.array(keys, np.uint64)

    def rows_of(self, batch: ForwardBatch) -> np.ndarray:
        """Row of `Sequences` for every row of a batch: int64 `[rows]`, -1 if drafters do not know the request."""
        return np.fromiter(map(self.table.request_of.get, batch.names, repeat(-1)), np.int64, len(batch.names))

    def forget(self, name: str) -> int | None:
        """Remove a request that the engine has ended; returns its row, or None if drafters do not know it."""
        self._keys.pop(name, None)
        self.prompt_states.drop(name)
        row = self.table.request_of.get(name)
        if row is not None:
            self.table.leave(name)
        return row

    def read_prompts(self, forward: Forward, known: np.ndarray) -> None:
        """Keep a forward's hidden states of incomplete prompts; `known` as in `rows_of`."""
        batch = forward.batch
        for row in np.flatnonzero(known < 0).tolist() if forward.layers else ():
            begin, count, position = forward.spans[row].tolist()
            end = min(count, int(batch.num_prompt_tokens[row]) - position)
            if end > 0:
                pieces = {n: states[begin : begin + end] for n, states in forward.layers.items()}
                self.prompt_states.add(batch.names[row], position, pieces)

    def newcomers(self, forward: Forward, known: np.ndarray) -> list[int]:
        """Rows whose prompt has just become complete. Only these can be entered: drafters need every token that follows."""
        complete = forward.batch.lengths - forward.num_new == forward.batch.num_prompt_tokens
        return ((forward.num_new > 0) & (known < 0) & complete).nonzero()[0].tolist()

    def arrival(self, forward: Forward, row: int) -> tuple[Arrival, np.ndarray]:
        """A newcomer, and its prompt int32 `[num_prompt_tokens]`."""
        name, num_prompt_tokens = forward.batch.names[row], int(forward.batch.num_prompt_tokens[row])
        params = forward.batch.params_of(name)
        arrival = Arrival(
            name=name,
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling_of(params),
            noise_key=self._keys[name],
            request=self._announced(params),
        )
        return arrival, forward.batch.token_ids[row, :num_prompt_tokens]

    def prompts_of(self, forward: Forward, rows: list[int]) -> Prompts:
        """Hidden states of the newcomers' prompts, as far as they were seen."""
        groups, found = [], []
        for row in rows if forward.layers else ():
            name, length = forward.batch.names[row], forward.batch.num_prompt_tokens[row]
            states = self.prompt_states.take(name, forward.batch.token_ids[row, :length])
            index = self.table.request_of.get(name)
            if states is not None and index is not None:
                groups.append(np.array([index]))
                found.append(states)
        if not found:
            return Prompts()
        lengths = np.array([len(next(iter(states.values()))) for states in found], np.int64)
        layers = {n: torch.cat([states[n] for states in found]) for n in found[0]}
        return Prompts(groups, Hidden(np.cumsum(lengths) - lengths, Hidden.none().head_inputs, layers))

    def _key_of(self, params: Any) -> int:
        index, seed = self._announced(params), params.seed
        if index is not None:
            return int(self.table.current.noise_keys[index])
        if seed is None:
            self._num_unseeded += 1
            return mix64(mix64(self._seed) ^ self._num_unseeded)
        return mix64(mix64(seed) ^ ~0 & 0xFFFFFFFFFFFFFFFF)

    def _announced(self, params: Any) -> int | None:
        """Index of a request in the sequences of the running call; None if that call did not announce it."""
        table = self.table
        return announced_as(params, table.ticket, len(table.max_lengths))
