"""The controller: which speculators draft, for whom and how far, so that tokens per second are most.

Expected goodput of a step is expected committed tokens over time:

    G = (batch + sum of survival probabilities of the admitted draft slots) / (draft time + forward time(batch + slots))

A slot's survival probability is the product of the calibrated acceptance probabilities up to it. Slots are ranked over
the whole batch and the best n are admitted, with n where G peaks; n = 0 is an answer.

Speculators are asked one after the other, the cheapest first, and what is there already counts: a costly one is asked for
the requests where it is expected to do better than that, as far as it raises G. What to expect of a speculator before it has
drafted is in `expectation.py`; acceptance (`acceptance.py`) and cost (`cost.py`) are learned in the run. Whoever was asked
is scored on the tokens that were committed, whether or not its draft was used (full information).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_rl.controller.acceptance import AcceptanceModel
from atlas_rl.controller.base import Admission, Controller, Step, step_record
from atlas_rl.controller.cost import CostModel, DraftCost
from atlas_rl.controller.depth_search import search
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD, Expectation
from atlas_rl.core import Verified

_DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, MAX_LOOKAHEAD])
_TRIALS = 3  # calls before a speculator's cost is believed
_TRIAL_DEPTH = 4
_STEADY_BACKLOG = 2  # committed tokens per request that a speculator has to run if it drafts in every step
_EXPLORED_SHARE = 0.003  # of the time, for asking a speculator that is not expected to pay
_LEAST_TRIAL = (
    0.03  # of a plain step: what such a call counts for at least, as it has to be weighed and learned from as well
)
_KEPT_STEPS = 20.0  # about the last twenty steps tell how much of the predicted goodput is kept
_KEPT_PRIOR_STEPS, _KEPT_PRIOR_SPREAD = 3.0, 0.1  # before any evidence, as if three steps had missed by a tenth
_OUTLIER = 0.25  # log of realised over predicted beyond which a step says no more: the machine was interrupted
_DOUBT_FADES = 0.01  # per plain step: a hundred of them forget most of what spoke against drafting
_PLAIN_EVERY = 100  # steps after which a step without drafts measures anew what no speculation costs
_PLAIN_KNOWN = 3  # forwards of about a size after which its cost is known: their median shrugs off one
_PLAIN_APART = 4  # steps between those that are made for that
_FORWARD_STEPS = 16  # latest steps whose forwards' part is remembered
_PATIENCE = 3  # plans in a row that asked nobody before planning pauses
_LONGEST_PAUSE = 8  # steps
_SAME_BATCH = (
    7 / 8
)  # a pause ends when fewer of its requests are left than that: a smaller batch may be worth drafting for


@dataclass(slots=True)
class _Kept:
    """Log of realised over predicted goodput of one kind of step: mean and variance over the recent ones."""

    mean: float = 0.0
    variance: float = _KEPT_PRIOR_SPREAD**2
    num_steps: float = _KEPT_PRIOR_STEPS

    def observe(self, surprise: float) -> None:
        self.num_steps = min(self.num_steps + 1, _KEPT_STEPS)
        deviation = surprise - self.mean
        self.mean += deviation / self.num_steps
        self.variance += (deviation**2 - self.variance) / self.num_steps

    def fade(self, towards: float) -> None:
        """A step of this kind was not made."""
        self.mean += _DOUBT_FADES * (towards - self.mean)


def _surprise(goodput: float, predicted: float) -> float:
    return min(max(math.log(goodput / predicted), -_OUTLIER), _OUTLIER)


@dataclass(slots=True)
class _Arm:
    """What is known of one speculator."""

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    expectation: Expectation = field(default_factory=Expectation)
    cost: DraftCost = field(default_factory=DraftCost)
    kept: _Kept = field(default_factory=_Kept)  # of what was expected when it was asked, drafting included
    purse_s: float = 0.0  # seconds it may spend on being asked without being expected to pay


@dataclass(slots=True)
class _Pause:
    """When not even to plan: a plan costs as much as a few draft tokens, and where nothing pays nothing else is lost.

    After some plans in a row that asked nobody it leaves one out, then two, and so on.
    """

    num_vain: int = 0  # plans in a row that asked nobody
    steps_left: int = 0  # to the next plan
    batch: int = 0  # requests when it began

    def holds(self, batch: int) -> bool:
        """Whether to leave out the plan of a step of `batch` requests; asked once per step."""
        if not _SAME_BATCH * self.batch <= batch <= self.batch:
            self.steps_left = 0
        self.steps_left -= self.steps_left > 0
        return self.steps_left > 0

    def observe(self, batch: int, asked: bool) -> None:
        """A step was planned; whether anybody was asked because it was expected to pay."""
        self.num_vain = 0 if asked else self.num_vain + 1
        self.steps_left, self.batch = min(max(0, self.num_vain - _PATIENCE), _LONGEST_PAUSE) + 1, batch


@dataclass(slots=True)
class _Choice:
    """What the drafts of a step are worth.

    Attributes:
        survival: float64 `[batch, MAX_LOOKAHEAD]`, of the draft that each request would use.
        arms: int64 `[batch]`, whose it is.
    """

    survival: np.ndarray
    arms: np.ndarray


class GoodputController(Controller):
    """Goodput maximisation as in the module's docstring, for any number of speculators.

    Args:
        speculators: Names, in the order that `Admission.arms` refers to.
        explain: Give a record of every step's expectations and outcome from `observe`.
    """

    def __init__(self, speculators: Sequence[str], *, explain: bool = False) -> None:
        self.speculators = tuple(speculators)
        self._arms = {name: _Arm() for name in self.speculators}
        self._cost = CostModel()  # of a step but for drafting: forward, sampling, bookkeeping
        self._forward_shares: deque[float] = deque(maxlen=_FORWARD_STEPS)  # of that, the forward's part
        self._explain = explain
        self._steps_since_plain = _PLAIN_EVERY  # the first step of a run is plain
        self._pause = _Pause()
        self._planned: Step | None = None  # the latest step that was
        self._predicted: tuple[float, float] | None = None  # tokens and seconds that the last decision expected
        self._promised: tuple[str, float] | None = (
            None  # who was asked last in the step at hand, and goodput expected of it
        )
        self._kept = {True: _Kept(), False: _Kept()}  # of steps with drafts, and of plain ones
        self._there: dict[str, np.ndarray] = {}  # what each speculator was asked beside, in the step at hand
        self._trial = False  # whether what is drafted in the step at hand is verified whole, to see what that costs
        self._drawn_as: Hashable = None
        self._step: Step | None = None
        self._survivals: dict[str, np.ndarray] = {}  # of the step at hand

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        left = [name for name in self.speculators if name in step.ready and name not in step.drafts]
        if not step.drafts:
            self._promised, self._trial = None, False
            self._turn_to(step.drawn_as)
            if not left or self._plain_due(step) or self._pause.holds(step.batch):
                return {}
            self._planned = step
        if not left or any(draft.draft_probs is not None for draft in step.drafts.values()):
            # Once a drawn draft is there, whether another is asked for the same request would depend on the drawn tokens.
            return {}
        there = self._choose(step)
        for name in sorted(left, key=lambda n: self._arms[n].cost.predict(step.batch, 1.0) if self._tried(n) else 0.0):
            wanted = np.minimum(step.room, self._wanted(name, there, step))
            if wanted.any():
                self._there[name] = there.survival[:, 0]
                return {name: wanted}
        return {}

    def admit(self, step: Step) -> Admission:
        there = self._choose(step)
        table = self._cost.predict(step.batch, step.context_tokens)
        self._predicted = None if table is None else (step.batch, float(table[step.batch]))
        if self._trial:
            self._predicted = None
            return Admission(there.arms, (there.survival > 0).sum(axis=1))
        return Admission(there.arms, self._best_lengths(there.survival, step))

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        slots = int(admission.lengths.sum())
        self._steps_since_plain = self._steps_since_plain + 1 if slots else 0
        if step is self._planned:
            self._pause.observe(step.batch, self._promised is not None)
        undrafted_s = step_s - sum(step.draft_s.values())
        self._cost.observe(step.batch + slots, undrafted_s, step.context_tokens)
        self._forward_shares.append(forward_s / undrafted_s)
        record = self._record(step, admission, verified, forward_s, undrafted_s) if self._explain else None
        self._compare(step, slots > 0, float(verified.num_committed.sum()), undrafted_s, step_s)
        for name in step.drafts:
            self._learn(name, step, admission, verified)
        for name, arm in self._arms.items():
            if name in step.ready and name not in step.drafts and len(arm.cost):
                arm.purse_s = min(arm.purse_s + _EXPLORED_SHARE * step_s, self._trial_s(name, step))
        return record

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self._pause = _Pause()
        for name, arm in self._arms.items():
            arm.acceptance.policy_updated()
            arm.expectation.policy_updated(expected.get(name))

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        table = self._cost.predict(batch, context_tokens)
        return None if table is None else float(table[batch]) * sum(self._forward_shares) / len(self._forward_shares)

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        return {name: arm.acceptance.take_calibration() for name, arm in self._arms.items()}

    # ------------------------------------------------------------------------------------------------------- decisions

    def _turn_to(self, drawn_as: Hashable) -> None:
        if drawn_as != self._drawn_as:
            self._drawn_as = drawn_as
            for arm in self._arms.values():
                arm.acceptance.drawn(drawn_as)

    def _plain_due(self, step: Step) -> bool:
        """Whether to measure a step without drafts.

        What drafting is compared with must have been seen. Where it is only inferred, from one step that was interrupted
        say, drafting may look free; and while everything is drafted, nothing would ever contradict it.
        """
        seen = self._cost.num_samples(step.batch)
        return self._steps_since_plain >= (_PLAIN_EVERY if seen >= _PLAIN_KNOWN else _PLAIN_APART * (seen > 0))

    def _tried(self, name: str) -> bool:
        return len(self._arms[name].cost) > 0

    def _choose(self, step: Step) -> _Choice:
        """The most promising draft of each request."""
        survival, arms = np.zeros((step.batch, MAX_LOOKAHEAD)), np.zeros(step.batch, np.int64)
        # Draws that rejection verifies: whether a token is verified must not depend on the token. A later position's
        # confidence is computed from it, so a row's arm is chosen by first positions.
        drawn = any(draft.draft_probs is not None for draft in step.drafts.values())
        best = np.zeros(step.batch)
        for name in step.drafts:
            own = self._survival(name, step)
            gain = (own[:, :1] if drawn else own).sum(axis=1)
            better = gain > best
            survival[better], best[better] = own[better], gain[better]
            arms[better] = self.speculators.index(name)
        return _Choice(survival, arms)

    def _survival(self, name: str, step: Step) -> np.ndarray:
        """Survival probability of every slot: float64 `[batch, MAX_LOOKAHEAD]`, zero past a row's length."""
        if step is not self._step:
            self._step, self._survivals = step, {}
        if name not in self._survivals:
            draft = step.drafts[name]
            width = min(draft.confidence.shape[1], MAX_LOOKAHEAD)
            estimate = self._arms[name].acceptance.estimate(draft.confidence[:, :width])
            present = np.arange(width)[None] < draft.lengths[:, None]
            survival = np.zeros((step.batch, MAX_LOOKAHEAD))
            survival[:, :width] = np.cumprod(np.where(present, estimate, 0.0), axis=1)
            self._survivals[name] = survival
        return self._survivals[name]

    def _wanted(self, name: str, there: _Choice, step: Step) -> np.ndarray:
        """Draft tokens to ask of one speculator per request, given the drafts that are there: int64 `[batch]`."""
        arm, batch = self._arms[name], step.batch
        if len(arm.cost) < _TRIALS:
            self._trial = self._is_new(batch)
            return np.full(batch, _TRIAL_DEPTH)
        spent_s = sum(step.draft_s.values())
        expected = arm.expectation.survival(there.survival[:, 0])
        expected[:, np.arange(MAX_LOOKAHEAD)[None] >= step.room[:, None]] = 0.0
        better = expected.mean(axis=0).sum(axis=1) > there.survival.sum(axis=1)
        table = self._cost.predict(batch * (MAX_LOOKAHEAD + 1), step.context_tokens)
        assert table is not None, "a plain step comes before the first plan"
        # It costs least for the requests where it is expected to do better; all of them where it costs no more.
        asked = [int(better.sum()), batch]
        draft_s = np.stack([np.full(len(_DEPTHS), spent_s), *(spent_s + self._draft_s(name, n, step) for n in asked)])
        whom, index, goodput = search(
            there.survival, expected, better, table, draft_s, _DEPTHS, self._discount(arm.kept)
        )
        wanted = np.zeros(batch, np.int64)
        if whom:
            wanted[better if whom == 1 else slice(None)] = _DEPTHS[index]
        if wanted.any():
            if not arm.cost.knows(batch):
                self._trial = self._is_new(batch)
                return np.full(batch, _TRIAL_DEPTH)  # all of them, so that it is known afterwards
            self._promised = name, goodput
            return wanted
        cost_s = self._trial_s(name, step)
        if arm.purse_s >= cost_s:
            arm.purse_s -= cost_s
            wanted[:] = _TRIAL_DEPTH
        return wanted

    def _is_new(self, batch: int) -> bool:
        """Whether a trial's draft is verified whole: such a forward is not on the line through smaller ones.

        Decided by what is asked for, before anything is drawn: a draft that drew an ending token is shorter.
        """
        return self._cost.num_samples(batch * (1 + _TRIAL_DEPTH)) < _TRIALS

    def _trial_s(self, name: str, step: Step) -> float:
        """What a call costs that is made to see what comes."""
        table = self._cost.predict(step.batch, step.context_tokens)
        least_s = 0.0 if table is None else _LEAST_TRIAL * float(table[step.batch])
        draft_s = self._arms[name].cost.predict(step.batch, float(_TRIAL_DEPTH), step.backlog.get(name, 0))
        return max(draft_s, least_s)

    def _draft_s(self, name: str, rows: int, step: Step) -> np.ndarray:
        """Seconds of a draft for so many requests, to every depth: float64 `[num_depths]`."""
        cost = self._arms[name].cost
        if not cost.knows(step.batch):
            # What such a call costs is not known, and elsewhere it may have cost more: where it would pay if it were free,
            # it is tried.
            return np.zeros(len(_DEPTHS))
        # What it missed while it was not asked it has to run once, what the last steps committed every time.
        return cost.predict(rows, _DEPTHS, min(step.backlog.get(name, 0), _STEADY_BACKLOG * rows))

    def _best_lengths(self, survival: np.ndarray, step: Step) -> np.ndarray:
        """Admit the n likeliest slots of the batch, n where goodput peaks: int64 `[batch]`."""
        if self._predicted is None or not survival.any():
            return np.zeros(step.batch, np.int64)
        rows, positions = np.nonzero(survival)
        order = np.lexsort((positions, -survival[rows, positions]))  # a row's slots stay in order: survival never rises
        best, tokens, seconds = self._num_admitted(survival, step)
        self._predicted = tokens, seconds
        return np.bincount(rows[order[:best]], minlength=step.batch).astype(np.int64)

    def _num_admitted(self, survival: np.ndarray, step: Step) -> tuple[int, float, float]:
        """How many slots to admit, in falling order of survival; tokens and seconds (but for drafting) expected of it."""
        batch = step.batch
        values = survival[survival > 0]
        values[::-1].sort()
        table = self._cost.predict(batch + len(values), step.context_tokens)
        assert table is not None, "a plain step comes before the first plan"
        gained = np.concatenate([[0.0], np.cumsum(values)])
        seconds = table[batch : batch + len(values) + 1]
        # Drafting is paid for whatever is admitted; like the rest of the step it makes another slot relatively cheaper.
        whole_s = seconds + self._drafting_s(step)
        if any(draft.draft_probs is not None for draft in step.drafts.values()):
            # Slot by slot, until the next one does not pay: whether one is admitted then depends on likelier slots alone,
            # never on a later one of its own row. The discount goes on what each slot brings, for the same reason.
            goodput = (batch + self._discount(self._kept[True]) * gained) / whole_s
            stops = np.flatnonzero(np.diff(goodput) <= 0)
            best = int(stops[0]) if len(stops) else len(values)
        else:
            goodput = (batch + gained) / whole_s
            goodput[1:] *= self._discount(self._kept[True])
            best = int(np.argmax(goodput))
        return best, float(batch + gained[best]), float(seconds[best])

    def _drafting_s(self, step: Step) -> float:
        """Seconds that the drafts of a step took.

        Of drawn drafts, what such a call is expected to take: one that drew an ending token may have stopped there, and what
        the clock then says must not reach the decision whether that token is verified.
        """
        if all(draft.draft_probs is None for draft in step.drafts.values()):
            return sum(step.draft_s.values())
        return sum(
            self._arms[name].cost.predict(
                int((asked > 0).sum()), float(asked.max(initial=0)), step.backlog.get(name, 0)
            )
            for name, asked in step.asked.items()
            if self._tried(name)
        )

    def _discount(self, drafted: _Kept) -> float:
        """Factor on the predicted goodput of drafting: what such steps have kept of it, against what plain steps have.

        What the models do not see (sampling rounds, bookkeeping, a ragged batch, optimism where n was chosen because it
        looked best) is in there, and only there. The standard error is taken off as well: a gain that this machine's
        step times cannot tell from noise is not worth the risk of a loss.
        """
        plain = self._kept[False]
        # Noise of step times is the machine's, whatever the step: one variance, so that plain steps tell it as well.
        num_steps = drafted.num_steps + plain.num_steps
        variance = (drafted.variance * drafted.num_steps + plain.variance * plain.num_steps) / num_steps
        error = math.sqrt(variance / drafted.num_steps + variance / plain.num_steps)
        return math.exp(min(0.0, drafted.mean - plain.mean) - error)

    # -------------------------------------------------------------------------------------------------------- learning

    def _compare(self, step: Step, drafted: bool, num_tokens: float, undrafted_s: float, step_s: float) -> None:
        """Note how much of its predicted goodput a step kept.

        Of what was predicted when the drafts were there, for `admit`; and with drafting, of what was predicted when the last
        of them was asked for, for `plan`: drafts that come out worse than expected are paid for all the same.
        """
        plain = self._kept[False]
        if self._predicted is not None:
            tokens, seconds = self._predicted
            self._kept[drafted].observe(_surprise(num_tokens / undrafted_s, tokens / seconds))
        if self._promised is not None:
            name, goodput = self._promised
            self._arms[name].kept.observe(_surprise(num_tokens / step_s, goodput))
        # Nothing is learned about what is not done: doubt fades, and it is tried again.
        if step.drafts and not drafted:
            self._kept[True].fade(plain.mean)
        if step is self._planned:
            for name in step.ready:
                if name not in step.drafts:
                    self._arms[name].kept.fade(plain.mean)

    def _learn(self, name: str, step: Step, admission: Admission, verified: Verified) -> None:
        arm, draft, asked = self._arms[name], step.drafts[name], step.asked[name]
        arm.cost.observe(int((asked > 0).sum()), int(asked.max()), step.draft_s[name], step.backlog.get(name, 0))
        arm.expectation.observe(self._there[name], self._survival(name, step), asked, draft.lengths)
        tried, accepted = verified.outcome_of(draft)
        if draft.draft_probs is not None:
            # Rejection accepts a draw more often than an independent draw equals it: only its own verdicts count.
            used = (admission.arms == self.speculators.index(name)) & (admission.lengths > 0)
            tried, accepted = np.where(used, verified.num_drafted, 0), np.where(used, verified.num_accepted, 0)
        arm.acceptance.observe(draft.confidence, tried, accepted)

    def _record(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, undrafted_s: float
    ) -> dict[str, Any]:
        """What was expected of the step, and what came."""
        tokens, seconds = self._predicted or (None, None)
        return step_record(step, admission, verified, forward_s, self.speculators) | {
            "planned": step is self._planned,
            "longest": int(admission.lengths.max(initial=0)),
            "discount": self._discount(self._kept[True]),
            "kept": {name: self._discount(arm.kept) for name, arm in self._arms.items()},
            "plain_forward_s": self.plain_forward_s(step.batch, step.context_tokens),
            "expected_tokens": tokens,
            "expected_undrafted_s": seconds,
            "undrafted_s": undrafted_s,
        }
