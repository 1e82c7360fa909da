"""Decides which requests have a cache row: as many as fit into memory at the present lengths of the texts.

Requests wait for a row, first come, first served. Admission counts their present length and a margin, but not the
tokens that they may still generate. If texts outgrow memory during a call, the shortest are *paused*: they give up
their rows and wait at the head of the queue, with their tokens. When there is room again, their cache is recomputed
from those, all at once. Drafters are not told: to them, a paused request is one that is not asked about for a while.

The longest always go on, and one request is run whatever memory there is. So every call ends; if even one request gets
no memory, it ends with a `MemoryError` that says so.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.core import Sequences
from atlas_rl.policy.base import PolicyRunner, retire

LOOKAHEAD = 17  # tokens of a step that room is made for before it; drafts may use more if rows have it
_MARGIN = 32  # tokens of room beyond an admitted text


class CacheRoom:
    """Hands out the rows of the attention cache.

    Args:
        runner: Its session must stay open while this is used.
        sequences: The requests of the call.
        max_lengths: int64 `[num_requests]`, prompt plus completion tokens at which a request ends.
        max_rows: Most requests decoded together.

    Attributes:
        waiting: Requests without a row, in order.
        num_paused: Number of times that a request had to give up its row.
        most_rows: Most requests that had rows at once.
    """

    def __init__(self, runner: PolicyRunner, sequences: Sequences, max_lengths: np.ndarray, max_rows: int) -> None:
        self.waiting = deque(range(len(sequences.lengths)))
        self.num_paused, self.most_rows = 0, 0
        self._runner, self._sequences, self._max_lengths, self._max_rows = runner, sequences, max_lengths, max_rows
        self._fitting = max_rows  # rows that fit into memory, at the latest query
        self._most = max_rows  # rows to try, after a prefill ran out of memory
        self._failed_alone = False  # whether that was the prefill of one request, with nothing else running

    def wave(self, active: np.ndarray) -> np.ndarray:
        """Requests to admit now, in order: int64 `[n]`. Makes room for them after the rows of `active`."""
        if not self.waiting or not rows_to_fill(len(active), self._fitting):
            return np.zeros(0, np.int64)
        cells, besides = self._runner.cells_that_fit(), self._runner.state_cells
        longest = int(self._wanted(active).max(initial=0))
        wave: list[int] = []
        while self.waiting and len(active) + len(wave) < self._most:
            longer, num_rows = max(longest, int(self._wanted(self.waiting[0]))), len(active) + len(wave)
            if num_rows and (num_rows + 1) * (longer + besides) > cells:
                break
            longest = longer
            wave.append(self.waiting.popleft())
        self._fitting = min(self._most, max(1, cells // (longest + besides)))
        while wave:
            try:
                self._runner.reserve(len(active) + len(wave), longest)
                break
            except MemoryError:
                if len(active) + len(wave) == 1:
                    raise
                kept = len(wave) // 2
                self.waiting.extendleft(reversed(wave[kept:]))
                wave = wave[:kept]
        return np.array(wave, np.int64)

    def admitted(self, num_rows: int) -> None:
        """A prefill succeeded, after which so many requests have rows."""
        self._most, self._failed_alone = self._max_rows, False
        self.most_rows = max(self.most_rows, num_rows)

    def take_back(self, wave: np.ndarray, active: np.ndarray) -> bool:
        """Return a wave whose prefill got no memory; half of it is tried next. False if a single request gets none.

        A cache's memory is taken by its first forward, which `reserve` cannot do in advance. A single request gets two
        tries, because the second is made without a margin.
        """
        alone = len(active) + len(wave) == 1
        if alone and self._failed_alone:
            return False
        self._failed_alone = alone
        self.waiting.extendleft(reversed(wave.tolist()))
        self._most = self._fitting = max(1, len(active) + len(wave) // 2)
        return True

    def drafts(self, active: np.ndarray) -> np.ndarray:
        """Most draft tokens that active requests can use, int64 `[n]`: the target adds one token itself.

        The limit is fixed before anything is drafted. If a row could grow for a draft, the drawn tokens would decide
        how many of them are verified, which would bias rejection sampling.
        """
        room: np.ndarray = room_of(active, self._sequences.lengths, self._max_lengths, self._runner.held_cells)
        return room

    def go_on(self, active: np.ndarray) -> np.ndarray:
        """Make room for the next step of active requests, by row. Returns the requests that fit, by their new rows."""
        needed = needed_by(active, self._sequences.lengths, self._max_lengths)
        if needed <= self._runner.held_cells:
            return active
        fitting = max(1, self._runner.cells_that_fit() // (needed + self._runner.state_cells))
        while True:
            self._fitting = min(self._max_rows, fitting)
            if len(active) > fitting:
                active = self._pause(active, len(active) - fitting)
            try:
                self._runner.reserve(len(active), needed)
            except MemoryError:
                longest = int(self._sequences.lengths[active].max())
                if len(active) > 1:
                    fitting = len(active) // 2
                elif needed > longest:
                    needed = longest  # one token at a time
                else:
                    raise
            else:
                return active

    def _wanted(self, requests: np.ndarray | int) -> np.ndarray:
        """Tokens to reserve for requests when they are admitted."""
        wanted: np.ndarray = np.minimum(self._sequences.lengths[requests] + _MARGIN, self._max_lengths[requests])
        return wanted

    def _pause(self, active: np.ndarray, number: int) -> np.ndarray:
        """Take the rows of the shortest requests; among equals, of the latest."""
        lengths = self._sequences.lengths
        order = np.lexsort((-active, lengths[active]))
        paused = np.zeros(len(active), bool)
        paused[order[:number]] = True
        self.waiting.extendleft(sorted(active[paused].tolist(), reverse=True))
        self.num_paused += number
        return retire(active, paused, lambda request: int(lengths[request]) - 1, self._runner)


def rows_to_fill(num_active: int, num_rows: int) -> int:
    """Free rows that waiting requests get now, of `num_rows`.

    A prefill delays all requests: it waits until a quarter of the rows is free, unless nothing else is running.
    """
    free = num_rows - num_active
    return free if not num_active or free >= max(1, num_rows // 4) else 0


@cached_njit(nogil=True)
def room_of(active: np.ndarray, lengths: np.ndarray, max_lengths: np.ndarray, held_cells: int) -> np.ndarray:
    """Draft tokens that each active request can use: up to one before its limit, and within the cells of its row.

    Args:
        active: int64 `[batch]`.
        lengths: int64 `[num_requests]`, tokens by now.
        max_lengths: int64 `[num_requests]`.
        held_cells: Cells of every row.

    Returns:
        int64 `[batch]`: `min(max_lengths[active] - 1, held_cells) - lengths[active]`.
    """
    room = np.empty(len(active), np.int64)
    for row in range(len(active)):
        room[row] = min(max_lengths[active[row]] - 1, held_cells) - lengths[active[row]]
    return room


@cached_njit(nogil=True)
def rest_of(
    active: np.ndarray, lengths: np.ndarray, prompt_lengths: np.ndarray, max_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each active request has generated, and the most that may still come.

    Args:
        active: int64 `[batch]`.
        lengths: int64 `[num_requests]`, tokens by now.
        prompt_lengths: int64 `[num_requests]`.
        max_lengths: int64 `[num_requests]`.

    Returns:
        int64 `[batch]` twice.
    """
    generated, left = np.empty(len(active), np.int64), np.empty(len(active), np.int64)
    for row in range(len(active)):
        request = active[row]
        generated[row], left[row] = lengths[request] - prompt_lengths[request], max_lengths[request] - lengths[request]
    return generated, left


@cached_njit(nogil=True)
def needed_by(active: np.ndarray, lengths: np.ndarray, max_lengths: np.ndarray) -> int:
    """Cells that the next step may write: the longest active text plus `LOOKAHEAD`, within the largest limit."""
    longest, furthest = 0, 0
    for row in range(len(active)):
        longest, furthest = max(longest, lengths[active[row]]), max(furthest, max_lengths[active[row]])
    return min(longest + LOOKAHEAD, furthest)
