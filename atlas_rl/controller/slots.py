"""Compiled functions over the draft slots of a batch: survival, best draft, and number of slots to verify.

A decision visits every slot a few times. In numpy each operation costs some microseconds, and there would be dozens of
them in a step that takes the device a few milliseconds. The numpy form of every function is in
`tests/controller/test_slots.py`.
"""

from __future__ import annotations

import math

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD

LEAST = 1e-4
"""Least distance of confidences from 0 and 1, because their logarithms are taken."""


@cached_njit(nogil=True)
def survival_of(confidence, lengths, edges, position_class, a, b):
    """Probability that each slot of a draft is accepted together with all before it.

    Args:
        confidence: float32 `[batch, draft_len]`.
        lengths: int64 `[batch]`.
        edges: float64 `[n]`, bins of the confidence in logits.
        position_class: int64 `[MAX_LOOKAHEAD]`, class of each position.
        a: float64 `[classes, n + 1]`; acceptance is `a + b * confidence`.
        b: float64 `[classes, n + 1]`.

    Returns:
        float64 `[batch, MAX_LOOKAHEAD]`, zero past a row's length.
    """
    survival = np.zeros((len(lengths), MAX_LOOKAHEAD))
    for row in range(len(lengths)):
        stands = 1.0
        for position in range(min(lengths[row], confidence.shape[1], MAX_LOOKAHEAD)):
            own = min(max(np.float64(confidence[row, position]), LEAST), 1 - LEAST)
            cell = np.searchsorted(edges, math.log(own / (1 - own)))
            kind = position_class[position]
            stands *= a[kind, cell] + b[kind, cell] * own
            survival[row, position] = stands
    return survival


@cached_njit(nogil=True)
def within(wanted, room):
    """Draft tokens to ask for, cut to the available room, and whether there are any.

    Args:
        wanted: int64 `[batch]`.
        room: int64 `[batch]`.

    Returns:
        int64 `[batch]`, and a bool.
    """
    asked, anybody = np.empty(len(wanted), np.int64), False
    for row in range(len(wanted)):
        asked[row] = min(wanted[row], room[row])
        anybody = anybody or asked[row] != 0
    return asked, anybody


@cached_njit(nogil=True)
def take_better(survival, gains, drafters, own, index, columns):
    """Replace a request's best draft by the draft of `index` if it gains more, in place.

    Args:
        survival: float64 `[batch, MAX_LOOKAHEAD]`, of the best drafts so far.
        gains: float64 `[batch]`, of the best drafts so far: survival summed over the first `columns` positions.
        drafters: int64 `[batch]`, index of the drafter of each best draft.
        own: float64 `[batch, MAX_LOOKAHEAD]`, survival of this drafter's draft.
        index: Index of this drafter.
        columns: Number of positions that count.
    """
    for row in range(len(gains)):
        gain = 0.0
        for position in range(columns):
            gain += own[row, position]
        if gain > gains[row]:
            gains[row], drafters[row] = gain, index
            survival[row] = own[row]


@cached_njit(nogil=True)
def weigh(confidence, lengths, edges, position_class, a, b, survival, gains, drafters, index, columns):
    """`survival_of` a new draft, and `take_better` with it: returns the former; the other arguments are as for those."""
    own = survival_of(confidence, lengths, edges, position_class, a, b)
    take_better(survival, gains, drafters, own, index, columns)
    return own


@cached_njit(nogil=True)
def compare(expected, room, survival):
    """Cut expected drafts to the available room, in place, and mark the rows where they beat the best draft so far.

    Args:
        expected: float64 `[draws, batch, lookahead]`.
        room: int64 `[batch]`.
        survival: float64 `[batch, lookahead]`, of the best drafts so far.

    Returns:
        bool `[batch]`.
    """
    draws, batch, lookahead = expected.shape
    better = np.empty(batch, np.bool_)
    for row in range(batch):
        hoped = 0.0
        for draw in range(draws):
            for position in range(lookahead):
                if position >= room[row]:
                    expected[draw, row, position] = 0.0
                hoped += expected[draw, row, position]
        at_hand = 0.0
        for position in range(lookahead):
            at_hand += survival[row, position]
        better[row] = hoped / draws > at_hand
    return better


@cached_njit(nogil=True)
def positive(survival):
    """The positive numbers of `survival` (float64 `[batch, MAX_LOOKAHEAD]`, rows never rise): float64 `[n]`."""
    batch, lookahead = survival.shape
    values, count = np.empty(batch * lookahead), 0
    for row in range(batch):
        for position in range(lookahead):
            if survival[row, position] <= 0:
                break
            values[count] = survival[row, position]
            count += 1
    return values[:count]


@cached_njit(nogil=True)
def admitted(survival, values, table, factor, drafting_s, discount, one_by_one):
    """Draft tokens of each request to verify: the likeliest slots of the batch, as many as pay.

    Args:
        survival: float64 `[batch, MAX_LOOKAHEAD]`, zero beyond a draft; rows never rise.
        values: float64 `[n]`, the positive survivals, rising. numpy sorts them several times faster than compiled code.
        table: float64, seconds of a forward over 0, 1, ... tokens, to at least `batch` and all slots.
        factor: Factor on the whole table.
        drafting_s: Seconds of the drafts, spent however many slots are verified.
        discount: Factor on the goodput of steps with drafts.
        one_by_one: Stop at the first slot that does not pay, and discount what slots gain: a slot's admission then depends
            only on likelier slots, never on a later one of its own row.

    Returns:
        int64 `[batch]`, the tokens that these slots are expected to gain, and the seconds of their forward.
    """
    batch = len(survival)
    best, gained = num_admitted(values, batch, table, factor, drafting_s, discount, one_by_one)
    return lengths_of(survival, values, best), gained, table[batch + best] * factor


@cached_njit(nogil=True)
def num_admitted(values, batch, table, factor, drafting_s, discount, one_by_one):
    """Number of slots to verify, likeliest first, for the most tokens per second.

    Args:
        values: float64 `[n]`, survival of the slots, rising.
        batch: Number of requests.
        table: As for `admitted`.
        factor: As for `admitted`.
        drafting_s: As for `admitted`.
        discount: As for `admitted`.
        one_by_one: As for `admitted`.

    Returns:
        The number, and the tokens that these slots are expected to gain.
    """
    best, tokens, gained = 0, 0.0, 0.0
    highest = batch / (table[batch] * factor + drafting_s)
    before = highest
    for count in range(1, len(values) + 1):
        gained += values[len(values) - count]
        whole_s = table[batch + count] * factor + drafting_s
        goodput = (batch + discount * gained if one_by_one else discount * (batch + gained)) / whole_s
        if one_by_one:
            if goodput <= before:
                break
            before = goodput
        if goodput > highest:
            highest, best, tokens = goodput, count, gained
    return best, tokens


@cached_njit(nogil=True)
def lengths_of(survival, values, count):
    """Slots of each request among the `count` likeliest of the batch: int64 `[batch]`.

    Ties go to earlier positions, then to earlier rows. `values` are the slots' survivals, rising.
    """
    batch, lookahead = survival.shape
    lengths = np.zeros(batch, np.int64)
    if count == 0:
        return lengths
    least = values[len(values) - count]
    left = count
    for row in range(batch):
        while lengths[row] < lookahead and survival[row, lengths[row]] > least:
            lengths[row] += 1
        left -= lengths[row]
    for position in range(lookahead):
        for row in range(batch):
            if left > 0 and lengths[row] == position and survival[row, position] == least:
                lengths[row] += 1
                left -= 1
    return lengths
