"""Compiled preparation of a network's draft: noise keys of its positions, ends of rows, initial states.

A draft of a few hundred microseconds leaves no time for dozens of numpy calls around it. The numpy form of every
function is in `tests/speculators/test_drawn_rows.py`.
"""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit

CONFIDENCE = (0.01, 0.99)
"""Bounds of a drafter's confidence."""


@cached_njit(nogil=True)
def positions_alike(keys, lengths, requests, depth):
    """Per-position inputs of a draft, one position after the other; the plain form is in the tests.

    Args:
        keys: uint64 `[batch]`, noise keys.
        lengths: int64 `[num_requests]`, committed tokens.
        requests: int64 `[batch]`.
        depth: Draft tokens of each request.

    Returns:
        int64 `[(2 + depth) * batch]`: rows, bits of the keys, then per draft token its index in the whole sequence.
    """
    batch = len(requests)
    numbers = np.empty((2 + depth) * batch, np.int64)
    for row in range(batch):
        numbers[row], numbers[batch + row] = row, np.int64(keys[row])
        for position in range(depth):
            numbers[(2 + position) * batch + row] = lengths[requests[row]] + position
    return numbers


@cached_njit(nogil=True)
def cut(drawn, sure, most, stops, unrunnable):
    """Cut every row of a draft after its first ending token; the plain form is in the tests.

    Args:
        drawn: int64 `[batch, depth]`, tokens.
        sure: float32 `[batch, depth]`, largest probabilities; clipped to `CONFIDENCE` in place.
        most: int64 `[batch]`, maximum length of each row.
        stops: int64 `[n]`, ending tokens.
        unrunnable: bool `[vocab]`, tokens that rows are cut after as well; empty if there are none.

    Returns:
        Tokens, confidences, int64 `[batch]` lengths, and whether no probability is NaN.
    """
    batch, depth = drawn.shape
    lengths = np.empty(batch, np.int64)
    finite = True
    for row in range(batch):
        length = depth
        for position in range(depth):
            token, confidence = drawn[row, position], sure[row, position]
            finite = finite and not np.isnan(confidence)
            sure[row, position] = min(max(confidence, np.float32(CONFIDENCE[0])), np.float32(CONFIDENCE[1]))
            last = len(unrunnable) > 0 and unrunnable[token]
            for stop in stops:
                last = last or token == stop
            if last:
                length = min(length, position + 1)
        lengths[row] = min(length, most[row])
    return drawn, sure, lengths, finite


@cached_njit(nogil=True)
def newest_indices(requests, lengths, texts, index_of):
    """First input of a reduced-vocabulary head: the index of every request's last token.

    Args:
        requests: int64 `[batch]`.
        lengths: int64 `[num_requests]`, committed tokens.
        texts: int32 `[num_requests, capacity]`.
        index_of: int64 `[vocab]`, index of every token in the reduced vocabulary.

    Returns:
        int64 `[batch]`.
    """
    found = np.empty(len(requests), np.int64)
    for row in range(len(requests)):
        found[row] = index_of[texts[requests[row], lengths[requests[row]] - 1]]
    return found


@cached_njit(nogil=True)
def newest_places(starts, num_committed, requests, lengths):
    """Places of the newest tokens' states in a forward, and the length of each request's text before it.

    Args:
        starts: int64 `[batch]`, each row's first place in the forward.
        num_committed: int64 `[batch]`, committed tokens of each row.
        requests: int64 `[batch]`.
        lengths: int64 `[num_requests]`, tokens after the forward.

    Returns:
        int64 `[2, batch]`: place of each row's last committed token, and its request. int64 `[batch]`: tokens before this
        forward.
    """
    batch = len(requests)
    places, begins = np.empty((2, batch), np.int64), np.empty(batch, np.int64)
    for row in range(batch):
        places[0, row], places[1, row] = starts[row] + num_committed[row] - 1, requests[row]
        begins[row] = lengths[requests[row]] - num_committed[row]
    return places, begins


@cached_njit(nogil=True)
def committed_places(starts, num_committed):
    """All committed tokens, row by row: int64 `[n]` rows, places in the row, and places in the forward.

    Args:
        starts: int64 `[batch]`, each row's first place in the forward.
        num_committed: int64 `[batch]`.
    """
    total = num_committed.sum()
    rows, offsets, places = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    at = 0
    for row in range(len(num_committed)):
        for offset in range(num_committed[row]):
            rows[at], offsets[at], places[at] = row, offset, starts[row] + offset
            at += 1
    return rows, offsets, places
