"""Decides how far to ask a drafter and for which requests, in one compiled call.

A decision forecasts the drafter's drafts, prices them, and compares some twenty answers, each a ranking of all draft
slots of the batch. Each part is its own function. The numpy forms are `DraftForecast.predict`, `DraftCost.predict`
and those in `tests/decisions.py`.
"""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.cost import drafts_s
from atlas_rl.controller.draft_forecast import remembered
from atlas_rl.controller.slots import compare

_LEVELS = 64  # resolution of the ranking by survival: forecast drafts need no finer one
_STEADY_BACKLOG = 2  # committed tokens per request that a drafter has to process if it drafts in every step


@cached_njit(nogil=True)
def decide(
    current, room, profiles, counts, turn, unknown, table, factor, spent_s, first_s, shares, levels, is_priced, backlog,
    depths, discount, edges, for_all,
):  # fmt: skip
    """Draft tokens to ask of one drafter per request, for the highest expected goodput.

    Args:
        current: float64 `[batch, lookahead]`, survival of the draft that each request already has; rows never rise.
        room: int64 `[batch]`, the most draft tokens that each request can still use.
        profiles: As for `remembered`, like the next three.
        counts: int64 `[situations]`.
        turn: Number of forecasts.
        unknown: float64 `[lookahead]`.
        table: float64, seconds of a forward over 0, 1, ... tokens, to at least `batch * (1 + lookahead)`.
        factor: Factor on the whole table.
        spent_s: Seconds of the drafts made so far.
        first_s: Seconds that asking costs beside the draft, if the drafter is the first of the step.
        shares: float64 `[4]`, `DraftCost.tables()`, like `levels`.
        levels: float64 `[octaves]`.
        is_priced: Whether a call for about as many requests was ever seen; if not, drafts count as free.
        backlog: Committed tokens that the drafter has to process first. A long backlog after an idle time occurs only
            once, so at most the tokens of the latest steps are counted.
        depths: int64 `[num_depths]`, draft tokens that may be asked for, rising.
        discount: Factor on the goodput of steps with drafts.
        edges: int64 `[n]`, sizes that forwards are padded to, rising; empty if they are not padded.
        for_all: Whether all requests are drafted for, if any is. If not, it may be asked only for those where it is expected
            to do better.

    Returns:
        Draft tokens to ask for, int64 `[batch]`, not cut to the room; the expected goodput of that without the
        discount; and whether any request is asked for.
    """
    batch = len(room)
    expected = remembered(current[:, 0].copy(), profiles, counts, turn, unknown)
    better = compare(expected, room, current)
    if for_all:
        better[:] = True
    draft_s = np.full((3, len(depths)), spent_s)
    if is_priced:
        # Two candidates: the requests where it is expected to do better, and all requests if that costs no more.
        for whom, rows in ((1, better.sum()), (2, batch)):
            for index in range(len(depths)):
                draft_s[whom, index] += first_s + drafts_s(
                    shares, levels, rows, depths[index], min(backlog, _STEADY_BACKLOG * rows)
                )
    whom, index, goodput = search(current, expected, better, table, factor, draft_s, depths, discount, edges)
    wanted = np.zeros(batch, np.int64)
    for row in range(batch):
        if whom == 2 or (whom == 1 and better[row]):
            wanted[row] = depths[index]
    return wanted, goodput, whom > 0


@cached_njit(nogil=True)
def search(current, expected, better, table, factor, draft_s, depths, discount, edges):
    """Find the depths with the highest expected goodput.

    Args:
        current: As for `decide`.
        expected: float64 `[draws, batch, lookahead]`, survival of possible drafts of the drafter. Each draw is verified
            at its best length; an answer's goodput is that of all draws together.
        better: bool `[batch]`, requests where the drafter is expected to beat the current draft.
        table: As for `decide`.
        factor: As for `decide`.
        draft_s: float64 `[3, num_depths]`, draft seconds of the step: not asking (first entry of the row), asking for
            `better` to each depth, asking for all requests.
        depths: As for `decide`.
        discount: As for `decide`.
        edges: As for `decide`.

    Returns:
        Requests to ask for (0 none, 1 `better`, 2 all), index of the depth, and the expected goodput without the
        discount.
    """
    batch, num_depths = len(current), len(depths)
    kept, fresh = np.empty((2, num_depths + 1, 2, _LEVELS)), np.empty((2, num_depths + 1, 2, _LEVELS))
    sums = np.zeros((2, num_depths, 3))  # per answer, over its draws: tokens, discounted tokens, seconds
    # The shallowest depth at which a new draft is taken. Below it, asking costs time and gains nothing.
    shallowest = np.full(2, num_depths)
    # If all rows are better, both answers are the same; if none is, the first asks for no request.
    first, last = 0 if better.any() else 1, 1 if better.all() else 2
    for draw in range(len(expected)):
        _rank(current, expected[draw], better, depths, first, last, kept, fresh, shallowest)
        for whom in range(first, last):
            for index in range(num_depths):
                tokens, discounted, seconds = _verified(
                    kept[whom, index + 1], fresh[whom, index], batch, table, factor, draft_s[whom + 1, index], discount,
                    edges,
                )  # fmt: skip
                sums[whom, index, 0] += tokens
                sums[whom, index, 1] += discounted
                sums[whom, index, 2] += seconds
    # Nobody is asked: all rows keep their current draft in every draw. The last entry of `fresh` is never counted.
    tokens, discounted, seconds = _verified(
        kept[first, 0], fresh[first, num_depths], batch, table, factor, draft_s[0, 0], discount, edges
    )
    best, expected_of_it, answer = discounted / seconds, tokens / seconds, (0, 0)
    for whom in range(first, last):
        for index in range(shallowest[whom], num_depths):
            tokens, discounted, seconds = sums[whom, index]
            if discounted / seconds > best:
                best, expected_of_it, answer = discounted / seconds, tokens / seconds, (whom + 1, index)
    return answer[0], answer[1], expected_of_it


@cached_njit(nogil=True)
def _rank(current, expected, better, depths, first, last, kept, fresh, shallowest):
    """Number and mass of the slots at each level of survival, for every depth, in place.

    A request takes the new draft if it gains more. The gain rises with the depth, so the new draft is taken from some
    depth on, and one pass over the slots serves all depths.

    Args:
        current: float64 `[batch, lookahead]`.
        expected: float64 `[batch, lookahead]`, of one draw.
        better: bool `[batch]`.
        depths: int64 `[num_depths]`, rising.
        first: First answer to fill in (0 asks for `better`, 1 for all).
        last: End of the answers to fill in, exclusive.
        kept: float64 `[2, num_depths + 1, 2, _LEVELS]`, by answer (`better`, all): `kept[whom, i + 1]` gets slots of
            the current drafts that are kept at depth i, `kept[whom, 0]` those of all current drafts.
        fresh: float64 of the same shape; `fresh[whom, i]` gets slots of new drafts at depth i.
        shallowest: int64 `[2]`, index of the shallowest depth so far at which a new draft is taken.
    """
    batch, lookahead = current.shape
    num_depths = len(depths)
    kept[first:last] = 0.0
    fresh[first:last] = 0.0
    for row in range(batch):
        total, at_hand, begin, taken = 0.0, 0.0, 0, num_depths
        for position in range(lookahead):
            at_hand += current[row, position]
        for index in range(num_depths):
            for position in range(begin, depths[index]):
                total += expected[row, position]
            begin = depths[index]
            if total > at_hand:
                taken = index
                break
        for position in range(lookahead):
            value = current[row, position]
            if value <= 0:
                break
            level = min(int((1 - value) * _LEVELS), _LEVELS - 1)
            for whom in range(first, last):
                upto = taken if whom == 1 or better[row] else num_depths
                kept[whom, upto, 0, level] += 1
                kept[whom, upto, 1, level] += value
        for whom in range(first if better[row] else 1, last):
            shallowest[whom] = min(shallowest[whom], taken)
        index = taken
        for position in range(depths[num_depths - 1] if taken < num_depths else 0):
            value = expected[row, position]
            if value <= 0:
                break
            while depths[index] <= position:
                index += 1
            level = min(int((1 - value) * _LEVELS), _LEVELS - 1)
            for whom in range(first if better[row] else 1, last):
                fresh[whom, index, 0, level] += 1
                fresh[whom, index, 1, level] += value
    _sum_up(first, last, kept, fresh)


@cached_njit(nogil=True)
def _sum_up(first, last, kept, fresh):
    """Cumulate slots by the depth at which they come or go into slots present at each depth, in place."""
    num_depths = kept.shape[1] - 1
    for whom in range(first, last):
        for index in range(num_depths, 0, -1):
            for part in range(2):
                for level in range(_LEVELS):
                    kept[whom, index - 1, part, level] += kept[whom, index, part, level]
        for index in range(1, num_depths):
            for part in range(2):
                for level in range(_LEVELS):
                    fresh[whom, index, part, level] += fresh[whom, index - 1, part, level]


@cached_njit(nogil=True)
def _verified(kept, fresh, batch, table, factor, draft_s, discount, edges):
    """Tokens, discounted tokens and seconds of one draw at its best verified length; no discount at length 0.

    The best length ends with a level, or where padding ends: up to there slots are free, even if the level goes on.
    """
    num_slots, tokens, edge = 0, float(batch), 0
    best_tokens, best_seconds, worth = tokens, table[batch] * factor + draft_s, 1.0
    for level in range(_LEVELS):
        count = kept[0, level] + fresh[0, level]
        if count > 0:
            mass, size = kept[1, level] + fresh[1, level], batch + num_slots
            while edge < len(edges) and edges[edge] < size + count:
                if edges[edge] > size:
                    some = tokens + mass * (edges[edge] - size) / count
                    seconds = table[edges[edge]] * factor + draft_s
                    if discount * some * best_seconds > worth * best_tokens * seconds:
                        best_tokens, best_seconds, worth = some, seconds, discount
                edge += 1
            num_slots += int(count)
            tokens += mass
            seconds = table[batch + num_slots] * factor + draft_s
            if discount * tokens * best_seconds > worth * best_tokens * seconds:
                best_tokens, best_seconds, worth = tokens, seconds, discount
    return best_tokens, worth * best_tokens, best_seconds
