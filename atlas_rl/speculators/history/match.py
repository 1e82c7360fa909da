"""Cursors: places in history where the preceding tokens equal a request's latest ones.

A request keeps its cursors from token to token. If a cursor predicted the token, it moves on and its match grows by
one; otherwise it is dropped. New cursors come from the chains. So the longest matches are never lost to the bound on
how far a chain is followed, and following an agreed continuation reads memory in sequence.
"""

from __future__ import annotations

import numba
import numpy as np

from atlas_rl.speculators.history.store import (
    GLOBAL,
    INFO,
    LINK,
    MAX_CODE,
    MAX_MATCH,
    ORDERS,
    PROMPT,
    SEPARATOR,
    TOKEN,
    bucket_of,
    in_prompt,
    tag_of,
)

# Sources of a cursor. OWN: the request's own completion, or its prompt. SIBLING: a running request with the same
# prompt. RECALLED: an archived rollout of the same prompt. LIVE_OTHER, ARCHIVE_OTHER: text that followed other prompts.
OWN, SIBLING, RECALLED, LIVE_OTHER, ARCHIVE_OTHER = range(5)
NUM_SOURCES = 5

CODE, SOURCE, LENGTH, NEXT = 0, 1, 2, 3
"""Columns of a cursor. CODE is an archive code, or `~code` of a live one; NEXT is the token it predicts."""

MAX_CURSORS = 48
_REFILL_BELOW = 16  # chains are searched while fewer cursors than this are left
_MAX_FOUND = 16  # most cursors taken from one chain
_MAX_VISITS = 32  # most entries visited in one chain


@numba.njit(inline="always")
def _match_live(row, pos, context, end):
    """Number of tokens before `row[pos]` that equal those before `context[end]`."""
    limit = min(min(pos, end), MAX_MATCH)
    length = 0
    while length < limit and row[pos - 1 - length] == context[end - 1 - length]:
        length += 1
    return length


@numba.njit(inline="always")
def _match_archive(nodes, code, context, end):
    """Number of tokens before an archived one that equal those before `context[end]`; separators never match."""
    limit = min(end, MAX_MATCH)
    length = 0
    at = code
    while length < limit:
        at = at - 1 if at > 0 else len(nodes) - 1
        if nodes[at, TOKEN] != context[end - 1 - length]:
            break
        length += 1
    return length


@numba.njit(inline="always")
def _add(cursors, count, survivors, code, source, length, token):
    """Append a cursor unless it is already among the first `survivors`; returns the new count."""
    for i in range(survivors):
        if cursors[i, CODE] == code:
            return count
    cursors[count, CODE] = code
    cursors[count, SOURCE] = source
    cursors[count, LENGTH] = length
    cursors[count, NEXT] = token
    return count + 1


@numba.njit
def _search_live(cursors, count, survivors, family, context, end, request, live):
    """Follow one chain of the running requests. PROMPT yields the request's own group, GLOBAL all others."""
    tag = live.tags[request]
    num_requests = len(live.tokens)
    room = min(count + _MAX_FOUND, MAX_CURSORS)
    link = live.heads[family, bucket_of(context, end, family, tag, live.heads.shape[1])]
    for _ in range(_MAX_VISITS):
        if link == 0 or count >= room:
            break
        code = link - 1
        link = live.links[code, family]
        pos = code // num_requests
        row = code - pos * num_requests
        if (live.tags[row] == tag) != (family == PROMPT):
            continue
        length = _match_live(live.tokens[row], pos, context, end)
        if length < ORDERS[family]:
            continue
        source = LIVE_OTHER
        if family == PROMPT:
            source = OWN if row == request or pos < live.prompt_lengths[row] else SIBLING
        count = _add(cursors, count, survivors, ~code, source, length, live.tokens[row, pos])
    return count


@numba.njit
def _search_archive(cursors, count, survivors, family, context, end, tag, archive):
    """Follow one chain of the archive. PROMPT yields completions of the same prompt, GLOBAL text of the others.

    Nodes get older along a chain. One that is newer has been overwritten, and the chain ends there.
    """
    capacity = len(archive.nodes)
    room = min(count + _MAX_FOUND, MAX_CURSORS)
    link = archive.heads[family, bucket_of(context, end, family, tag, archive.heads.shape[1])]
    last_age = -1
    for _ in range(_MAX_VISITS):
        if link == 0 or count >= room:
            break
        code = link - 1
        age = archive.cursor[0] - link
        if age < 0:
            age += capacity
        if age <= last_age:
            break
        last_age = age
        link = archive.nodes[code, LINK + family]
        info = archive.nodes[code, INFO]
        same = tag_of(info) == tag
        # The request's own prompt is in the live index already: an archived copy adds nothing.
        if same != (family == PROMPT) or (same and in_prompt(info)) or archive.nodes[code, TOKEN] == SEPARATOR:
            continue
        length = _match_archive(archive.nodes, code, context, end)
        if length >= ORDERS[family]:
            source = RECALLED if family == PROMPT else ARCHIVE_OTHER
            count = _add(cursors, count, survivors, code, source, length, archive.nodes[code, TOKEN])
    return count


@numba.njit
def refill(cursors, count, context, end, request, live, archive):
    """Add cursors for the context before `context[end]` to the existing `count`; returns the new count."""
    if count >= _REFILL_BELOW:
        return count
    survivors = count
    tag = live.tags[request]
    if end >= ORDERS[PROMPT]:
        count = _search_live(cursors, count, survivors, PROMPT, context, end, request, live)
        count = _search_archive(cursors, count, survivors, PROMPT, context, end, tag, archive)
    if end >= ORDERS[GLOBAL]:
        count = _search_live(cursors, count, survivors, GLOBAL, context, end, request, live)
        count = _search_archive(cursors, count, survivors, GLOBAL, context, end, tag, archive)
    return count


@numba.njit(inline="always")
def _advance_live(cursors, i, context, end, position, request, live):
    """Move a live cursor on by one token; returns the token it predicts next, SEPARATOR at the end of its text.

    `context[end]` is token `position` of the request, the next to come: a cursor into the request itself may run into
    the draft, as in a text that repeats itself.
    """
    num_requests = len(live.tokens)
    code = ~cursors[i, CODE] + num_requests
    if code > MAX_CODE:
        return SEPARATOR
    pos = code // num_requests
    row = code - pos * num_requests
    cursors[i, CODE] = ~code
    if row == request:
        back = position - pos
        return context[end - back] if back <= end else live.tokens[row, pos]
    if pos >= live.indexed[row]:
        return SEPARATOR
    if cursors[i, SOURCE] == OWN and pos >= live.prompt_lengths[row]:
        cursors[i, SOURCE] = SIBLING
    return live.tokens[row, pos]


@numba.njit
def advance(cursors, count, token, context, end, position, request, live, archive):
    """Keep and advance the cursors that predicted `token`, now `context[end - 1]`; returns how many are left."""
    kept = 0
    for i in range(count):
        if cursors[i, NEXT] != token:
            continue
        if cursors[i, CODE] < 0:
            following = _advance_live(cursors, i, context, end, position, request, live)
        else:
            code = cursors[i, CODE] + 1
            if code == len(archive.nodes):
                code = 0
            cursors[i, CODE] = code
            following = archive.nodes[code, TOKEN]
        if following == SEPARATOR:
            continue
        cursors[kept, CODE] = cursors[i, CODE]
        cursors[kept, SOURCE] = cursors[i, SOURCE]
        cursors[kept, LENGTH] = min(cursors[i, LENGTH] + 1, MAX_MATCH)
        cursors[kept, NEXT] = following
        kept += 1
    return kept


def new_cursors(num_requests: int) -> np.ndarray:
    """Empty cursor arrays for every request: int32 `[num_requests, MAX_CURSORS, 4]`."""
    return np.empty((num_requests, MAX_CURSORS, 4), np.int32)
