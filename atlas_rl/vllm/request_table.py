"""Maps requests that arrive, move between rows, pause and end to fixed rows of the `Sequences` that drafters know.

vLLM has no generation calls, only requests. An *epoch* takes the place of a call. With our own engine it is the call,
and the engine passes its sequences. On a server it is a span of traffic, which ends when its rows are used up, or when
no request runs and enough have finished. Requests that still run then move into the next epoch.

Requests of a server sample in several *ways* (temperature, ending tokens, ...). All of them share one `Sequences`,
whose `sampling` is that of the requests for which a drafter is being asked.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from atlas_rl.core import SamplingParams, Sequences, prompt_key
from atlas_rl.decode.commit import NOBODY_WANTS
from atlas_rl.decode.settling import Texts
from atlas_rl.policy.base import roomy

_WORTH_AN_EPOCH = 32  # finished requests that end a server's epoch when no request runs
_NOBODY = np.zeros(0, np.int64)
_NO_TEXTS = Texts(np.zeros((0, 0), np.int32), _NOBODY, _NOBODY, _NOBODY, NOBODY_WANTS)
_NO_STOPS = np.zeros((1, 0), np.int64)
_NO_TOKEN = -1


@dataclass(slots=True)
class Arrival:
    """A request whose prompt has become complete.

    Attributes:
        name: The engine's name of the request.
        num_prompt_tokens: Tokens of its prompt.
        sampling: Its sampling parameters; `max_new_tokens` is what it has left. None if drafters do not support them.
        noise_key: uint64.
        request: Its index in the sequences of the call; None outside an announced call.
    """

    name: str
    num_prompt_tokens: int
    sampling: SamplingParams | None
    noise_key: int
    request: int | None


class RequestTable:
    """Maps the engine's requests to rows of `sequences`.

    Args:
        num_rows: Rows of an epoch of unannounced requests.
        max_length: Most tokens of a request, prompt included.
        vocab_size: The policy's vocabulary.

    Attributes:
        num_rows: See the argument. A change counts from the next epoch on.
        ticket: Ticket of the running call; None if no call was announced.
        request_of: Row of every running request, by the engine's name of it.
    """

    def __init__(self, num_rows: int, max_length: int, vocab_size: int) -> None:
        self.sequences: Sequences | None = None
        self.max_lengths = np.zeros(0, np.int64)
        self.ticket: int | None = None
        self.request_of: dict[str, int] = {}
        self.num_rows, self._max_length, self._vocab_size = num_rows, max_length, vocab_size
        self._num_used = 0
        self._tickets = itertools.count()
        self._ways: list[SamplingParams] = []
        self._way_of = np.zeros(0, np.int64)  # index in `_ways` of every row
        self._stops = np.zeros((0, 0), np.int64)  # ending tokens of each way

    @property
    def announced(self) -> bool:
        """Whether a call of ours is running."""
        return self.ticket is not None

    def announce(self, sequences: Sequences, max_lengths: np.ndarray) -> int:
        """Begin a call; each request ends at `max_lengths` (int64 `[num_requests]`) tokens.

        Returns:
            The call's ticket. Its requests carry the ticket and their rows.
        """
        self.sequences, self.max_lengths, self.ticket = sequences, max_lengths, next(self._tickets)
        self.request_of = {}
        self._ways, self._way_of = [sequences.sampling], np.zeros(len(max_lengths), np.int64)
        self._stops = _table_of(self._ways)
        return self.ticket

    def close(self) -> None:
        """End the call, or an epoch that is no longer reliable; later requests are unannounced."""
        self.sequences, self.ticket, self.request_of, self._num_used = None, None, {}, 0

    @property
    def current(self) -> Sequences:
        """The sequences of the call or epoch; exists while requests are followed."""
        assert self.sequences is not None, "no call was announced, no epoch begun"
        return self.sequences

    @property
    def has_room(self) -> bool:
        """Whether another unannounced request can get a row."""
        return self._num_used < len(self.max_lengths)

    def is_over(self) -> bool:
        """Whether a new request should begin another epoch."""
        if self.announced:
            return False
        if self.sequences is None:
            return True
        if not self.has_room:
            return len(self.request_of) <= self.num_rows // 2  # running requests need rows in the next epoch
        return not self.request_of and self._num_used >= _WORTH_AN_EPOCH

    def open(self, sampling: SamplingParams, policy_version: int) -> None:
        """Begin an epoch of unannounced requests; running ones move into it."""
        rows = self.num_rows
        old, running, ways, way_of = self.sequences, dict(self.request_of), self._ways, self._way_of
        self.sequences = Sequences(
            token_ids=np.zeros((rows, roomy(0, self._max_length)), np.int32),
            lengths=np.zeros(rows, np.int64),
            prompt_lengths=np.zeros(rows, np.int64),
            prompt_keys=np.zeros(rows, np.int64),
            noise_keys=np.zeros(rows, np.uint64),
            sampling=replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self._max_length)),
            vocab_size=self._vocab_size,
            policy_version=policy_version,
            max_length=self._max_length,
        )
        max_lengths, self.max_lengths = self.max_lengths, np.zeros(rows, np.int64)
        self._ways, self._way_of, self._stops = [], np.zeros(rows, np.int64), np.zeros((0, 0), np.int64)
        self.request_of, self._num_used = {}, 0
        for name, request in running.items():
            assert old is not None
            way = ways[way_of[request]]
            target = self._place(name, max_lengths[request], old.prompt_keys[request], old.noise_keys[request], way)
            length = int(old.lengths[request])
            self.sequences.reserve(length)
            self.sequences.token_ids[target, :length] = old.token_ids[request, :length]
            for field in ("lengths", "prompt_lengths"):
                getattr(self.sequences, field)[target] = getattr(old, field)[request]

    def enter(self, arrival: Arrival, tokens: np.ndarray) -> int | None:
        """Give a request its row and prompt, int32 `tokens [num_prompt_tokens]`; None if there is no row."""
        if arrival.request is not None:
            self.request_of[arrival.name] = arrival.request
            return arrival.request
        if self.announced or self.sequences is None or arrival.sampling is None or not self.has_room:
            return None
        max_length = min(arrival.num_prompt_tokens + arrival.sampling.max_new_tokens, self._max_length)
        way = self._drawing(arrival.sampling)
        row = self._place(arrival.name, max_length, prompt_key(tokens), arrival.noise_key, way)
        self.current.reserve(len(tokens))
        self.current.token_ids[row, : len(tokens)] = tokens
        self.current.lengths[row] = self.current.prompt_lengths[row] = len(tokens)
        return row

    def leave(self, name: str) -> None:
        """Remove a request that has ended."""
        del self.request_of[name]

    # ------------------------------------------------------------------------------------------------ ways of sampling

    def ways(self, requests: np.ndarray) -> list[tuple[SamplingParams, np.ndarray]]:
        """Sampling parameters of requests, int64 `[n]`: each distinct way, with int64 indices into `requests`."""
        if len(self._ways) == 1:
            return [(self._ways[0], np.arange(len(requests)))]
        of_each = self._way_of[requests]
        return [(self._ways[way], np.flatnonzero(of_each == way)) for way in np.unique(of_each)]

    @property
    def all_ways(self) -> tuple[SamplingParams, ...]:
        """Distinct sampling parameters of the call or epoch; empty before there is one."""
        return () if self.sequences is None else tuple(self._ways)

    @property
    def only_way(self) -> SamplingParams | None:
        """The common sampling parameters of all requests; None if they differ."""
        return self._ways[0] if len(self._ways) == 1 else None

    def texts(self) -> tuple[Texts, np.ndarray, np.ndarray]:
        """The texts that tokens are appended to; int64 `[ways, n]` ending tokens of each way; the way of every request."""
        sequences = self.sequences
        if sequences is None:
            return _NO_TEXTS, _NO_STOPS, self._way_of
        texts = Texts(sequences.token_ids, sequences.lengths, self.max_lengths, sequences.prompt_lengths, NOBODY_WANTS)
        if len(self._stops) != len(self._ways):
            self._stops = _table_of(self._ways)
        return texts, self._stops, self._way_of

    def sample_as(self, sampling: SamplingParams) -> None:
        """Show drafters these sampling parameters from now on."""
        self.current.sampling = sampling

    @property
    def commonest_way(self) -> SamplingParams:
        """The most frequent sampling parameters of the epoch."""
        if not self._ways:
            return self.current.sampling
        used = len(self._way_of) if self.announced else self._num_used
        return self._ways[int(np.bincount(self._way_of[:used], minlength=1).argmax())]

    def _place(self, name: str, max_length: int, key: int, noise_key: int, way: SamplingParams) -> int:
        row, self._num_used = self._num_used, self._num_used + 1
        self.request_of[name] = row
        self.max_lengths[row] = max_length
        self.current.prompt_keys[row], self.current.noise_keys[row] = key, noise_key
        if way not in self._ways:
            self._ways.append(way)
        self._way_of[row] = self._ways.index(way)
        return row

    def _drawing(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling` without the fields that do not affect how tokens are drawn."""
        return replace(sampling, max_new_tokens=self._max_length, seed=0)


def _table_of(ways: list[SamplingParams]) -> np.ndarray:
    """Tokens that end requests of each way: int64 `[ways, n]`, `_NO_TOKEN` where there are fewer."""
    stops = np.full((len(ways), max((len(way.eos_token_ids) for way in ways), default=0)), _NO_TOKEN, np.int64)
    for way, own in zip(ways, stops, strict=True):
        own[: len(way.eos_token_ids)] = way.eos_token_ids
    return stops
