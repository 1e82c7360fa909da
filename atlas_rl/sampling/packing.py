"""Compiled conversion between rows of a batch and packed positions, before and after a forward.

A request has `draft_lengths + 1` packed positions, request by request: its last committed token, then its drafts. The numpy
forms are in `tests/sampling/test_packing.py`.
"""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit


@cached_njit(nogil=True)
def packed_tokens(requests, texts, lengths, drafts, draft_lengths):
    """The tokens that a forward runs.

    Args:
        requests: int64 `[batch]`.
        texts: int32 `[num_requests, capacity]`.
        lengths: int64 `[num_requests]`, committed tokens.
        drafts: int64 `[batch, draft_len]`.
        draft_lengths: int64 `[batch]`.

    Returns:
        int64 `[n]` tokens; int64 `[batch]` three times: index of each row's first token among them, its position in its
        sequence, and the row's number of tokens.
    """
    batch = len(requests)
    first, starts, counts = np.empty(batch, np.int64), np.empty(batch, np.int64), np.empty(batch, np.int64)
    total = 0
    for row in range(batch):
        first[row], starts[row], counts[row] = total, lengths[requests[row]] - 1, draft_lengths[row] + 1
        total += counts[row]
    tokens = np.empty(total, np.int64)
    for row in range(batch):
        tokens[first[row]] = texts[requests[row], starts[row]]
        for depth in range(draft_lengths[row]):
            tokens[first[row] + 1 + depth] = drafts[row, depth]
    return tokens, first, starts, counts


@cached_njit(nogil=True)
def packed_positions(requests, lengths, noise_keys, drafts, draft_lengths):
    """The positions that verification decides.

    Args:
        requests: int64 `[batch]`.
        lengths: int64 `[num_requests]`, committed tokens.
        noise_keys: uint64 `[num_requests]`.
        drafts: int64 `[batch, draft_len]`.
        draft_lengths: int64 `[batch]`.

    Returns:
        int64 `[n]` drafts to decide, -1 in a request's last position; int64 `[batch + 1]`, start of each row; int64
        `[n]` four times: bits of the noise keys, positions in the sequence, rows, and number of drafts before each
        position.
    """
    batch = len(requests)
    begins = np.zeros(batch + 1, np.int64)
    for row in range(batch):
        begins[row + 1] = begins[row] + draft_lengths[row] + 1
    total = begins[batch]
    decided, keys, positions = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    rows, depths = np.empty(total, np.int64), np.empty(total, np.int64)
    for row in range(batch):
        for depth in range(draft_lengths[row] + 1):
            at = begins[row] + depth
            decided[at] = drafts[row, depth] if depth < draft_lengths[row] else -1
            keys[at] = np.int64(noise_keys[requests[row]])
            positions[at] = lengths[requests[row]] + depth
            rows[at], depths[at] = row, depth
    return decided, begins, keys, positions, rows, depths


@cached_njit(nogil=True)
def padded_positions(size, requests, lengths, noise_keys, drafts, draft_lengths):
    """`packed_positions` in one array, padded to `size` positions of `size` requests.

    There are at most as many requests as positions, so one number bounds both. A padding position is that of a request
    without a draft, at position -1, which kernels do not read. Requests beyond those have no positions.

    Args:
        size: At least the number of positions.
        requests: As for `packed_positions`.
        lengths: Likewise.
        noise_keys: Likewise.
        drafts: Likewise.
        draft_lengths: Likewise.

    Returns:
        int64 `[4 * size + 1]`: drafts, keys, positions, and the `size + 1` starts of requests.
    """
    decided, begins, keys, positions, _, _ = packed_positions(requests, lengths, noise_keys, drafts, draft_lengths)
    numbers = np.empty(4 * size + 1, np.int64)
    total, batch = len(decided), len(requests)
    numbers[:total], numbers[total:size] = decided, -1
    numbers[size : size + total], numbers[size + total : 2 * size] = keys, 0
    numbers[2 * size : 2 * size + total], numbers[2 * size + total : 3 * size] = positions, -1
    numbers[3 * size : 3 * size + batch] = begins[:batch]
    for padding in range(size + 1 - batch):
        numbers[3 * size + batch + padding] = min(total + padding, size)
    return numbers


@cached_njit(nogil=True)
def unpacked(begins, accepted, tokens, logprobs, entropies, max_probs, stops):
    """Packed results as one row per request, with zeros after the committed tokens.

    Args:
        begins: int64 `[batch + 1]`, start of each row.
        accepted: int64 `[batch]`, accepted drafts.
        tokens: int64 `[n]`, of every packed position.
        logprobs: float32 `[n]`.
        entropies: float32 `[n]`.
        max_probs: float32 `[n]`.
        stops: int64 `[k]`, tokens after which nothing is committed.

    Returns:
        int64 `[batch, longest row]` tokens; float32 of the same shape: logprobs, entropies and largest probabilities; bool
        `[n]`, positions that count; and whether none of the largest probabilities at those is NaN.
    """
    batch, width, numbers = len(accepted), 0, True
    for row in range(batch):
        width = max(width, begins[row + 1] - begins[row])
    told = np.zeros((batch, width), np.int64)
    figures = np.zeros((3, batch, width), np.float32)
    counts = np.zeros(len(tokens), np.bool_)
    for row in range(batch):
        for depth in range(accepted[row] + 1):
            at = begins[row] + depth
            counts[at] = True
            told[row, depth] = tokens[at]
            figures[0, row, depth], figures[1, row, depth] = logprobs[at], entropies[at]
            figures[2, row, depth] = max_probs[at]
            numbers = numbers and not np.isnan(max_probs[at])
            stopped = False
            for stop in stops:
                stopped = stopped or tokens[at] == stop
            if stopped:
                break
    return told, figures[0], figures[1], figures[2], counts, numbers
