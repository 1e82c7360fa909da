"""Passes over the rows of a forward, compiled.

A device is idle between two forwards. A pass takes about as long as one numpy call and replaces a dozen of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from atlas_kernels.jit_cache import cached_njit


class PlannedRows(NamedTuple):
    """The plan for a forward: int64 `[planned]` requests and draft tokens of each; empty if nothing was planned."""

    requests: np.ndarray
    lengths: np.ndarray


NO_PLAN = PlannedRows(np.zeros(0, np.int64), np.zeros(0, np.int64))


class RowOutcomes(NamedTuple):
    """Row by row, the outcome of a forward.

    Attributes:
        num_new: int64 `[rows]`, tokens just committed.
        num_drafted: int64 `[rows]`, draft tokens that were verified.
        starts: int64 `[rows]`, first entry in the hidden states.
        token_ids: int64 `[rows, width]`.
        entropies: float32 `[rows, width]`.
        max_probs: float32 `[rows, width]`.
    """

    num_new: np.ndarray
    num_drafted: np.ndarray
    starts: np.ndarray
    token_ids: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray


@cached_njit(nogil=True)
def followed(
    known: np.ndarray, num_new: np.ndarray, lengths: np.ndarray, num_prompt_tokens: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Rows with new tokens whose requests drafters know.

    Args:
        known: int64 `[rows]`, row of `Sequences`; -1 where drafters do not know the request.
        num_new: int64 `[rows]`, tokens just committed.
        lengths: int64 `[rows]`, number of committed tokens.
        num_prompt_tokens: int64 `[rows]`.
        before: int64 `[num_requests]`, lengths in `Sequences`.

    Returns:
        Rows and their requests, int64 `[n]`; the number of other rows whose prompt is complete now; and whether
        every committed token was seen here.
    """
    rows, requests = np.empty(len(known), np.int64), np.empty(len(known), np.int64)
    count, newcomers, whole = 0, 0, True
    for row in range(len(known)):
        if num_new[row] <= 0:
            continue
        request = known[row]
        if request >= 0:
            rows[count], requests[count] = row, request
            whole = whole and before[request] + num_new[row] == lengths[row]
            count += 1
        elif lengths[row] - num_new[row] == num_prompt_tokens[row]:
            newcomers += 1
    return rows[:count], requests[:count], newcomers, whole


@numba.njit
def _planned_first(requests: np.ndarray, planned: np.ndarray, num_requests: int) -> tuple[np.ndarray, np.ndarray]:
    """An order that begins with the planned requests, as planned, and keeps that of the others.

    Args:
        requests: int64 `[n]`.
        planned: int64 `[planned]`, requests.
        num_requests: Upper bound on both.

    Returns:
        Indices into `requests`, int64 `[n]`; and for the first of them, their places in the plan, int64 `[m]`.
    """
    count = len(requests)
    order, places = np.arange(count), np.arange(len(planned))
    same = count == len(planned)
    for i in range(count):
        same = same and requests[i] == planned[i]
    if same:
        return order, places
    where = np.full(num_requests, -1)
    for i in range(count):
        where[requests[i]] = i
    placed = 0
    for place in range(len(planned)):
        i = where[planned[place]]
        if i >= 0:
            order[placed], places[placed] = i, place
            where[planned[place]] = -1
            placed += 1
    rest = placed
    for i in range(count):
        if where[requests[i]] >= 0:
            order[rest] = i
            rest += 1
    return order, places[:placed]


@cached_njit(nogil=True)
def in_order(
    rows: np.ndarray,
    requests: np.ndarray,
    plan: PlannedRows,
    num_requests: int,
    only_planned: bool,
    outcome: RowOutcomes,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """The outcome of a forward for some rows, planned requests first and in their planned order.

    Args:
        rows: int64 `[n]`.
        requests: int64 `[n]`, of these rows.
        plan: A `PlannedRows`.
        num_requests: Upper bound on the requests.
        only_planned: Whether drafts of requests without a plan count as none.
        outcome: A `RowOutcomes`, of all rows.

    Returns:
        Rows, int64 `[n]`, their requests, the first ones' places in the plan, and the rows' outcome, as wide as needed.
    """
    order, places = _planned_first(requests, plan.requests, num_requests)
    count, width = len(rows), 0
    for i in range(count):
        width = max(width, outcome.num_new[rows[i]])
    new, drafted, starts = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    tokens = np.zeros((count, width), np.int64)
    entropies, max_probs = np.zeros((count, width), np.float32), np.zeros((count, width), np.float32)
    own_rows, own_requests = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        row = rows[order[i]]
        own_rows[i], own_requests[i] = row, requests[order[i]]
        new[i], drafted[i], starts[i] = outcome.num_new[row], outcome.num_drafted[row], outcome.starts[row]
        if i < len(places):
            drafted[i] = min(drafted[i], plan.lengths[places[i]])
        elif only_planned:
            drafted[i] = 0
        for j in range(new[i]):
            tokens[i, j] = outcome.token_ids[row, j]
            entropies[i, j] = outcome.entropies[row, j]
            max_probs[i, j] = outcome.max_probs[row, j]
    return own_rows, own_requests, places, (new, drafted, starts, tokens, entropies, max_probs)


@cached_njit(nogil=True)
def going_on(
    requests: np.ndarray,
    rows: np.ndarray,
    finished: np.ndarray,
    lengths: np.ndarray,
    max_lengths: np.ndarray,
    most: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Requests that have not ended.

    Args:
        requests: int64 `[n]`.
        rows: int64 `[n]`, rows of the forward.
        finished: bool `[n]`.
        lengths: int64 `[num_requests]`.
        max_lengths: int64 `[num_requests]`, tokens at which a request ends.
        most: Most draft tokens of a request.

    Returns:
        The requests, their rows and the draft tokens that each can still use: int64 `[m]` each.
    """
    own, own_rows = np.empty(len(requests), np.int64), np.empty(len(requests), np.int64)
    room = np.empty(len(requests), np.int64)
    count = 0
    for i in range(len(requests)):
        if not finished[i]:
            request = requests[i]
            own[count], own_rows[count] = request, rows[i]
            room[count] = min(max_lengths[request] - lengths[request] - 1, most)
            count += 1
    return own[:count], own_rows[:count], room[:count]
