"""What is known about every drafter, in flat arrays, and the plan of a step over all of them in one compiled call.

A plan goes through the drafters that have not drafted yet, the cheapest first, and stops at the first one that is to be
asked: because its drafts are expected to pay (`depth_search.decide`), because the time of such a call is not known yet, or
because it has saved up for a call that is not expected to pay. The plain form is in `tests/decisions.py`.
"""

from __future__ import annotations

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.cost import OCTAVES, drafts_s
from atlas_rl.controller.depth_search import decide
from atlas_rl.controller.draft_forecast import DraftForecast
from atlas_rl.controller.promises import DrafterModel, Kept, discount
from atlas_rl.controller.slots import within

TRIALS = 3
"""Calls before a drafter's cost estimate is used."""

TRIAL_DEPTH = 4
"""Draft tokens per request of a call that is made to learn."""

LEAST_TRIAL = 0.03
"""Minimum cost charged to such a call, as a share of a plain step: deciding and learning are not free."""

NOT_ASKED = -1
"""Backlog of a drafter that may not be asked."""


class Arms:
    """What is known about every drafter, as arrays for `ask_next`; rows are drafters, in the controller's order.

    They are written while learning, which runs beside the device.

    Args:
        num_drafters: Number of drafters.

    Attributes:
        arrays: The last arguments of `ask_next`: most of the following.
        profiles: float64 `[drafters, situations, profiles, MAX_LOOKAHEAD]`, `DraftForecast.tables()`, like `counts` and
            `unknown`.
        counts: int64 `[drafters, situations]`.
        turns: int64 `[drafters]`, forecasts so far: each shows other profiles. Plans count them.
        unknown: float64 `[drafters, MAX_LOOKAHEAD]`.
        num_calls: int64 `[drafters]`, calls that the cost of each is fitted to.
        shares: float64 `[drafters, 4]`, `DraftCost.tables()`, like `levels`.
        levels: float64 `[drafters, OCTAVES]`.
        observed: bool `[drafters, OCTAVES]`, whether calls for so many requests were observed.
        worth: float64 `[drafters]`, factor on the goodput of steps with drafts of each.
        purses_s: float64 `[drafters]`, seconds that each may spend on calls that are not expected to pay. Plans take from
            them.
        backlogs: int64 `[drafters]`, to be filled in for every plan.
        num_untried: Drafters that were called less than `TRIALS` times.
    """

    def __init__(self, num_drafters: int) -> None:
        profiles, counts, unknown = DraftForecast().tables()
        self.profiles = np.zeros((num_drafters, *profiles.shape))
        self.counts = np.zeros((num_drafters, *counts.shape), np.int64)
        self.unknown = np.zeros((num_drafters, *unknown.shape))
        self.num_calls = np.zeros(num_drafters, np.int64)
        self.shares, self.levels = np.zeros((num_drafters, 4)), np.zeros((num_drafters, OCTAVES))
        self.observed = np.zeros((num_drafters, OCTAVES), np.bool_)
        self.worth = np.zeros(num_drafters)
        self.turns = np.zeros(num_drafters, np.int64)
        self.purses_s = np.zeros(num_drafters)
        self.backlogs = np.full(num_drafters, NOT_ASKED)
        self.num_untried = num_drafters
        self.arrays: tuple[np.ndarray, ...] = (
            self.profiles, self.counts, self.turns, self.unknown, self.num_calls, self.shares, self.levels, self.observed,
            self.worth, self.purses_s,
        )  # fmt: skip

    def note(self, index: int, model: DrafterModel, plain: Kept) -> None:
        """Copy what is known about the drafter at `index`; `plain` is of steps without drafts."""
        self.profiles[index], self.counts[index], self.unknown[index] = model.forecast.tables()
        self.num_calls[index] = len(model.cost)
        if len(model.cost):
            self.shares[index], self.levels[index] = model.cost.tables()
            self.observed[index, model.cost.octaves] = True
        self.worth[index] = discount(model.kept, plain)
        self.num_untried = int((self.num_calls < TRIALS).sum())


@cached_njit(nogil=True)
def ask_next(
    current, room, backlogs, table, factor, spent_s, first_s, depths, edges, for_all,
    profiles, counts, turns, unknown, num_calls, shares, levels, observed, worth, purses_s,
):  # fmt: skip
    """Choose the drafter to ask next, and how many draft tokens of each request.

    Args:
        current: float64 `[batch, lookahead]`, survival of the draft that each request already has; rows never rise.
        room: int64 `[batch]`, the most draft tokens that each request can still use.
        backlogs: int64 `[drafters]`, committed tokens that each drafter has to process first; `NOT_ASKED` for one that may
            not be asked.
        table: float64, seconds of a forward over 0, 1, ... tokens, to at least `batch * (1 + lookahead)`.
        factor: Factor on the whole table.
        spent_s: Seconds of the drafts made so far.
        first_s: Seconds that asking costs beside the draft, paid by the first drafter of a step.
        depths: int64 `[num_depths]`, draft tokens that may be asked for, rising.
        edges: int64 `[n]`, sizes that forwards are padded to, rising; empty if they are not padded.
        for_all: Whether all requests are drafted for, if any is.
        profiles: See `Arms`, like all that follow.
        counts: See `Arms`.
        turns: See `Arms`; updated in place.
        unknown: See `Arms`.
        num_calls: See `Arms`.
        shares: See `Arms`.
        levels: See `Arms`.
        observed: See `Arms`.
        worth: See `Arms`.
        purses_s: See `Arms`; updated in place.

    Returns:
        Index of the drafter, -1 for none. int64 `[batch]`, draft tokens to ask for, within the room. float64 `[batch]`,
        survival of the first token that each request has. The expected goodput without the discount; 0 if the call is not
        expected to pay. Whether some drafter is worth a trial, because the time of such a call is not known.
    """
    batch, plain_s = len(room), table[len(room)] * factor
    beside, is_trial = current[:, 0].copy(), False
    chosen, wanted, goodput = -1, np.zeros(batch, np.int64), 0.0
    for own in _by_price(backlogs, batch, num_calls, shares, levels):
        wanted, goodput = np.full(batch, TRIAL_DEPTH), 0.0
        if num_calls[own] < TRIALS:
            is_trial = True
        else:
            turns[own] += 1
            is_known = _knows(observed[own], batch)
            # Draft cost is not extrapolated from large batches to small ones. If a draft would pay at zero cost, it is
            # tried once and timed, for all requests, so that the cost of such a call is known afterwards.
            answer, expected, pays = decide(
                current, room, profiles[own], counts[own], turns[own], unknown[own], table, factor, spent_s, first_s,
                shares[own], levels[own], is_known, backlogs[own], depths, worth[own], edges, for_all,
            )  # fmt: skip
            is_trial = is_trial or (pays and not is_known)
            if pays and is_known:
                wanted, goodput = answer, expected
            elif not pays and not _affords(own, batch, backlogs, plain_s, first_s, shares, levels, purses_s):
                wanted[:] = 0
        wanted, anybody = within(wanted, room)
        if anybody:
            chosen = own
            break
    return chosen, wanted, beside, goodput, is_trial


@cached_njit(nogil=True)
def _affords(own, batch, backlogs, plain_s, first_s, shares, levels, purses_s):
    """Whether drafter `own` has saved up for a call that is not expected to pay; takes its cost from the purse."""
    draft_s = drafts_s(shares[own], levels[own], batch, TRIAL_DEPTH, backlogs[own])
    cost_s = max(draft_s + first_s, LEAST_TRIAL * plain_s)
    if purses_s[own] < cost_s:
        return False
    purses_s[own] -= cost_s
    return True


@cached_njit(nogil=True)
def _by_price(backlogs, batch, num_calls, shares, levels):
    """Drafters that may be asked, by the seconds of one token for all requests; the controller's order among equals."""
    order, prices_s, count = np.empty(len(backlogs), np.int64), np.empty(len(backlogs)), 0
    for own in range(len(backlogs)):
        if backlogs[own] == NOT_ASKED:
            continue
        price_s = drafts_s(shares[own], levels[own], batch, 1, 0) if num_calls[own] > 0 else 0.0
        place = count
        while place > 0 and prices_s[place - 1] > price_s:
            order[place], prices_s[place] = order[place - 1], prices_s[place - 1]
            place -= 1
        order[place], prices_s[place] = own, price_s
        count += 1
    return order[:count]


@cached_njit(nogil=True)
def _knows(observed, rows):
    """`DraftCost.knows`, from the observed octaves of rows."""
    octave = 0
    while rows >> octave > 0:
        octave += 1
    knows = False
    for near in range(max(octave - 1, 0), min(octave + 2, len(observed))):
        knows = knows or observed[near]
    return knows
