"""The passes over the rows of a forward (`atlas_rl/vllm/row_passes.py`) in plain numpy."""

from __future__ import annotations

import numpy as np

from atlas_rl.vllm.row_passes import PlannedRows, RowOutcomes


def followed(
    known: np.ndarray, num_new: np.ndarray, lengths: np.ndarray, num_prompt_tokens: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """As `row_passes.followed`."""
    (rows,) = ((num_new > 0) & (known >= 0)).nonzero()
    requests = known[rows]
    newcomers = (num_new > 0) & (known < 0) & (lengths - num_new == num_prompt_tokens)
    whole = (before[requests] + num_new[rows] == lengths[rows]).all()
    return rows, requests, int(newcomers.sum()), bool(whole)


def in_order(
    rows: np.ndarray,
    requests: np.ndarray,
    plan: PlannedRows,
    num_requests: int,
    only_planned: bool,
    outcome: RowOutcomes,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """As `row_passes.in_order`."""
    where = np.full(num_requests, -1)
    where[requests] = np.arange(len(requests))
    first = where[plan.requests]
    places = np.flatnonzero(first >= 0)
    rest = np.ones(len(requests), bool)
    rest[first[places]] = False
    order = np.append(first[places], np.flatnonzero(rest))
    rows = rows[order]
    new, drafted = outcome.num_new[rows], outcome.num_drafted[rows]
    drafted[: len(places)] = np.minimum(drafted[: len(places)], plan.lengths[places])
    if only_planned:
        drafted[len(places) :] = 0
    width = new.max(initial=0)
    kept = np.arange(width)[None] < new[:, None]
    figures = (outcome.token_ids, outcome.entropies, outcome.max_probs)
    wide = tuple(np.where(kept, each[rows, :width], each.dtype.type(0)) for each in figures)
    return rows, requests[order], places, (new, drafted, outcome.starts[rows], *wide)


def going_on(
    requests: np.ndarray,
    rows: np.ndarray,
    finished: np.ndarray,
    lengths: np.ndarray,
    max_lengths: np.ndarray,
    most: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `row_passes.going_on`."""
    own = requests[~finished]
    return own, rows[~finished], np.minimum(max_lengths[own] - lengths[own] - 1, most)
