"""The adaptive controller: chooses who drafts, for which requests and how far, for the most tokens per second.

The expected goodput of a step is its expected committed tokens over its seconds:

    G = (batch + sum of survival probabilities of the admitted draft slots) / (draft time + forward time(batch + slots))

A slot's survival probability is the product of the calibrated acceptance probabilities up to it. Slots are ranked over
the whole batch, and the likeliest n are admitted, with n where G peaks; n may be 0.

Drafters are asked one after the other, the cheapest first. Each is asked for the requests where it is expected to beat
the drafts made so far, and as far as that raises G. Everything is learned in the run: acceptance (`acceptance.py`),
cost (`cost.py`), expected drafts (`draft_forecast.py`), and how far predictions come true (`promises.py`). Every draft
is scored on the committed tokens, whether or not it was verified (full information).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_rl.controller.base import Admission, Controller, Step, step_record
from atlas_rl.controller.call_end import CallEnd
from atlas_rl.controller.cost import CostModels
from atlas_rl.controller.depth_search import decide
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.promises import DrafterModel, Kept, Pause, Prediction, Promise, discount
from atlas_rl.controller.slots import admitted, take_better, within
from atlas_rl.core import Verified
from atlas_rl.counts import bounds

_DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, MAX_LOOKAHEAD])
_TRIALS = 3  # calls before a drafter's cost estimate is used
_TRIAL_DEPTH = 4
_EXPLORED_SHARE = 0.003  # share of the time for calls that are not expected to pay
# Minimum cost charged to a trial call, as a share of a plain step: deciding and learning are not free.
_LEAST_TRIAL = 0.03
_PLAIN_EVERY = 100  # steps after which a step without drafts measures plain decoding anew
_PLAIN_KNOWN = 3  # forwards of about a size after which its cost is known: their median ignores one outlier
_PLAIN_APART = 4  # steps between plain steps while the size is not known yet
_PLAIN_SHARES = 16  # latest steps without drafts that give the forward's share of such a step


@dataclass(slots=True, eq=False)
class _Decision:
    """State of one step's decision: `plan` opens it, and `observe` closes it, perhaps after the next plan.

    Attributes:
        step: The step.
        planned: Whether drafters were considered: the step is neither plain on purpose nor skipped by a pause.
        is_trial: Whether its drafts are verified whole, to measure the cost of such a forward.
        promise: Goodput expected when the latest drafter was asked; None if none was expected to pay.
        prediction: What `admit` expected of the step; None in a trial, and before any forward was seen.
        beside: float64 `[batch]` per drafter asked: survival of the first token of the best draft at that moment.
        survivals: float64 `[batch, MAX_LOOKAHEAD]` per draft: survival of its slots.
        best: The most promising drafts so far; None until first needed.
    """

    step: Step
    planned: bool = False
    is_trial: bool = False
    promise: Promise | None = None
    prediction: Prediction | None = None
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    survivals: dict[str, np.ndarray] = field(default_factory=dict)
    best: _BestDrafts | None = None


@dataclass(slots=True)
class _BestDrafts:
    """The most promising draft of each request.

    Attributes:
        survival: float64 `[batch, MAX_LOOKAHEAD]`, survival of its slots; zero for a request without a draft.
        gains: float64 `[batch]`, sum of that over the first `columns` positions.
        drafters: int64 `[batch]`, index of its drafter.
        columns: Number of positions that drafters are compared by.
        num_drafts: Number of the step's drafts compared so far, in the order of arrival.
    """

    survival: np.ndarray
    gains: np.ndarray
    drafters: np.ndarray
    columns: int
    num_drafts: int = 0

    @classmethod
    def none(cls, batch: int, columns: int) -> _BestDrafts:
        """No drafts yet."""
        return cls(np.zeros((batch, MAX_LOOKAHEAD)), np.zeros(batch), np.zeros(batch, np.int64), columns)


class GoodputController(Controller):
    """Maximises the expected goodput of every step, with any number of speculators (formula in the module docstring).

    Args:
        speculators: Names, in the order that `Admission.drafters` refers to.
        explain: Return a record of every step's expectations and outcome from `observe`.
    """

    def __init__(self, speculators: Sequence[str], *, explain: bool = False) -> None:
        self.speculators = tuple(speculators)
        self._models = {name: DrafterModel() for name in self.speculators}
        self._costs = CostModels()
        self._cost = self._costs.of()  # of a step without its drafting: forward, sampling, bookkeeping
        self._plain_shares: deque[float] = deque(maxlen=_PLAIN_SHARES)  # the forward's share of steps without drafts
        self._kept_drafting, self._kept_plain = Kept(), Kept()  # steps with verified drafts, and without
        self._steps_since_plain = _PLAIN_EVERY  # the first step of a run is plain
        self._pause = Pause()
        self._end = CallEnd()
        self._drawn_as: Hashable = None
        self._explain = explain
        self._at_hand: deque[_Decision] = deque(maxlen=2)  # learning from a step happens while the next one runs

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        left = [name for name in self.speculators if name in step.ready and name not in step.drafts]
        decision = self._decision(step)
        if not step.drafts:
            self._draw_as(step.drawn_as)
            if not left or self._plain_due(step) or self._end.holds_back or self._pause.holds(step.batch):
                return {}
            decision.planned = True
        if not left or _any_drawn(step):
            # With a drawn draft present, asking another for the same request would depend on the drawn tokens.
            return {}
        best = self._best_drafts(decision)
        models = self._models
        if len(left) > 1:
            left.sort(key=lambda n: models[n].cost.predict(step.batch, 1.0) if len(models[n].cost) else 0.0)
        for name in left:
            wanted, anybody = within(self._wanted(name, best, decision), step.room)
            if anybody:
                decision.beside[name] = best.survival[:, 0].copy()  # a copy: the best drafts change with the next one
                return {name: wanted}
        return {}

    def admit(self, step: Step) -> Admission:
        decision = self._decision(step)
        admission = self._admission(step, decision)
        # Counted here, because the next step is planned before this one is observed.
        self._steps_since_plain = self._steps_since_plain + 1 if bounds(admission.lengths)[1] else 0
        if decision.planned:
            self._pause.observe(step.batch, decision.promise is not None)
        return admission

    def _admission(self, step: Step, decision: _Decision) -> Admission:
        if decision.is_trial:
            best = self._best_drafts(decision)
            return Admission(best.drafters, (best.survival > 0).sum(axis=1))
        plain_s = self._cost.seconds(step.batch, step.context_tokens)
        decision.prediction = None if plain_s is None else Prediction(step.batch, plain_s)
        if not step.drafts:  # shortcut: most steps if drafting does not pay, and the device waits
            nothing = np.zeros(step.batch, np.int64)
            return Admission(nothing, nothing.copy())
        best = self._best_drafts(decision)
        return Admission(best.drafters, self._best_lengths(best.survival, decision))

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        decision, slots = self._decision(step), int(admission.lengths.sum())
        undrafted_s = step_s - sum(step.draft_s.values())
        self._cost.observe(step.batch + slots, undrafted_s, step.context_tokens)
        if not slots:
            self._plain_shares.append(forward_s / undrafted_s)
        record = self._record(decision, admission, verified, forward_s, undrafted_s) if self._explain else None
        self._compare(decision, slots > 0, float(verified.num_committed.sum()), undrafted_s, step_s)
        for name in step.drafts:
            self._learn(name, decision, admission, verified)
        for name, model in self._models.items():
            if name in step.ready and name not in step.drafts and len(model.cost):
                model.purse_s = min(model.purse_s + _EXPLORED_SHARE * step_s, self._trial_s(name, step))
        self._end.observe(step, admission, verified, self._cost, is_trial=decision.is_trial)
        self._at_hand.remove(decision)
        return record

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self._pause = Pause()
        for name, model in self._models.items():
            model.acceptance.policy_updated()
            model.forecast.policy_updated(expected.get(name))

    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        self._cost = self._costs.of(sizes)

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        plain_s = self._cost.seconds(batch, context_tokens)
        if plain_s is None or not self._plain_shares or not self._cost.knows(batch):
            return None
        return plain_s * sum(self._plain_shares) / len(self._plain_shares)

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        return {name: model.acceptance.take_calibration() for name, model in self._models.items()}

    # ------------------------------------------------------------------------------------------------------- decisions

    def _decision(self, step: Step) -> _Decision:
        """The decision about `step`; a step that was not planned gets one without drafts."""
        for decision in self._at_hand:
            if decision.step is step:
                return decision
        self._at_hand.append(_Decision(step))
        return self._at_hand[-1]

    def _draw_as(self, distribution: Hashable) -> None:
        if distribution != self._drawn_as:
            self._drawn_as = distribution
            for model in self._models.values():
                model.acceptance.switch_to(distribution)

    def _plain_due(self, step: Step) -> bool:
        """Whether to measure a step without drafts.

        Drafting is compared with plain decoding, so plain decoding must have been measured at this batch size. If its
        cost were only inferred, say from one interrupted step, drafting could look free, and while every step has
        drafts, nothing would correct that.
        """
        seen = self._cost.num_samples(step.batch)
        return self._steps_since_plain >= (_PLAIN_EVERY if seen >= _PLAIN_KNOWN else _PLAIN_APART * (seen > 0))

    def _best_drafts(self, decision: _Decision) -> _BestDrafts:
        """The most promising draft of each request so far."""
        step = decision.step
        # Rejection verification: whether a drawn token is verified must not depend on the token. Confidences of later
        # positions depend on it, so drafters are compared by first positions only.
        columns = 1 if _any_drawn(step) else MAX_LOOKAHEAD
        best = decision.best
        if best is None or best.columns != columns:
            best = decision.best = _BestDrafts.none(step.batch, columns)
        for name in list(step.drafts)[best.num_drafts :]:
            own = self._survival(name, decision)
            take_better(best.survival, best.gains, best.drafters, own, self.speculators.index(name), columns)
            best.num_drafts += 1
        return best

    def _survival(self, name: str, decision: _Decision) -> np.ndarray:
        """Survival probability of every slot of a draft: float64 `[batch, MAX_LOOKAHEAD]`, zero past a row's length.

        Computed once per step: what is learned from a step must not change its own expectations.
        """
        if name not in decision.survivals:
            draft = decision.step.drafts[name]
            decision.survivals[name] = self._models[name].acceptance.survival(draft.confidence, draft.lengths)
        return decision.survivals[name]

    def _wanted(self, name: str, best: _BestDrafts, decision: _Decision) -> np.ndarray:
        """Draft tokens to ask of one drafter per request, given the best drafts so far: int64 `[batch]`."""
        model, step, batch = self._models[name], decision.step, decision.step.batch
        if len(model.cost) < _TRIALS:
            decision.is_trial = self._is_new(batch)
            return np.full(batch, _TRIAL_DEPTH)
        table, factor = self._cost.tables(batch * (MAX_LOOKAHEAD + 1), step.context_tokens)
        shares, levels = model.cost.tables()
        knows = model.cost.knows(batch)
        wanted, goodput, anybody = decide(
            best.survival, step.room, model.forecast.tables(), table, factor, sum(step.draft_s.values(), 0.0),
            # Draft cost is not extrapolated from large batches to small ones. If a draft would pay at zero cost, it is
            # tried once and timed.
            shares if knows else shares[:0], levels, step.backlog.get(name, 0), _DEPTHS,
            discount(model.kept, self._kept_plain), self._cost.edges,
        )  # fmt: skip
        if anybody:
            if not knows:
                # Ask for all requests, so that the cost of such a call is known afterwards.
                decision.is_trial = self._is_new(batch)
                return np.full(batch, _TRIAL_DEPTH)
            decision.promise = Promise(name, goodput)
            return wanted
        cost_s = self._trial_s(name, step)
        if model.purse_s >= cost_s:
            model.purse_s -= cost_s
            wanted[:] = _TRIAL_DEPTH
        return wanted

    def _is_new(self, batch: int) -> bool:
        """Whether a trial's draft is verified whole: its cost cannot be interpolated from smaller forwards.

        Decided by the tokens asked for, before anything is drawn: a draft with an ending token is shorter.
        """
        return self._cost.num_samples(batch * (1 + _TRIAL_DEPTH)) < _TRIALS

    def _trial_s(self, name: str, step: Step) -> float:
        """Seconds charged for a trial call, which is made to learn and is not expected to pay."""
        plain_s = self._cost.seconds(step.batch, step.context_tokens)
        least_s = 0.0 if plain_s is None else _LEAST_TRIAL * plain_s
        draft_s = self._models[name].cost.predict(step.batch, float(_TRIAL_DEPTH), step.backlog.get(name, 0))
        return max(draft_s, least_s)

    def _best_lengths(self, survival: np.ndarray, decision: _Decision) -> np.ndarray:
        """Draft tokens to verify per request, int64 `[batch]`: the likeliest n slots of the batch; n maximises G."""
        step, batch = decision.step, decision.step.batch
        if decision.prediction is None:
            return np.zeros(batch, np.int64)
        values = survival[survival > 0]
        values.sort()
        # The largest possible size. A size that depended on the slots would depend on ending tokens that were drawn,
        # and larger sizes bring newer measurements into the table.
        table, factor = self._cost.tables(batch * (MAX_LOOKAHEAD + 1), step.context_tokens)
        worth = discount(self._kept_drafting, self._kept_plain)
        lengths, gained, forward_s = admitted(
            survival, values, table, factor, self._drafting_s(step), worth, _any_drawn(step)
        )
        decision.prediction = Prediction(batch + gained, forward_s)
        return np.asarray(lengths)

    def _drafting_s(self, step: Step) -> float:
        """Seconds of a step's drafts: measured, or expected if any of them was drawn.

        A drawn draft may have stopped at an ending token. Its measured time would reveal that, and must not influence
        whether the token is verified.
        """
        if not _any_drawn(step):
            return sum(step.draft_s.values(), 0.0)
        expected = (
            self._models[name].cost.predict(
                int((asked > 0).sum()), float(asked.max(initial=0)), step.backlog.get(name, 0)
            )
            for name, asked in step.asked.items()
            if len(self._models[name].cost)
        )
        return sum(expected, 0.0)

    # -------------------------------------------------------------------------------------------------------- learning

    def _compare(
        self, decision: _Decision, drafted: bool, num_tokens: float, undrafted_s: float, step_s: float
    ) -> None:
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
        if step.drafts and not drafted:
            self._kept_drafting.fade(plain.mean)
        if decision.planned:
            for name in step.ready:
                if name not in step.drafts:
                    self._models[name].kept.fade(plain.mean)

    def _learn(self, name: str, decision: _Decision, admission: Admission, verified: Verified) -> None:
        step, model = decision.step, self._models[name]
        draft, asked = step.drafts[name], step.asked[name]
        model.cost.observe(int((asked > 0).sum()), int(asked.max()), step.draft_s[name], step.backlog.get(name, 0))
        model.forecast.observe(decision.beside[name], self._survival(name, decision), asked, draft.lengths)
        tried, accepted = verified.outcome_of(draft)
        if draft.draft_probs is not None:
            # Rejection accepts a drawn token more often than an independent draw equals it: only verified drafts count.
            used = (admission.drafters == self.speculators.index(name)) & (admission.lengths > 0)
            tried, accepted = np.where(used, verified.num_drafted, 0), np.where(used, verified.num_accepted, 0)
        model.acceptance.observe(draft.confidence, tried, accepted)

    def _record(
        self, decision: _Decision, admission: Admission, verified: Verified, forward_s: float, undrafted_s: float
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


def _any_drawn(step: Step) -> bool:
    """Whether some draft was drawn from probabilities, and is therefore verified by rejection."""
    return any(draft.draft_probs is not None for draft in step.drafts.values())
