"""Follows the requests of one engine: which rows drafters know, what was seen of their prompts, and the noise of all."""

from __future__ import annotations

import numpy as np
import torch

from atlas_kernels.noise import mix64
from atlas_rl.core import Hidden, Prompts
from atlas_rl.vllm.internals import Forward, Request
from atlas_rl.vllm.prompt_states import PromptStates
from atlas_rl.vllm.request_fields import announced_as, sampling_of
from atlas_rl.vllm.request_table import Arrival, RequestTable


class RequestFollower:
    """Knows the requests of an engine by name.

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
        self.table = RequestTable(max(64, 2 * max_batch), max_length, vocab_size)
        self.prompt_states = PromptStates()
        self._seed, self._num_unseeded = seed, 0
        self._keys: dict[str, int] = {}

    def keys(self, requests: list[Request]) -> np.ndarray:
        """Noise keys uint64 `[rows]`: the call's, or of the request's seed, or of its turn, the same on every rank."""
        for request in requests:
            if request.name not in self._keys:
                self._keys[request.name] = self._key_of(request)
        return np.array([self._keys[request.name] for request in requests], np.uint64)

    def forget(self, name: str) -> int | None:
        """The engine has ended a request; its row where drafters know it, which they leave."""
        self._keys.pop(name, None)
        self.prompt_states.drop(name)
        row = self.table.request_of.get(name)
        if row is not None:
            self.table.leave(name)
        return row

    def read_prompts(self, forward: Forward) -> None:
        """Keep what a forward says of prompts that are not complete."""
        if not forward.layers:
            return
        for (begin, count, position), request in zip(forward.spans.tolist(), forward.batch.requests, strict=True):
            if request.name in self.table.request_of:
                continue
            end = min(count, request.num_prompt_tokens - position)
            if end > 0:
                pieces = {n: states[begin : begin + end] for n, states in forward.layers.items()}
                self.prompt_states.add(request.name, position, pieces)

    def newcomers(self, forward: Forward) -> list[int]:
        """Rows of the forward whose prompt is now complete; only these can be entered: drafters want all that follows."""
        batch, rows = forward.batch, []
        for row, (request, new) in enumerate(zip(batch.requests, forward.sampled, strict=True)):
            known = request.name in self.table.request_of
            if new and not known and batch.lengths[row] - len(new) == request.num_prompt_tokens:
                rows.append(row)
        return rows

    def arrival(self, forward: Forward, row: int) -> tuple[Arrival, np.ndarray]:
        """A newcomer, and its prompt int32 `[num_prompt_tokens]`."""
        request = forward.batch.requests[row]
        arrival = Arrival(
            name=request.name,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=sampling_of(request.params),
            noise_key=self._keys[request.name],
            request=self._announced(request),
        )
        return arrival, forward.batch.token_ids[row, : request.num_prompt_tokens]

    def prompts_of(self, forward: Forward, rows: list[int]) -> Prompts:
        """Hidden states of the newcomers' prompts, as far as they were seen."""
        groups, found = [], []
        for row in rows if forward.layers else ():
            request = forward.batch.requests[row]
            states = self.prompt_states.take(request.name, forward.batch.token_ids[row, : request.num_prompt_tokens])
            index = self.table.request_of.get(request.name)
            if states is not None and index is not None:
                groups.append(np.array([index]))
                found.append(states)
        if not found:
            return Prompts()
        lengths = np.array([len(next(iter(states.values()))) for states in found], np.int64)
        layers = {n: torch.cat([states[n] for states in found]) for n in found[0]}
        return Prompts(groups, Hidden(np.cumsum(lengths) - lengths, torch.zeros(0, 0), layers))

    def followed(self, forward: Forward) -> np.ndarray:
        """Rows of the forward with new tokens whose requests drafters know: int64 `[n]`."""
        rows = []
        for row, (request, new) in enumerate(zip(forward.batch.requests, forward.sampled, strict=True)):
            index = self.table.request_of.get(request.name)
            if new and index is not None:
                expected = self.table.current.lengths[index] + len(new)
                assert expected == forward.batch.lengths[row], "every committed token passes here"
                rows.append(row)
        return np.array(rows, np.int64)

    def requests_of(self, forward: Forward, rows: np.ndarray) -> np.ndarray:
        """Rows of `Sequences`, int64 `[n]`, of followed rows of the forward."""
        return np.array([self.table.request_of[forward.batch.requests[row].name] for row in rows], np.int64)

    def _key_of(self, request: Request) -> int:
        index, seed = self._announced(request), request.params.seed
        if index is not None:
            return int(self.table.current.noise_keys[index])
        if seed is None:
            self._num_unseeded += 1
            return mix64(mix64(self._seed) ^ self._num_unseeded)
        return mix64(mix64(seed) ^ ~0 & 0xFFFFFFFFFFFFFFFF)

    def _announced(self, request: Request) -> int | None:
        """Index of a request in the sequences of the call that runs; None where that call did not announce it."""
        table = self.table
        return announced_as(request.params, table.ticket, len(table.max_lengths))
