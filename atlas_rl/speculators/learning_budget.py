"""Limits how long a head may learn after a policy update: to a share of the run's time, and to what learning is worth.

The share holds over the whole run. All time between `open` and `close` counts, and if a refresh takes longer than its
budget, the next ones get less. Within the share, the time is halved while learning gains less than it costs, and doubled,
up to the whole, while it pays. It rises with what learning is worth, and is whole again at once if the loss of agreement
since the last refresh is worth it: the policy jumped, or has a new task.

A refresh takes at least two checks and an optimizer step. While its time is cut to less than that, it is skipped, and the
time is saved for a later one. After four skipped ones the head is looked at in any case, so that a jump is found.

A `SpareLesson` has no budget: it is learning in time that nobody else needs, in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlas_rl.core import Rollouts

SHARE = 0.05  # of the time since the previous refresh, for all heads together
_LASTS_UPDATES = 4.0  # policy updates over which learning keeps its worth
_LEAST_CUT = 1 / 16  # least share of the budget, always spent to see whether training pays again
_CHECK_EVERY = 8  # optimizer steps
_PATIENCE = 3  # checks without a better agreement after which training stops
_WORTH = 1e-3  # gain of agreement that counts as better
_MAX_STEPS = 400


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean of `sum_x min(p(x), q(x))`: the highest acceptance that any use of a head could reach.

    Attributes:
        by_position: Mean at each draft position, float64 `[unroll]`.
        counts: Examples at each position, int64 `[unroll]`.
    """

    by_position: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over all examples."""
        return float(self.by_position @ self.counts / max(1, self.counts.sum()))


@dataclass(frozen=True, slots=True)
class Distilled:
    """Report of one refresh.

    Attributes:
        num_steps: Optimizer steps.
        agreement_before, agreement_after: Mean over positions on the newest rollouts, see `Agreement`.
        by_position: `agreement_after` at each draft position, float64 `[unroll]`.
        seconds: Seconds since the refresh began.
    """

    num_steps: int
    agreement_before: float
    agreement_after: float
    by_position: np.ndarray
    seconds: float


class LearningBudget:
    """Time budget of a head; see the module docstring.

    If the head drafts everything, a point of agreement is worth about a point of the generation time, in this step and
    a few more. If other drafters' drafts are accepted too, it is worth the head's share of that. A falling share is
    lowered by at most half at a time, so that a head that was not asked for one call is not left to age.

    Args:
        share: Largest share of the time between two refreshes that the later one may take.
        clock: Returns seconds.

    Attributes:
        opened_s: Start of the present refresh, on the clock.
    """

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self._share, self._clock = share, clock
        self._heads = 1  # number of heads that divide the share
        self._closed_s = self.opened_s = clock()
        self._owed_s = self._whole_s = self._worth_s = 0.0
        self._cut = 1.0  # share of the budget that is spent
        self._learned_cut, self._learned_worth_s = 1.0, 0.0  # after the latest refresh that learned
        self._least_s = 0.0  # what the latest refresh took that could not have been shorter
        self._saved_s = 0.0  # the present refresh's time, and that of skipped ones before it
        self._use = 1.0  # the head's share of what speculation saves
        self._agreement: float | None = None  # after the previous refresh
        self._measures = False  # whether the generation was timed
        self._has_tried = False  # whether the head has ever begun to learn, with or without success
        self._skipped = 0  # refreshes in a row, up to the present one, whose time did not suffice
        self._earns_credit = True  # whether the time that the present refresh leaves is kept for the next one

    def divide(self, heads: int) -> None:
        """Divide the share among this many heads."""
        self._heads = heads

    @contextmanager
    def refreshing(self, rollouts: Rollouts, speculator: str) -> Iterator[bool]:
        """Open for a refresh, which is the body, and close after it; an error in the body earns no credit.

        Args and the yielded value: as for `open`.
        """
        in_time = self.open(rollouts, speculator)
        failed = True
        try:
            yield in_time
            failed = False
        finally:
            self._earns_credit = self._earns_credit and not failed
            self.close()

    def open(self, rollouts: Rollouts, speculator: str) -> bool:
        """Begin a refresh.

        Args:
            rollouts: The newest rollouts.
            speculator: The head's name in their counts.

        Returns:
            Whether there is time to learn; False if earlier refreshes have spent it, or if it does not suffice yet.
        """
        self.opened_s = self._clock()
        elapsed_s = max(0.0, self.opened_s - self._closed_s - rollouts.measuring_s)
        self._whole_s = self._share / self._heads * elapsed_s - self._owed_s
        use = rollouts.share_of(speculator)
        if use is not None:
            self._use = max(use, self._use / 2)
        self._measures = rollouts.generate_s is not None
        self._worth_s = (rollouts.generate_s or 0.0) * _LASTS_UPDATES * self._use
        known, rise = self._learned_worth_s, 1.0
        if self._worth_s > known:
            rise = self._worth_s / known if known else float("inf")
        self._cut = min(1.0, self._learned_cut * rise)
        self._saved_s += max(0.0, self._whole_s * self._cut)
        # Never more than the whole: a refresh that takes longer is paid by the next ones.
        suffices = self._saved_s >= min(self._least_s, self._whole_s)
        self._skipped = self._skipped + 1 if not suffices and self._skipped < _LASTS_UPDATES else 0
        return self._whole_s > 0 and not self._skipped

    def limit_s(self, agreement: float) -> float:
        """Most seconds since `open`, given the agreement before learning."""
        if self._agreement is not None and (self._agreement - agreement) * self._worth_s > self._whole_s:
            self._cut, self._saved_s = 1.0, max(self._saved_s, self._whole_s)
        return self._saved_s

    def owes_first_step(self, trained: bool) -> bool:
        """Whether the head takes a step even if there is no time: it has neither learned nor tried to."""
        return not (trained or self._has_tried)

    def begin_learning(self) -> None:
        """The head begins to learn: this refresh earns no credit, whether it succeeds, raises or is undone."""
        self._has_tried, self._earns_credit = True, False

    def learned(self, done: Distilled) -> None:
        """Record the result of learning."""
        self._agreement = done.agreement_after
        if done.num_steps == 1:
            self._least_s = done.seconds
        if self._measures:
            pays = (done.agreement_after - done.agreement_before) * self._worth_s >= done.seconds
            self._cut = min(1.0, 2 * self._cut) if pays else max(_LEAST_CUT, self._cut / 2)
            self._learned_worth_s = self._worth_s
        self._learned_cut = self._cut

    def close(self) -> None:
        """End a refresh. If there was nothing to learn from, unspent time is a credit for the next one.

        Of a skipped refresh, only what was saved is left.
        """
        self._closed_s = self._clock()
        owed_s = self._closed_s - self.opened_s - self._whole_s
        self._owed_s = owed_s if self._earns_credit and not self._skipped else max(0.0, owed_s)
        if not self._skipped:
            self._saved_s = 0.0
        self._earns_credit = True


class LearningProgress:
    """Says when learning is over: the agreement stopped rising, or there were enough steps.

    Args:
        agreement: The agreement before the first step.
    """

    def __init__(self, agreement: float) -> None:
        self.taken = 0
        self._best, self._stale = agreement, 0

    @property
    def over(self) -> bool:
        """Whether to take no more steps."""
        return self.taken >= _MAX_STEPS or self._stale >= _PATIENCE

    def stepped(self) -> bool:
        """Count a step; returns whether the agreement is to be measured now."""
        self.taken += 1
        return self.taken % _CHECK_EVERY == 0

    def reached(self, agreement: float) -> None:
        """Record the agreement after the steps so far."""
        better = agreement > self._best + _WORTH
        self._stale, self._best = (0, agreement) if better else (self._stale + 1, self._best)


class SpareLesson:
    """Learning in pieces, each so short that a request can wait for it: an optimizer step, or a check.

    It ends as `learn_in_time` does without a limit; `check` should measure on texts that `step` does not learn from, since
    there may be time for many steps. If the agreement has fallen since the best check, the steps after that are undone.
    Steps after the latest check are kept where that was the best one: many a lesson is broken off before its next check.

    Args:
        step: Takes one optimizer step.
        check: Measures the agreement.
        keep: Copies what is learned; returns a function that puts the copy back.
    """

    def __init__(
        self, step: Callable[[], None], check: Callable[[], Agreement], keep: Callable[[], Callable[[], None]]
    ) -> None:
        self._step, self._check, self._keep = step, check, keep
        self._progress: LearningProgress | None = None
        self._check_is_due = False
        self._best = 0.0
        self._put_back: Callable[[], None] | None = None  # what was learned at the best check
        self._is_worse = False  # than at the best check, or unknown because a step raised

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far."""
        return 0 if self._progress is None else self._progress.taken

    def advance(self) -> bool:
        """Do one piece; returns whether another one is worth its time."""
        progress = self._progress
        if progress is not None and progress.over:
            return False
        if progress is None or self._check_is_due:
            progress = self._checked()
        else:
            was_worse, self._is_worse = self._is_worse, True
            self._step()
            self._is_worse = was_worse
            self._check_is_due = progress.stepped()
        if progress.over:
            self.end()
        return not progress.over

    def _checked(self) -> LearningProgress:
        """Measure the agreement, and keep what is learned if it is the best."""
        self._check_is_due, agreement = False, self._check().mean
        if self._progress is None:
            self._progress = LearningProgress(agreement)
        else:
            self._progress.reached(agreement)
        self._is_worse = self._put_back is not None and not agreement >= self._best  # NaN is worse
        if not self._is_worse:
            self._put_back, self._best = self._keep(), agreement
        return self._progress

    def end(self) -> bool:
        """Go back to the best check if the head is worse now; returns whether it did."""
        put_back, is_worse = self._put_back, self._is_worse
        self._put_back, self._is_worse = None, False
        if put_back is None or not is_worse:
            return False
        put_back()
        return True


def learn_in_time(
    step: Callable[[], None],
    check: Callable[[], Agreement],
    budget_s: Callable[[float], float],
    clock: Callable[[], float],
    began_s: float,
) -> Distilled:
    """Take optimizer steps until the budget is spent or the agreement on the newest rollouts stops rising.

    Args:
        step: Takes one optimizer step; called at least once.
        check: Measures the agreement.
        budget_s: Maps the agreement before training to the budget in seconds, which includes both checks.
        clock: Returns seconds.
        began_s: Start of the budget, on the clock.
    """
    before = check().mean
    progress = LearningProgress(before)
    limit_s, now = budget_s(before), clock()
    check_s = now - began_s
    while not progress.over:
        step()
        check_is_due = progress.stepped()
        last, now = now, clock()
        if now - began_s + (now - last) + check_s > limit_s:  # another step and the closing check would not fit
            break
        if check_is_due:
            progress.reached(check().mean)
    after = check()
    return Distilled(progress.taken, before, after.mean, after.by_position, clock() - began_s)


def divide_budget(speculators: Iterable[Any]) -> None:
    """Let all heads that learn share one budget."""
    budgets = [budget for each in speculators if isinstance(budget := getattr(each, "budget", None), LearningBudget)]
    for budget in budgets:
        budget.divide(len(budgets))
