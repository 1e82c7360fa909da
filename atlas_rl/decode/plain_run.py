"""Estimates the cost of a call's decoding forwards without speculation, from the call's own measurements.

The tokens are the same without speculation, so the plain run is known exactly once the call has ended: a request of n
tokens takes part in n - 1 forwards. The number of forwards follows from the longest requests, not from the mean. Steps
with speculation cannot be scaled to it: a request that is lucky with its drafts ends early and leaves the batch, while
a plain batch stays together.

The cost of a plain forward is noted in every step: measured if the step had no drafts and ran nothing else, else
estimated by the controller. The controller estimates it only for batch sizes that it has measured.

A serving engine runs prompts in the forwards of requests that decode. Their share of such a mixed forward is its seconds
less those of the decoding requests alone. Prompts cost the same without speculation, so the shares are added.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

_NOTED_SHARE = 0.9  # share of plain forwards whose batch size must have been noted, for an estimate


def at_once(num_active: int, num_rows: int) -> int:
    """Rows that waiting requests get now: all that are free."""
    return num_rows - num_active


@dataclass(frozen=True, slots=True)
class PlainForwards:
    """Plain forwards of a call.

    Attributes:
        num_forwards: Their number; exact in process, unless memory ran short in the call.
        seconds: Their estimated cost, with that of prompts in mixed forwards; None if the cost of too few of their batch
            sizes is known.
    """

    num_forwards: int
    seconds: float | None


@dataclass(slots=True)
class _Mixed:
    """Mixed forwards: their number, their seconds, and the sum of the decoding requests' context tokens."""

    steps: int = 0
    seconds: float = 0.0
    context_tokens: int = 0


@dataclass(slots=True)
class PlainCosts:
    """Seconds of a plain forward by batch size, as noted during one call.

    Attributes:
        seconds: Total seconds by batch size.
        steps: Number of noted steps by batch size.
        mixed: Mixed forwards by the tokens that their decoding requests ran, drafts included.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    mixed: dict[int, _Mixed] = field(default_factory=dict)

    def note(self, batch: int, plain_s: float | None) -> None:
        """Note for a step of `batch` requests that a plain forward would cost `plain_s`; None if unknown."""
        if plain_s is not None:
            self.seconds[batch] = self.seconds.get(batch, 0.0) + plain_s
            self.steps[batch] = self.steps.get(batch, 0) + 1

    def note_mixed(self, num_tokens: int, context_tokens: int, seconds: float) -> None:
        """Note a forward that also ran prompts, beside `num_tokens` tokens of requests with these context tokens."""
        mixed = self.mixed.setdefault(num_tokens, _Mixed())
        mixed.steps += 1
        mixed.seconds += seconds
        mixed.context_tokens += context_tokens

    def run(
        self,
        plain: Mapping[int, int],
        forward_s: Callable[[int, int], float | None] = lambda tokens, context_tokens: None,
    ) -> PlainForwards:
        """Estimate the call without speculation.

        Args:
            plain: Its forwards by batch size (`plain_batches`).
            forward_s: Seconds of a forward over some tokens, of requests with some context tokens; None if unknown. Used
                for mixed forwards of more tokens than any noted batch size.
        """
        num_forwards = sum(plain.values())
        sizes = sorted(self.steps)
        if not num_forwards or not sizes:
            return PlainForwards(num_forwards, None if num_forwards else 0.0)
        # A size between two noted ones is interpolated; outside of them the cost is unknown.
        inside = {batch: count for batch, count in plain.items() if sizes[0] <= batch <= sizes[-1]}
        if sum(inside.values()) < _NOTED_SHARE * num_forwards:
            return PlainForwards(num_forwards, None)
        means = [self.seconds[size] / self.steps[size] for size in sizes]
        seconds = float(np.interp(list(plain), sizes, means) @ np.array(list(plain.values()), np.float64))
        for num_tokens, mixed in self.mixed.items():
            if num_tokens <= sizes[-1]:
                own_s: float | None = float(np.interp(num_tokens, sizes, means))
            else:
                own_s = forward_s(num_tokens, mixed.context_tokens // mixed.steps)
            if own_s is not None:  # else the prompts' share is unknown, and the estimate is too low
                seconds += max(0.0, mixed.seconds - mixed.steps * own_s)
        return PlainForwards(num_forwards, seconds)


def plain_batches(
    completion_lengths: np.ndarray, num_rows: int, rows_to_fill: Callable[[int, int], int] = at_once
) -> dict[int, int]:
    """How many forwards of each batch size plain decoding makes.

    Args:
        completion_lengths: int64 `[num_requests]`, tokens of each request in the order of admission; the first comes from
            its prompt's forward.
        num_rows: Most requests decoded together.
        rows_to_fill: Number of waiting requests to admit before a forward, given the active requests and `num_rows`; at
            least 1 if none is active.

    Returns:
        Forwards by batch size.
    """
    waiting = [max(int(length), 1) - 1 for length in completion_lengths][::-1]
    ends: list[int] = []  # of the active requests, in forwards since the beginning
    found: dict[int, int] = {}
    now = 0
    while waiting or ends:
        for _ in range(min(rows_to_fill(len(ends), num_rows), len(waiting))):
            if num_forwards := waiting.pop():
                heapq.heappush(ends, now + num_forwards)
        if not ends:
            continue
        # Requests that end with their first token leave rows to fill before the next forward but one.
        until = now + 1 if waiting and rows_to_fill(len(ends), num_rows) else ends[0]
        found[len(ends)] = found.get(len(ends), 0) + until - now
        now = until
        while ends and ends[0] == now:
            heapq.heappop(ends)
    return found
