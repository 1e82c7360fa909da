"""Forecasts when a call ends if drafting goes on, and if it stops.

A call is over when its last request is. The goodput of a step counts every token alike, so it misses this: requests
with lucky drafts leave early, the others take as many steps as before, and each of those steps costs more. So the end
of the call is forecast:

    T = mean over scenarios of the sum over steps of (forward time(active requests + their draft slots) + draft time)

where request i is active for `remaining_i / rate_i` steps. In plain decoding every rate is one token per step, and there are
no slots. With drafts, a request takes rate and slots from a similar request in a batch of about this size. Similarity
shows only after some steps; before that, a request may be like any other, and the slowest decides. The remaining length
is unknown, too. A scenario draws both. No drafts are asked for while they would make T longer. If gains
change along the texts as in earlier calls (`courses.py`), T may still be shorter: drafts go on if it is in every scenario.

While requests wait for a row, they take the places of those that end, and every token counts alike.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from atlas_rl.controller.base import Admission, Rest, Step
from atlas_rl.controller.cost import CostModel
from atlas_rl.controller.courses import ENOUGH, REMEMBERED, TELLING, WEIGHED, Courses, alike, lasting, octave_of
from atlas_rl.core import Verified

_SCENARIOS = 16
_EVERY = 8  # steps between forecasts
_SAME_BATCH = 7 / 8  # a batch below this share of the latest forecast's batch triggers a new forecast
# After `TELLING` steps with drafts a request that ended, or changed octave, is evidence about other requests.
_TELLING_NOW = 8  # the same for a running request: a larger part of its gain so far is luck
_MEMORY = 24.0  # steps that a request's mean covers
_VARIANCE_MEMORY = 0.05
_FIRST_RETRY, _LAST_RETRY = 8, 64  # calls, mostly held back, after which drafts are tried again


class CallEnd:
    """Decides whether drafts would make the call end later. Learns from every step, and across calls.

    Attributes:
        holds_back: Whether to stop drafting, because drafts would make the call end later.
    """

    def __init__(self) -> None:
        self.holds_back = False
        self._gains, self._courses = _Gains(), Courses()
        self._lengths: deque[int] = deque(maxlen=REMEMBERED)  # completion lengths
        self._rng = np.random.default_rng(0)
        self._steps, self._batch = 0, 0  # steps since the latest forecast; its batch
        self._retry = _Retry()

    def observe(
        self,
        step: Step,
        admission: Admission,
        verified: Verified,
        cost: CostModel,
        drafting_s: float,
        *,
        is_trial: bool = False,
    ) -> None:
        """Learn from a step of which drafting took `drafting_s`, and renew the forecast at intervals.

        Steps without `rest` are ignored. Drafts of a trial do not count as drafts: they are not chosen to pay.
        """
        rest, ended = step.rest, verified.finished
        if rest is None:
            return
        if begins := bool((rest.generated <= 1).all()):
            whole, anew = self._retry.mostly_drafted, self._retry.call_begins()
            self._gains.call_begins(anew=anew)
            self._courses.call_begins(len(rest.requests), whole=whole, anew=anew)
        drafted = bool(admission.lengths.any()) and not is_trial
        self._retry.observe(drafted=drafted, held_back=self.holds_back)
        if drafted:
            self._courses.observe(rest, admission.lengths, verified.num_accepted)
            self._gains.observe(rest.requests, admission.lengths, verified.num_accepted, drafting_s)
        self._lengths.extend((rest.generated + verified.num_committed)[ended].tolist())
        self._gains.archive(rest.requests[ended])
        self._steps += 1
        batch = step.batch - int(ended.sum())
        if batch and (begins or self._steps >= _EVERY or batch < _SAME_BATCH * self._batch):
            self._steps, self._batch = 0, batch
            goes_on, committed = ~ended, verified.num_committed
            after = Rest(
                rest.requests[goes_on], (rest.generated + committed)[goes_on], (rest.left - committed)[goes_on],
                rest.num_waiting,
            )  # fmt: skip
            self.holds_back = self._drafts_end_later(after, step.context_tokens * batch // step.batch, cost)

    def _drafts_end_later(self, rest: Rest, context_tokens: int, cost: CostModel) -> bool:
        if rest.num_waiting:
            return False
        remaining = self._remaining(rest)
        drawn = self._gains.scenarios(rest.requests, float(remaining.mean()), self._rng)
        if drawn is None:
            return False
        plain_s = self._seconds(remaining, None, context_tokens, cost)
        if self._seconds(remaining, drawn, context_tokens, cost).mean() <= plain_s.mean():
            return False
        # Drafts may still get better along the texts. Near a tie that is doubtful, hence every scenario has to agree.
        changes = self._courses.changes(rest, remaining, self._gains.variance, self._rng)
        if changes is None:
            return True
        changed = np.maximum(drawn[0] + changes[0], 0.0), changes[1]
        return not (self._seconds(remaining, changed, context_tokens, cost) < plain_s).all()

    def _seconds(
        self,
        remaining: np.ndarray,
        drawn: tuple[np.ndarray, np.ndarray] | None,
        context_tokens: int,
        cost: CostModel,
    ) -> np.ndarray:
        """Seconds to the end in each scenario: float64 `[_SCENARIOS]`. `drawn`: gains and slots; None without drafts."""
        none = np.zeros_like(remaining)
        gained, slots = drawn or (none, none)
        batch = remaining.shape[1]
        most = batch + int(slots.sum(axis=1).max()) + 1
        table, bare = cost.predict(most, context_tokens), cost.predict(batch, 0)
        assert table is not None, "a step was observed"
        assert bare is not None
        # The cost of reading the context is a factor on the forward that shrinks as requests end.
        share = np.linspace(bare[batch] / table[batch], 1.0, batch + 1)
        draft_s = self._gains.drafting_s(batch) if drawn else np.zeros(batch + 1)
        return seconds_to_end(remaining, 1 + gained, slots, table, share, draft_s)

    def _remaining(self, rest: Rest) -> np.ndarray:
        """Tokens left for each request, drawn from completions at least that long: float64 `[_SCENARIOS, batch]`."""
        lengths = np.sort(np.array(self._lengths, np.int64))
        longer = np.searchsorted(lengths, rest.generated, side="right")
        place = longer + self._rng.random((_SCENARIOS, len(longer))) * (len(lengths) - longer)
        # If no completion was that long, the request runs to its limit.
        drawn = np.append(lengths, np.iinfo(np.int64).max)[np.minimum(place.astype(np.int64), len(lengths))]
        return np.clip(drawn - rest.generated, 1, np.maximum(rest.left, 1)).astype(np.float64)


class _Gains:
    """Tokens gained by drafts per request and step, and the slots and seconds of drafts, by octave of the batch."""

    def __init__(self) -> None:
        self._own = np.zeros((0, 4))  # per request: steps; sums of gained tokens, of their squares, of slots
        self._octave = np.zeros(0, np.int64)  # per request: octave that its counts come from
        self._told: dict[int, deque[tuple[float, float, float]]] = {}  # per request: steps, tokens and slots per step
        self._draft_s: dict[int, float] = {}
        self.variance = 1.0  # variance of a request's gain per step around its own mean

    def call_begins(self, *, anew: bool) -> None:
        """A new call begins and reuses request numbers. `anew` also forgets earlier calls."""
        self._own[:] = 0.0
        if anew:
            self._told.clear()

    def observe(self, requests: np.ndarray, slots: np.ndarray, gained: np.ndarray, draft_s: float) -> None:
        """Learn from a step with drafts: verified and accepted tokens, int64 `[batch]` each."""
        octave = octave_of(len(requests))
        if (more := int(requests.max()) + 1 - len(self._own)) > 0:
            self._own, self._octave = np.pad(self._own, ((0, more), (0, 0))), np.pad(self._octave, (0, more))
        self.archive(requests[self._octave[requests] != octave])
        own = self._own[requests]
        own *= np.minimum(1.0, (_MEMORY - 1) / np.maximum(own[:, :1], 1.0))
        own += np.stack([np.ones(len(requests)), gained, gained**2, slots], axis=1)
        self._own[requests], self._octave[requests] = own, octave
        self._draft_s[octave] = self._draft_s.get(octave, draft_s) * 0.8 + 0.2 * draft_s
        telling = own[own[:, 0] >= TELLING]
        if len(telling):
            within = (telling[:, 2] - telling[:, 1] ** 2 / telling[:, 0]) / (telling[:, 0] - 1)
            self.variance += _VARIANCE_MEMORY * (float(within.mean()) - self.variance)

    def archive(self, requests: np.ndarray) -> None:
        """Store the gains of requests that end or change octave, and reset their counts."""
        requests = requests[requests < len(self._own)]
        telling = requests[self._own[requests, 0] >= TELLING]
        for octave, one in zip(self._octave[telling].tolist(), _told(self._own[telling]).tolist(), strict=True):
            self._told.setdefault(octave, deque(maxlen=REMEMBERED)).append(tuple(one))
        self._own[requests] = 0.0

    def scenarios(
        self, requests: np.ndarray, remaining: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens gained and slots used per step: float64 `[_SCENARIOS, batch]` each; None without evidence.

        Each request is paired with a request that has evidence, more likely with one of a similar mean gain.
        `remaining` is the mean number of tokens left per request.
        """
        octave, inside = octave_of(len(requests)), requests < len(self._own)
        known = requests[inside]
        own = np.zeros((len(requests), 4))
        own[inside] = self._own[known] * (self._octave[known] == octave)[:, None]
        told = np.concatenate([
            np.array(self._told.get(octave, ())).reshape(-1, 3), _told(own[own[:, 0] >= _TELLING_NOW]),
        ])  # fmt: skip
        if len(told) < ENOUGH:
            return None
        if len(told) > WEIGHED:
            told = told[rng.choice(len(told), WEIGHED, replace=False)]
        steps, gains, slots = told.T
        chosen = alike(own[:, 0], own[:, 1], gains, self.variance, rng.random((_SCENARIOS, len(requests))))
        kept = lasting(gains, steps, remaining / (1 + gains.mean()), self.variance)
        return gains.mean() + kept * (gains - gains.mean())[chosen], slots[chosen]

    def drafting_s(self, batch: int) -> np.ndarray:
        """Seconds of a step's drafts for 0, 1, ... `batch` requests, from the nearest octave: float64 `[batch + 1]`."""
        near = [min(self._draft_s, key=lambda known: abs(known - own)) for own in range(octave_of(batch) + 1)]
        return np.array([self._draft_s[near[octave_of(active)]] for active in range(batch + 1)])


class _Retry:
    """Decides when to draft again after calls without drafts, since drafters and policy have changed meanwhile."""

    def __init__(self) -> None:
        self._drafted, self._held_back = 0, 0  # steps of this call
        self._vain, self._after = 0, _FIRST_RETRY

    def observe(self, *, drafted: bool, held_back: bool) -> None:
        """Count a step."""
        self._drafted += drafted
        self._held_back += held_back

    @property
    def mostly_drafted(self) -> bool:
        """Whether this call was held back in no more steps than it had with drafts."""
        return self._held_back <= self._drafted

    def call_begins(self) -> bool:
        """Count the call that ended; returns whether to start from nothing."""
        if self.mostly_drafted:
            self._vain, self._after = 0, _FIRST_RETRY
        else:
            self._vain += 1
        self._drafted, self._held_back = 0, 0
        if self._vain < self._after:
            return False
        self._vain, self._after = 0, min(2 * self._after, _LAST_RETRY)
        return True


def _told(own: np.ndarray) -> np.ndarray:
    """Steps, and tokens and slots per step, from rows of `_Gains._own`: float64 `[n, 3]`."""
    return np.stack([own[:, 0], own[:, 1] / own[:, 0], own[:, 3] / own[:, 0]], axis=1)


def seconds_to_end(
    remaining: np.ndarray,
    rate: np.ndarray,
    slots: np.ndarray,
    table: np.ndarray,
    share: np.ndarray,
    draft_s: np.ndarray,
) -> np.ndarray:
    """Seconds until all requests have ended: float64 `[scenarios]`.

    Args:
        remaining: float64 `[scenarios, batch]`, tokens.
        rate: float64 `[scenarios, batch]`, tokens per step.
        slots: float64 `[scenarios, batch]`, draft tokens verified per step.
        table: float64, seconds of a forward over 0, 1, ... tokens while all requests are active.
        share: float64 `[batch + 1]`, factor on `table` for 0, 1, ... `batch` active requests.
        draft_s: float64 `[batch + 1]`, seconds of the drafts for as many requests.
    """
    steps = remaining / rate
    order = steps.argsort(axis=1)
    until = np.take_along_axis(steps, order, axis=1)
    tokens = 1 + np.take_along_axis(slots, order, axis=1)
    active = np.arange(steps.shape[1], 0, -1)  # before each request ends
    verified = np.rint(tokens[:, ::-1].cumsum(axis=1)[:, ::-1]).astype(np.int64)
    step_s = table[verified] * share[active] + draft_s[active]
    seconds: np.ndarray = (np.diff(until, axis=1, prepend=0.0) * step_s).sum(axis=1)
    return seconds
