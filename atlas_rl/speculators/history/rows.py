"""Compiled passes of the history index over the requests of a step: draft, follow committed tokens, search ahead, learn.

`LiveView`, `ArchiveView` and `Model` are passed array by array: numba takes microseconds to unpack a named tuple.

Rows are drafted on one thread or in parallel threads (`draft_parts`), with equal results: a row's draft reads and writes
only what is its own, besides a history that does not change meanwhile. Two passes could not be parallel in this way.
Indexing files the tokens of all rows in one hash table, where every entry links to the one before it. Learning is a
sequence: every token is scored by the weights that the token before it has left.
"""

from __future__ import annotations

import numba
import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.speculators.history.match import advance, refill
from atlas_rl.speculators.history.mixture import Model, choose, confidence_of, learn, mix, new_scratch
from atlas_rl.speculators.history.store import MAX_MATCH, ArchiveView, LiveView, index_live

CONFIDENCE_FLOOR = 0.01
"""A draft ends before a token of less confidence."""


@numba.njit
def _draft_row(request, length, want, cursors, count, live, archive, model, scratch, mode, key, stops, out, confidence):
    """Draft up to `want` tokens of one request from its `count` cursors, which are consumed; returns how many.

    The cursors are already refilled for the first token.
    """
    end = min(length, MAX_MATCH)
    context = np.empty(MAX_MATCH + want, np.int32)
    context[:end] = live.tokens[request, length - end : length]
    for drafted in range(want):
        position = length + drafted
        if drafted > 0:
            count = refill(cursors, count, context, end, request, live, archive)
        if count == 0:
            return drafted
        at = mix(cursors, count, model, scratch)
        best = choose(cursors, count, at, model, scratch, mode, key, position, False)
        confidence[drafted] = confidence_of(model.confidence[mode], scratch.features)
        if confidence[drafted] < CONFIDENCE_FLOOR:
            return drafted
        token = scratch.tokens[best]
        out[drafted] = token
        context[end] = token
        end += 1
        if token in stops:
            return drafted + 1
        count = advance(cursors, count, token, context, end, position + 1, request, live, archive)
    return want


@numba.njit
def _room_for(want):
    """Tokens, confidences and lengths of drafts. `draft_parts` itself would fill each of them in another parallel region."""
    widest = 0
    for i in range(len(want)):
        widest = max(widest, want[i])
    shape = len(want), widest
    return np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(len(want), np.int64)


@cached_njit(nogil=True)
def draft_rows(
    requests, lengths, want, cursors, counts, found, found_at,
    tokens, links, heads, indexed, prompt_lengths, tags, nodes, archive_heads, cursor,
    log_weights, escapes, exponents, certainty,
    mode, keys, stops,
):  # fmt: skip
    """Draft every row after the `lengths` of all requests.

    A request has `counts[request]` cursors. A search appends more: `found[request]` in all, valid at the position
    `found_at[request]` while the history does not grow. `counts` does not change, so a later search, in a history that has
    grown, starts from the same cursors as if no draft had been asked for before.

    Returns:
        Tokens int64 and confidences float32 `[batch, max(want)]`, zero beyond a draft, and the lengths, int64 `[batch]`.
    """
    live = LiveView(tokens, links, heads, indexed, prompt_lengths, tags)
    archive = ArchiveView(nodes, archive_heads, cursor)
    model = Model(log_weights, escapes, exponents, certainty)
    out, confidence, drafted = _room_for(want)
    own = np.empty_like(cursors[0])
    scratch = new_scratch(model)
    for i in range(len(requests)):
        request, length = requests[i], lengths[requests[i]]
        if want[i] <= 0:
            continue
        if found_at[request] != length:
            row = live.tokens[request]
            found[request] = refill(cursors[request], counts[request], row, length, request, live, archive)
            found_at[request] = length
        count = found[request]
        own[:count] = cursors[request, :count]
        drafted[i] = _draft_row(
            request, length, want[i], own, count, live, archive, model, scratch, mode, keys[request], stops,
            out[i], confidence[i],
        )  # fmt: skip
    return out, confidence, drafted


@cached_njit(nogil=True, parallel=True)
def draft_parts(parts, requests, lengths, want, *rest):
    """`draft_rows` over `parts` parts of the rows in parallel; `requests` must be distinct."""
    tokens, confidence, drafted = _room_for(want)
    for part in numba.prange(parts):
        index = np.int64(part)  # unsigned otherwise, and its product with a signed number a float
        begin, end = index * len(requests) // parts, (index + 1) * len(requests) // parts
        own = draft_rows(requests[begin:end], lengths, want[begin:end], *rest)
        tokens[begin:end, : own[0].shape[1]] = own[0]
        confidence[begin:end, : own[1].shape[1]] = own[1]
        drafted[begin:end] = own[2]
    return tokens, confidence, drafted


@numba.njit
def _move_rows(requests, starts, ends, cursors, counts, found, found_at, live, archive, met, met_counts):
    """Move every request's cursors past its tokens `starts[i] .. ends[i] - 1`.

    `met` (int32 `[tokens, MAX_CURSORS, 4]`) and `met_counts` (int64 `[tokens]`) receive the cursors at each token.
    """
    token = 0
    for i in range(len(requests)):
        request = requests[i]
        row, own, count = live.tokens[request], cursors[request], counts[request]
        for position in range(starts[i], ends[i]):
            if position == starts[i] and found_at[request] == position:  # searched already, in the same history
                count = found[request]
            else:
                count = refill(own, count, row, position, request, live, archive)
            met[token, :count] = own[:count]
            met_counts[token] = count
            token += 1
            count = advance(own, count, row[position], row, position + 1, position + 1, request, live, archive)
        counts[request] = count


@cached_njit(nogil=True)
def follow_rows(
    requests, lengths, observed, most, cursors, counts, found, found_at,
    tokens, links, heads, indexed, prompt_lengths, tags, nodes, archive_heads, cursor,
    met, met_counts,
):  # fmt: skip
    """Move cursors past newly committed tokens and index them; nothing if `met` has no room.

    `observed` (int64 `[num_requests]`) is updated. Positions from `most` on are not indexed. Other arguments: see
    `_move_rows`.

    Returns:
        The number of tokens, and each request's tokens observed before and now, int64 `[batch]` twice.
    """
    live = LiveView(tokens, links, heads, indexed, prompt_lengths, tags)
    archive = ArchiveView(nodes, archive_heads, cursor)
    starts, ends, total = np.empty(len(requests), np.int64), np.empty(len(requests), np.int64), 0
    for i in range(len(requests)):
        starts[i], ends[i] = observed[requests[i]], lengths[requests[i]]
        total += ends[i] - starts[i]
    if total <= len(met):
        _move_rows(requests, starts, ends, cursors, counts, found, found_at, live, archive, met, met_counts)
        for i in range(len(requests)):
            observed[requests[i]] = ends[i]
        index_live(live, requests, np.minimum(ends, most))
        found_at[:] = -1  # the history has grown, also for requests that this step left out
    return total, starts, ends


@cached_njit(nogil=True)
def search_rows(
    requests, ends, finished, cursors, counts, found, found_at,
    tokens, links, heads, indexed, prompt_lengths, tags, nodes, archive_heads, cursor,
):  # fmt: skip
    """Search for every request that goes on where its text ended (`ends`), unless a draft has searched there.

    The next `follow_rows` searches there otherwise, in the same history and with the same result.
    """
    live = LiveView(tokens, links, heads, indexed, prompt_lengths, tags)
    archive = ArchiveView(nodes, archive_heads, cursor)
    for i in range(len(requests)):
        request, length = requests[i], ends[i]
        if not finished[i] and found_at[request] != length:
            row = live.tokens[request]
            found[request] = refill(cursors[request], counts[request], row, length, request, live, archive)
            found_at[request] = length


@cached_njit(nogil=True)
def learn_rows(
    requests, starts, ends, tokens, met, met_counts, log_weights, escapes, exponents, certainty, mode, keys
):  # fmt: skip
    """Learn from the tokens that `_move_rows` passed, as if each had been drafted from its cursors."""
    model = Model(log_weights, escapes, exponents, certainty)
    scratch = new_scratch(model)
    token = 0
    for i in range(len(requests)):
        request = requests[i]
        for position in range(starts[i], ends[i]):
            count, cursors = met_counts[token], met[token]
            token += 1
            if count > 0:
                at = mix(cursors, count, model, scratch)
                best = choose(cursors, count, at, model, scratch, mode, keys[request], position, True)
                learn(cursors, count, tokens[request, position], best, at, model, scratch, mode)
