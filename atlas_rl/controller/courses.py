"""Remembers how the gains of requests change along their texts.

The forecast of a call's end (`call_end.py`) takes a request's latest gain for its gain to the end. That is too pessimistic
where drafts get better along a text: the history index, for instance, is of little use before a text repeats itself. So a
request's gain is taken to change as that of a request of an earlier call did from the same place of its text. Only calls
that were mostly drafted are remembered: one that was held back shows nothing of the rest of its texts.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from atlas_rl.controller.base import Rest

_PLACES = 20
_EDGES = np.append(0, 16 << np.arange(_PLACES)).astype(np.float64)  # tokens: the first place is longer than an octave
TELLING = 4  # steps over which a gain is averaged: a place of fewer steps is pooled with those before it
ENOUGH = 8  # least number of remembered requests
REMEMBERED = 512  # latest requests, per octave of the largest batch of their call
WEIGHED = 48  # most of those that scenarios are drawn from
_LEAST_VARIANCE = 0.05  # least variance of the tokens that a request gains per step


class Courses:
    """Tokens gained by drafts, and their slots, per request and place of its text, over calls."""

    def __init__(self) -> None:
        # Per request of this call and place: steps; sums of gained tokens, of slots.
        self._own = np.zeros((0, _PLACES, 3))
        self._octave = 0  # of the largest batch of this call
        # Per octave, earlier requests: at each place steps, and tokens and slots per step.
        self._told: dict[int, deque[np.ndarray]] = {}

    def call_begins(self, batch: int, *, whole: bool, anew: bool) -> None:
        """A new call, of `batch` requests, reuses their numbers.

        `whole`: the last one was mostly drafted. `anew` forgets all calls.
        """
        if anew:
            self._told.clear()
        elif whole:
            telling = self._own[self._own[:, :, 0].sum(axis=1) >= TELLING]
            self._told.setdefault(self._octave, deque(maxlen=REMEMBERED)).extend(_course(telling))
        self._own[:], self._octave = 0.0, octave_of(batch)

    def observe(self, rest: Rest, slots: np.ndarray, gained: np.ndarray) -> None:
        """Learn from a step with drafts: verified and accepted tokens, int64 `[batch]` each.

        Ignored once the batch has shrunk by an octave: drafts are longer then, whether or not there were any before.
        """
        if not self._is_full(len(rest.requests)):
            return
        if (more := int(rest.requests.max()) + 1 - len(self._own)) > 0:
            self._own = np.pad(self._own, ((0, more), (0, 0), (0, 0)))
        self._own[rest.requests, _place(rest.generated)] += np.stack([np.ones(len(slots)), gained, slots], axis=1)

    def changes(
        self, rest: Rest, remaining: np.ndarray, variance: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens per step that requests will gain more than now, and their slots: float64 `[scenarios, batch]` each.

        None without evidence. There is none for a batch that has shrunk by an octave.

        Args:
            rest: Where the requests are in their texts.
            remaining: float64 `[scenarios, batch]`, tokens left.
            variance: Of a request's gain per step around its mean.
            rng: Draws the scenarios.
        """
        full, remembered = self._is_full(len(rest.requests)), self._told.get(self._octave, ())
        if not full or len(remembered) < ENOUGH:
            return None
        left, places = remaining.mean(axis=0), _place(rest.generated)
        weighed = rng.choice(len(remembered), WEIGHED, replace=False) if len(remembered) > WEIGHED else None
        told = np.array(remembered if weighed is None else [remembered[one] for one in weighed])
        upto = (rest.generated + left)[:, None]
        crossed = slice(int(places.min()), int(_place(upto).max()) + 1)
        edges = _EDGES[crossed.start : crossed.stop + 1]
        tokens = np.diff(np.clip(edges, rest.generated[:, None], upto), axis=1)  # per request, at each place to come
        rates, slots = told[:, crossed, 1], told[:, crossed, 2]
        to_come = tokens @ (1 / (1 + rates)).T  # steps of each request if it goes on like each remembered one
        here, slots = told[:, places, 1].T, tokens @ (slots / (1 + rates)).T / to_come
        rises = left[:, None] / to_come - 1 - here
        seen = np.maximum(told[:, places, 0].T, TELLING)
        own = np.zeros((len(places), 3))
        inside = rest.requests < len(self._own)
        own[inside] = self._own[rest.requests[inside], places[inside]]
        chosen = alike(own[:, 0], own[:, 1], here, variance, rng.random(remaining.shape))
        kept = lasting(rises, seen, to_come.mean(axis=1), variance)
        usual, each = rises.mean(axis=1), np.arange(len(places))
        return usual + kept * (rises[each, chosen] - usual), slots[each, chosen]

    def _is_full(self, batch: int) -> bool:
        """Whether a batch is in the octave of this call's largest one."""
        self._octave = max(self._octave, octave_of(batch))
        return octave_of(batch) == self._octave


def octave_of(batch: int) -> int:
    """The octave of a batch size. 17 to 32 is one octave, so that a call that starts at a power of two stays in it."""
    return max(batch - 1, 0).bit_length()


def alike(steps: np.ndarray, gained: np.ndarray, gains: np.ndarray, variance: float, drawn: np.ndarray) -> np.ndarray:
    """Pair requests with remembered ones, more likely with one of a similar mean gain: int64 `[scenarios, batch]`.

    Args:
        steps: float64 `[batch]`, steps of each request.
        gained: float64 `[batch]`, tokens that it gained in them.
        gains: float64, broadcast to `[batch, remembered]`, tokens that each remembered request gained per step.
        variance: Of a request's gain per step around its mean.
        drawn: float64 `[scenarios, batch]`, uniform in [0, 1).
    """
    mean = gained / np.maximum(steps, 1.0)
    distance = (mean[:, None] - gains) ** 2 * steps[:, None]
    distance -= distance.min(axis=1, keepdims=True)
    shares = np.cumsum(np.exp(-0.5 * distance / max(variance, _LEAST_VARIANCE)), axis=1)
    return ((drawn * shares[:, -1])[..., None] > shares).sum(axis=2)


def lasting(gains: np.ndarray, steps: np.ndarray, to_come: np.ndarray | float, variance: float) -> np.ndarray:
    """Share of the differences between `gains` (last axis) that is not luck.

    A mean over `steps`, fewer than those to come, also differs by luck, which will even out.
    """
    spread = gains.var(axis=-1)
    left = spread - variance * (1 / steps).mean(axis=-1) + variance / to_come
    share: np.ndarray = np.sqrt(np.clip(left / np.maximum(spread, 1e-9), 0.0, 1.0))
    return share


def _place(generated: np.ndarray) -> np.ndarray:
    """Place in a text of so many tokens: 0 for the first 15, then one for each octave."""
    place: np.ndarray = np.clip(np.ceil(np.log2(generated + 1.0)).astype(np.int64) - 4, 0, _PLACES - 1)
    return place


def _course(own: np.ndarray) -> np.ndarray:
    """Steps, and tokens and slots per step, at each place, from rows of `Courses._own`: float64 `[n, _PLACES, 3]`.

    A place without steps has the rates of the one before it. The first places have those of the first that is known.
    """
    course, pooled = own.copy(), np.zeros((len(own), 3))
    rates = np.full((len(own), 2), np.nan)
    for place in range(_PLACES):
        pooled += own[:, place]
        full = pooled[:, 0] >= TELLING
        rates[full] = pooled[full, 1:] / pooled[full, :1]
        pooled[full] = 0.0
        course[:, place, 1:] = rates
    for place in reversed(range(_PLACES - 1)):
        unknown = np.isnan(course[:, place, 1])
        course[unknown, place, 1:] = course[unknown, place + 1, 1:]
    return course
