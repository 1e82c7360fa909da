"""Keeps requests that come, move between rows, pause and go as rows of the `Sequences` that drafters know.

vLLM has no generation calls, only requests. An *epoch* stands for one: with an engine of ours it is the call, whose
sequences the engine hands over; on a server it is a span of traffic, which ends when its rows are used up or when nothing
runs and enough has been seen to learn from. Requests that still run then move into the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atlas_rl.core import SamplingParams, Sequences, prompt_key
from atlas_rl.policy.base import roomy

_LEARN_FROM = 32  # finished requests of a server that are worth ending an epoch for


@dataclass(slots=True)
class Arrival:
    """A request, when its prompt is complete.

    Attributes:
        name: The engine's name of it.
        num_prompt_tokens: Tokens of its prompt.
        sampling: How it is sampled; `max_new_tokens` is what it may still need.
        noise_key: uint64.
        request: Its index in the sequences of the call; None where nobody announced a call.
    """

    name: str
    num_prompt_tokens: int
    sampling: SamplingParams
    noise_key: int
    request: int | None


class RequestTable:
    """Maps the engine's requests to rows of `sequences`.

    Args:
        num_rows: Requests of an epoch that nobody announced.
        max_length: Most tokens of a request, prompt included.
        vocab_size: The policy's vocabulary.
    """

    def __init__(self, num_rows: int, max_length: int, vocab_size: int) -> None:
        self.sequences: Sequences | None = None
        self.max_lengths = np.zeros(0, np.int64)
        self.announced = False
        self.request_of: dict[str, int] = {}
        self._num_rows, self._max_length, self._vocab_size = num_rows, max_length, vocab_size
        self._num_used = 0

    def announce(self, sequences: Sequences, max_lengths: np.ndarray) -> None:
        """A call begins. Its requests name their own rows; each ends at `max_lengths` (int64 `[num_requests]`) tokens."""
        self.sequences, self.max_lengths, self.announced = sequences, max_lengths, True
        self.request_of = {}

    def close(self) -> None:
        """The call is over; whatever comes next was announced by nobody."""
        self.sequences, self.announced, self.request_of, self._num_used = None, False, {}, 0

    @property
    def current(self) -> Sequences:
        """The sequences of the call or epoch, which there is while requests are followed."""
        assert self.sequences is not None, "no call was announced, no epoch begun"
        return self.sequences

    def admits(self, sampling: SamplingParams) -> bool:
        """Whether a request that nobody announced gets a row."""
        return not self.announced and self.belongs(sampling) and self.has_room

    def belongs(self, sampling: SamplingParams) -> bool:
        """Whether a request can join the epoch: drafts are drawn for one way of sampling."""
        return self.sequences is not None and _kind(sampling) == _kind(self.sequences.sampling)

    @property
    def has_room(self) -> bool:
        """Whether another request that nobody announced gets a row."""
        return self._num_used < self._num_rows

    def is_over(self, sampling: SamplingParams) -> bool:
        """Whether a new request should begin another epoch."""
        if self.announced:
            return False
        if self.sequences is None:
            return True
        if not self.has_room:
            return len(self.request_of) <= self._num_rows // 2  # those that run need rows in the next one
        return not self.request_of and (self._num_used >= _LEARN_FROM or not self.belongs(sampling))

    def open(self, sampling: SamplingParams, policy_version: int) -> None:
        """Begin an epoch of unannounced requests; those that run move into it."""
        rows = self._num_rows
        old, running = self.sequences, dict(self.request_of)
        self.sequences = Sequences(
            token_ids=np.zeros((rows, roomy(0, self._max_length)), np.int32),
            lengths=np.zeros(rows, np.int64),
            prompt_lengths=np.zeros(rows, np.int64),
            prompt_keys=np.zeros(rows, np.int64),
            noise_keys=np.zeros(rows, np.uint64),
            sampling=sampling,
            vocab_size=self._vocab_size,
            policy_version=policy_version,
            max_length=self._max_length,
        )
        max_lengths, self.max_lengths = self.max_lengths, np.zeros(rows, np.int64)
        self.request_of, self._num_used = {}, 0
        for name, request in running.items():
            assert old is not None
            self._place(name, max_lengths[request], old.prompt_keys[request], old.noise_keys[request])
            target = self.request_of[name]
            length = int(old.lengths[request])
            self.sequences.reserve(length)
            self.sequences.token_ids[target, :length] = old.token_ids[request, :length]
            for field in ("lengths", "prompt_lengths"):
                getattr(self.sequences, field)[target] = getattr(old, field)[request]

    def enter(self, arrival: Arrival, tokens: np.ndarray) -> int:
        """Give a request its row, prompt in place: int32 `tokens [num_prompt_tokens]`. Returns the row."""
        if arrival.request is not None:
            self.request_of[arrival.name] = arrival.request
            return arrival.request
        max_length = min(arrival.num_prompt_tokens + arrival.sampling.max_new_tokens, self._max_length)
        self._place(arrival.name, max_length, prompt_key(tokens), arrival.noise_key)
        row = self.request_of[arrival.name]
        self.current.reserve(len(tokens))
        self.current.token_ids[row, : len(tokens)] = tokens
        self.current.lengths[row] = self.current.prompt_lengths[row] = len(tokens)
        return row

    def leave(self, name: str) -> None:
        """A request has ended."""
        del self.request_of[name]

    def _place(self, name: str, max_length: int, key: int, noise_key: int) -> None:
        row, self._num_used = self._num_used, self._num_used + 1
        self.request_of[name] = row
        self.max_lengths[row] = max_length
        self.current.prompt_keys[row], self.current.noise_keys[row] = key, noise_key


def _kind(sampling: SamplingParams) -> tuple[float, int, float, tuple[int, ...]]:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.eos_token_ids
