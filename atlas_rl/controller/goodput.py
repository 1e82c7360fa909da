"""The adaptive controller: chooses who drafts, for which requests and how far, for the most tokens per second.

The expected goodput of a step is its expected committed tokens over its seconds:

    G = (batch + sum of survival probabilities of the admitted draft slots) / (draft time + forward time(batch + slots))

A slot's survival probability is the product of the calibrated acceptance probabilities up to it. Slots are ranked over
the whole batch, and the likeliest n are admitted, with n where G peaks; n may be 0.

Drafters are asked one after the other, the cheapest first. Each is asked for the requests where it is expected to beat
the drafts made so far, and as far as that raises G. Drafts that are queued ahead, for all requests, are decided while the
device runs the step before; the others' drafts in that step stand for those they will make. Everything is learned in the
run: acceptance (`acceptance.py`), cost (`cost.py`), expected drafts (`draft_forecast.py`), and how far predictions come
true (`promises.py`). Every draft is scored on the committed tokens, whether or not it was verified (full information).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from atlas_rl.controller.arms import LEAST_TRIAL, NOT_ASKED, TRIAL_DEPTH, TRIALS, Arms, ask_next
from atlas_rl.controller.base import Admission, Controller, Step, step_record
from atlas_rl.controller.call_end import CallEnd
from atlas_rl.controller.cost import TICK_S, CostModels
from atlas_rl.controller.decision import BestDrafts, Decision
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.exposed import Exposed
from atlas_rl.controller.plain_steps import PlainSteps
from atlas_rl.controller.promises import DrafterModel, Kept, Pause, Prediction, Promise, discount
from atlas_rl.controller.slots import admitted, positive, take_better, weigh, within
from atlas_rl.core import Verified
from atlas_rl.counts import bounds

_DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, MAX_LOOKAHEAD])
_EXPLORED_SHARE = 0.003  # share of the time for calls that are not expected to pay


class GoodputController(Controller):
    """Maximises the expected goodput of every step, with any number of speculators (formula in the module docstring).

    Args:
        speculators: Names, in the order that `Admission.drafters` refers to.
        explain: Return a record of every step's expectations and outcome from `observe`.
    """

    plans_ahead = True

    def __init__(self, speculators: Sequence[str], *, explain: bool = False) -> None:
        self.speculators = tuple(speculators)
        self._models = {name: DrafterModel() for name in self.speculators}
        self._costs = CostModels()
        self._cost = self._costs.of()  # of a step without its drafting: forward, sampling, bookkeeping
        self._kept_drafting, self._kept_plain = Kept(), Kept()  # steps with verified drafts, and without
        self._plain_steps = PlainSteps()
        self._pause = Pause()
        self._end = CallEnd()
        self._exposed = Exposed()
        self._drawn_as: Hashable = None
        self._explain = explain
        self._at_hand: deque[Decision] = deque(maxlen=2)  # learning from a step happens while the next one runs
        self._ahead: Decision | None = None  # about the next step
        self._arms, self._worth = Arms(len(self.speculators)), 1.0
        self._tabulate()

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        backlogs, anybody = self._arms.backlogs, False
        for index, name in enumerate(self.speculators):
            is_left = name in step.ready and name not in step.drafts and name not in step.ahead
            backlogs[index] = step.backlog.get(name, 0) if is_left else NOT_ASKED
            anybody = anybody or is_left
        decision, batch = self._decision(step), step.batch
        if not step.drafts and not decision.began_ahead:
            decision.planned = self._considers(step, batch) if anybody else False
        if not decision.cost.num_observed:  # either the first step, or forwards have changed since it was planned ahead
            decision.planned, decision.promise = False, None
        if not anybody or not (decision.planned or step.drafts):
            return {}
        best = self._best_drafts(decision)
        if decision.is_drawn:
            # With a drawn draft present, asking another for the same request would depend on the drawn tokens.
            return {}
        return self._ask(best, decision, batch)

    def plan_ahead(self, step: Step, names: Sequence[str]) -> dict[str, int]:
        names = [name for name in names if name in self._models]
        if not names:
            return {}
        running = self._decision(step)
        others = [name for name in step.drafts if name not in names]
        coming = Step(step.room, step.context_tokens, names, drawn_as=step.drawn_as, rest=step.rest)
        coming.draft_s = {name: step.draft_s[name] for name in others}
        decision = self._ahead = Decision(coming, self._cost, began_ahead=True, extra_s=running.extra_s)
        decision.planned = self._considers(coming, step.batch)
        if not decision.planned:
            return {}
        for index, name in enumerate(self.speculators):
            self._arms.backlogs[index] = 0 if name in names else NOT_ASKED
        # The others are not asked yet. Drafts of a step resemble those of the step before.
        best = BestDrafts.none(step.batch, MAX_LOOKAHEAD)
        for name in others:
            at_hand = best.survival, best.gains, best.drafters
            take_better(*at_hand, running.survivals[name], self.speculators.index(name), MAX_LOOKAHEAD)
        plan = self._ask(best, decision, step.batch, for_all=True)
        return {name: int(wanted.max()) for name, wanted in plan.items()}

    def _considers(self, step: Step, batch: int) -> bool:
        """Whether to consider drafts of a step of `batch` requests. To be called once per step: pauses count steps."""
        if step.drawn_as != self._drawn_as:
            self._draw_as(step.drawn_as)
        return not (
            self._plain_steps.are_due(self._cost.num_samples(batch)) or self._end.holds_back or self._pause.holds(batch)
        )

    def admit(self, step: Step) -> Admission:
        decision = self._decision(step)
        admission = self._admission(step, decision)
        # Counted here, because the next step is planned before this one is observed.
        self._plain_steps.passed(drafted=bounds(admission.lengths)[1] > 0)
        if decision.planned:
            self._pause.observe(step.batch, decision.promise is not None)
        return admission

    def _admission(self, step: Step, decision: Decision) -> Admission:
        if decision.is_trial:
            best = self._best_drafts(decision)
            return Admission(best.drafters, (best.survival > 0).sum(axis=1))
        if not step.drafts:  # shortcut: most steps if drafting does not pay, and the device waits
            plain_s = self._cost.seconds(step.batch, step.context_tokens)
            decision.prediction = None if plain_s is None else Prediction(step.batch, plain_s)
            nothing = np.zeros(step.batch, np.int64)
            return Admission(nothing, nothing.copy())
        best = self._best_drafts(decision)
        return Admission(best.drafters, self._best_lengths(best.survival, decision))

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        decision, slots = self._decision(step), int(admission.lengths.sum())
        # A clock that is coarse, or stands still, may measure nothing.
        forward_s, step_s = max(forward_s, TICK_S), max(step_s - step.wasted_s, TICK_S)
        drafting_s = sum(step.draft_s.values(), self._exposed.observe(step))
        undrafted_s = max(step_s - drafting_s, TICK_S)
        if not slots:
            known = decision.cost.num_samples(step.batch)
            expected_s = decision.cost.seconds(step.batch, step.context_tokens)
            self._plain_steps.observe(step, forward_s, undrafted_s, expected_s, known)
        decision.cost.observe(step.batch + slots, undrafted_s, step.context_tokens)
        record = self._record(decision, admission, verified, forward_s, undrafted_s) if self._explain else None
        self._compare(decision, slots > 0, float(verified.num_committed.sum()), undrafted_s, step_s)
        for name in step.drafts:
            self._learn(name, decision, admission, verified)
        purses_s = self._arms.purses_s
        for index, (name, model) in enumerate(self._models.items()):
            if name in step.ready and name not in step.drafts and len(model.cost):
                purses_s[index] = min(purses_s[index] + _EXPLORED_SHARE * step_s, self._trial_s(name, step))
        self._end.observe(step, admission, verified, decision.cost, drafting_s, is_trial=decision.is_trial)
        self._at_hand.remove(decision)
        self._tabulate()
        self._cost.num_samples(step.batch)  # the next plan needs it, most likely
        return record

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self._pause = Pause()
        for name, model in self._models.items():
            model.acceptance.policy_updated()
            model.forecast.policy_updated(expected.get(name))
        self._tabulate()

    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        self._cost = self._costs.of(sizes)

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        plain_s = self._cost.seconds(batch, context_tokens)
        if plain_s is None or not self._cost.knows(batch):
            return None
        return self._plain_steps.forward_s(plain_s * self._cost.mean_over_median, self._cost.seconds)

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        return {name: model.acceptance.take_calibration() for name, model in self._models.items()}

    # ------------------------------------------------------------------------------------------------------- decisions

    def _decision(self, step: Step) -> Decision:
        """The decision about `step`; a step that was not planned gets one without drafts."""
        for decision in self._at_hand:
            if decision.step is step:
                return decision
        opened, self._ahead = self._ahead, None
        if opened is not None and step.planned_ahead:
            opened.go_on(step)
            self._at_hand.append(opened)
        else:
            self._at_hand.append(Decision(step, self._cost))
        decision = self._at_hand[-1]
        decision.cost, decision.extra_s = self._cost, self._exposed.extra_s[len(step.room).bit_length()]
        return decision

    def _draw_as(self, distribution: Hashable) -> None:
        self._drawn_as = distribution
        for model in self._models.values():
            model.acceptance.switch_to(distribution)

    def _best_drafts(self, decision: Decision) -> BestDrafts:
        """The most promising draft of each request so far."""
        best, drafts = decision.best, decision.step.drafts
        if best is not None and best.num_drafts == len(drafts):
            return best
        for draft in drafts.values():
            decision.is_drawn = decision.is_drawn or draft.draft_probs is not None
        # Rejection verification: whether a drawn token is verified must not depend on the token. Confidences of later
        # positions depend on it, so drafters are compared by first positions only.
        columns = 1 if decision.is_drawn else MAX_LOOKAHEAD
        if best is None or best.columns != columns:
            best = decision.best = BestDrafts.none(decision.step.batch, columns)
        survivals = decision.survivals
        for name in list(drafts)[best.num_drafts :]:
            at_hand = best.survival, best.gains, best.drafters, self.speculators.index(name), columns
            if name in survivals:
                take_better(*at_hand[:3], survivals[name], *at_hand[3:])
            else:
                # Once per step: what is learned from a step must not change its own expectations.
                confidence = np.ascontiguousarray(drafts[name].confidence, np.float32)
                tables = self._models[name].acceptance.tables()
                survivals[name] = weigh(confidence, drafts[name].lengths, *tables, *at_hand)
            best.num_drafts += 1
        return best

    def _ask(self, best: BestDrafts, decision: Decision, batch: int, *, for_all: bool = False) -> dict[str, np.ndarray]:
        """The drafter to ask next and the draft tokens of each request, int64 `[batch]`, given the best drafts so far.

        With `for_all` it is asked for all requests, or for none.
        """
        step = decision.step
        if self._arms.num_untried and (new := self._untried(batch)) is not None:
            decision.is_trial = self._is_new(batch)
            wanted, anybody = within(np.full(batch, TRIAL_DEPTH), step.room)
            if anybody:
                decision.beside[new] = best.survival[:, 0].copy()  # the best drafts change with the next one
                return {new: wanted}
        table, factor = self._cost.tables(batch * (MAX_LOOKAHEAD + 1), step.context_tokens)
        extra_s = decision.extra_s
        first_s, spent_s = (0.0, sum(step.draft_s.values(), extra_s)) if step.draft_s else (extra_s, 0.0)
        index, wanted, beside, goodput, is_trial = ask_next(
            best.survival, step.room, self._arms.backlogs, table, factor, spent_s, first_s, _DEPTHS, self._cost.edges,
            for_all, *self._arms.arrays,
        )  # fmt: skip
        if is_trial:
            decision.is_trial = self._is_new(batch)
        if index < 0:
            return {}
        name = self.speculators[index]
        decision.beside[name] = beside
        if goodput > 0:
            decision.promise = Promise(name, goodput)
        return {name: wanted}

    def _untried(self, batch: int) -> str | None:
        """The cheapest drafter of those that may be asked, if the time of its calls is not known; else None."""
        left = [name for name, tokens in zip(self.speculators, self._arms.backlogs, strict=True) if tokens != NOT_ASKED]
        if not left:
            return None
        costs = {name: self._models[name].cost for name in left}
        first = min(left, key=lambda name: costs[name].predict(batch, 1.0) if len(costs[name]) else 0.0)
        return first if len(costs[first]) < TRIALS else None

    def _is_new(self, batch: int) -> bool:
        """Whether a trial's draft is verified whole: its cost cannot be interpolated from smaller forwards.

        Decided by the tokens asked for, before anything is drawn: a draft with an ending token is shorter.
        """
        return self._cost.num_samples(batch * (1 + TRIAL_DEPTH)) < TRIALS

    def _trial_s(self, name: str, step: Step) -> float:
        """Seconds charged for a trial call, which is made to learn and is not expected to pay."""
        plain_s = self._cost.seconds(step.batch, step.context_tokens)
        least_s = 0.0 if plain_s is None else LEAST_TRIAL * plain_s
        draft_s = self._models[name].cost.predict(step.batch, float(TRIAL_DEPTH), step.backlog.get(name, 0))
        return max(draft_s + self._exposed.extra_s[step.batch.bit_length()], least_s)

    def _best_lengths(self, survival: np.ndarray, decision: Decision) -> np.ndarray:
        """Draft tokens to verify per request, int64 `[batch]`: the likeliest n slots of the batch; n maximises G."""
        step, batch = decision.step, decision.step.batch
        if not self._cost.num_observed:
            return np.zeros(batch, np.int64)
        values = positive(survival)
        values.sort()
        # The largest possible size. A size that depended on the slots would depend on ending tokens that were drawn,
        # and larger sizes bring newer measurements into the table.
        table, factor = self._cost.tables(batch * (MAX_LOOKAHEAD + 1), step.context_tokens)
        decided: tuple[np.ndarray, float, float] = admitted(
            survival, values, table, factor, self._drafting_s(decision), self._worth, decision.is_drawn
        )
        lengths, gained, forward_s = decided
        decision.prediction = Prediction(batch + gained, forward_s)
        return lengths

    def _drafting_s(self, decision: Decision) -> float:
        """Seconds of a step's drafts: measured, or expected if any of them was drawn.

        A drawn draft may have stopped at an ending token. Its measured time would reveal that, and must not influence
        whether the token is verified.
        """
        step, extra_s = decision.step, decision.extra_s
        if not decision.is_drawn:
            return sum(step.draft_s.values(), extra_s)
        expected = (
            self._models[name].cost.predict(
                int((asked > 0).sum()), float(asked.max(initial=0)), step.backlog.get(name, 0)
            )
            for name, asked in step.asked.items()
            if len(self._models[name].cost)
        )
        return sum(expected, extra_s)

    # -------------------------------------------------------------------------------------------------------- learning

    def _tabulate(self) -> None:
        """Write down what plans and admissions need, after something was learned."""
        self._worth = discount(self._kept_drafting, self._kept_plain)
        for index, model in enumerate(self._models.values()):
            self._arms.note(index, model, self._kept_plain)
        # A draft that would not be verified is not worth asking for.
        np.minimum(self._arms.worth, self._worth, out=self._arms.worth)

    def _compare(self, decision: Decision, drafted: bool, num_tokens: float, undrafted_s: float, step_s: float) -> None:
        """Compare the goodput of a step with its predictions.

        `admit` predicted it with the drafts known. `plan` promised it when the last drafter was asked; drafts that turn
        out worse than expected still cost their time.
        """
        step, plain = decision.step, self._kept_plain
        if decision.prediction is not None:
            tokens, seconds = decision.prediction
            (self._kept_drafting if drafted else plain).observe(num_tokens / undrafted_s, tokens / seconds)
        if decision.promise is not None:
            name, goodput = decision.promise
            self._models[name].kept.observe(num_tokens / step_s, goodput)
        # A choice that is not made yields no evidence about itself, so doubt about it fades until it is tried again.
        if (step.drafts or decision.planned) and not drafted:
            self._kept_drafting.fade(plain.mean)
        if decision.planned:
            for name, model in self._models.items():
                if name in step.ready and name not in step.drafts:
                    model.kept.fade(plain.mean)

    def _learn(self, name: str, decision: Decision, admission: Admission, verified: Verified) -> None:
        step, model = decision.step, self._models[name]
        draft, asked = step.drafts[name], step.asked[name]
        model.cost.observe(int((asked > 0).sum()), int(asked.max()), step.draft_s[name], step.backlog.get(name, 0))
        model.forecast.observe(decision.beside[name], decision.survivals[name], asked, draft.lengths)
        tried, accepted = verified.outcome_of(draft)
        if draft.draft_probs is not None:
            # Rejection accepts a drawn token more often than an independent draw equals it: only verified drafts count.
            used = (admission.drafters == self.speculators.index(name)) & (admission.lengths > 0)
            tried, accepted = np.where(used, verified.num_drafted, 0), np.where(used, verified.num_accepted, 0)
        model.acceptance.observe(draft.confidence, tried, accepted)

    def _record(
        self, decision: Decision, admission: Admission, verified: Verified, forward_s: float, undrafted_s: float
    ) -> dict[str, Any]:
        """Expectations and outcome of the step, as JSON values."""
        step, plain = decision.step, self._kept_plain
        tokens, seconds = decision.prediction or (None, None)
        return step_record(step, admission, verified, forward_s, self.speculators) | {
            "planned": decision.planned,
            "held_back": self._end.holds_back,
            "longest": int(admission.lengths.max(initial=0)),
            "discount": discount(self._kept_drafting, plain),
            "kept": {name: discount(model.kept, plain) for name, model in self._models.items()},
            "plain_forward_s": self.plain_forward_s(step.batch, step.context_tokens),
            "expected_tokens": tokens,
            "expected_undrafted_s": seconds,
            "undrafted_s": undrafted_s,
        }
