"""How long a head may learn after a policy update: a share of the run's time, and no more of it than learning is worth.

The share is kept over the run, not only hoped for. Everything between `open` and `close` counts, and what a refresh took
beyond its budget is taken off the next ones: a head whose single step is dearer than its share skips refreshes.

Within the share, the time is halved while learning gains less than it costs, and doubled, up to the whole, while it pays. It
is whole again at once where what was lost since the last refresh is worth it: the policy jumped, or has a new task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlas_rl.core import Rollouts

SHARE = 0.05  # of the time since the refresh before, for all heads together
_LASTS_UPDATES = 4.0  # policy updates over which what was learned is worth something
_LEAST_CUT = 1 / 16  # of the budget: what is always spent, to see whether training pays again
_CHECK_EVERY = 8  # optimizer steps
_PATIENCE = 3  # checks without a better agreement after which training stops
_WORTH = 1e-3  # of agreement: what counts as better
_MAX_STEPS = 400


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean of `sum_x min(p(x), q(x))`: the acceptance that the best use of a head could reach.

    Attributes:
        by_position: At each position of a draft, float64 `[unroll]`.
        counts: Examples of each, int64 `[unroll]`.
    """

    by_position: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Over all examples."""
        return float(self.by_position @ self.counts / max(1, self.counts.sum()))


@dataclass(frozen=True, slots=True)
class Distilled:
    """What one refresh did.

    Attributes:
        num_steps: Optimizer steps.
        agreement_before, agreement_after: Mean over positions on the newest rollouts, see `Agreement`.
        by_position: The latter at each position of a draft, float64 `[unroll]`.
        seconds: Spent since the refresh began.
    """

    num_steps: int
    agreement_before: float
    agreement_after: float
    by_position: np.ndarray
    seconds: float


class LearningBudget:
    """See the module's docstring.

    A point of agreement is worth about a point of the time that generating takes, in this step and some more, where the head
    drafts everything. Where others' drafts are accepted as well, it is worth the head's share of that. A share that falls is
    believed half at a time: a head that is not asked for one call must not be left to age.

    Args:
        share: Most of the time between two refreshes that the later one takes.
        clock: Seconds.

    Attributes:
        opened_s: When the present refresh began, on the clock.
    """

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self._share, self._clock = share, clock
        self._heads = 1  # that divide the share
        self._closed_s = self.opened_s = clock()
        self._owed_s = self._whole_s = self._worth_s = 0.0
        self._cut = 1.0  # share of the budget that learning is worth
        self._use = 1.0  # share of what speculation saves that is the head's
        self._agreement: float | None = None  # after the refresh before
        self._measures = False  # whether anybody timed the generation
        self._has_learned = False  # since `open`

    def divide(self, heads: int) -> None:
        """So many heads learn beside each other, within one share."""
        self._heads = heads

    def open(self, rollouts: Rollouts, speculator: str) -> bool:
        """Begin a refresh.

        Args:
            rollouts: The newest.
            speculator: The head's name in their counts.

        Returns:
            Whether there is time to learn; False where earlier refreshes have spent it.
        """
        self.opened_s = self._clock()
        elapsed_s = max(0.0, self.opened_s - self._closed_s - rollouts.measuring_s)
        self._whole_s = self._share / self._heads * elapsed_s - self._owed_s
        use = rollouts.share_of(speculator)
        if use is not None:
            self._use = max(use, self._use / 2)
        self._measures = rollouts.generate_s is not None
        self._worth_s = (rollouts.generate_s or 0.0) * _LASTS_UPDATES * self._use
        return self._whole_s > 0

    def limit_s(self, agreement: float) -> float:
        """Most seconds since `open`, once the agreement before learning is known."""
        if self._agreement is not None and (self._agreement - agreement) * self._worth_s > self._whole_s:
            self._cut = 1.0
        return self._whole_s * self._cut

    def learned(self, done: Distilled) -> None:
        """What came of it."""
        self._agreement, self._has_learned = done.agreement_after, True
        if self._measures:
            pays = (done.agreement_after - done.agreement_before) * self._worth_s >= done.seconds
            self._cut = min(1.0, 2 * self._cut) if pays else max(_LEAST_CUT, self._cut / 2)

    def close(self) -> None:
        """End a refresh. Time that could not be spent for want of anything to learn from is kept for the next one."""
        self._closed_s = self._clock()
        owed_s = self._closed_s - self.opened_s - self._whole_s
        self._owed_s = max(0.0, owed_s) if self._has_learned else owed_s
        self._has_learned = False


def learn_in_time(
    step: Callable[[], None],
    check: Callable[[], Agreement],
    budget_s: Callable[[float], float],
    clock: Callable[[], float],
    began_s: float,
) -> Distilled:
    """Take optimizer steps until the budget is spent or the agreement on the newest rollouts stops rising.

    Args:
        step: Takes one; at least one is taken.
        check: Measures the agreement.
        budget_s: From the agreement before training to seconds, both checks included.
        clock: Seconds.
        began_s: On the clock, since when the budget counts.
    """
    before = best = check().mean
    limit_s, now = budget_s(before), clock()
    check_s, stale, taken = now - began_s, 0, 0
    while taken < _MAX_STEPS and stale < _PATIENCE:
        step()
        taken += 1
        last, now = now, clock()
        if now - began_s + (now - last) + check_s > limit_s:  # another step and the closing check would not fit
            break
        if taken % _CHECK_EVERY == 0:
            reached = check().mean
            stale, best = (0, reached) if reached > best + _WORTH else (stale + 1, best)
    after = check()
    return Distilled(taken, before, after.mean, after.by_position, clock() - began_s)


def divide_budget(speculators: Iterable[Any]) -> None:
    """Let all heads that learn share one budget."""
    budgets = [budget for each in speculators if isinstance(budget := getattr(each, "budget", None), LearningBudget)]
    for budget in budgets:
        budget.divide(len(budgets))
