"""Drafters whose head learns during the run: what they all do alike, each on top of its own way of drafting."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import numpy as np
import torch

from atlas_rl.core import Rollouts
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.learning_budget import Distilled, LearningBudget, SpareLesson
from atlas_rl.speculators.saved_state import SavedState

if TYPE_CHECKING:
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def trainable(method: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Leave a caller's inference mode, whose tensors could not be trained, and its autocast, which is meant for the policy.

    For everything that training touches.
    """

    @wraps(method)
    def outside(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with ExitStack() as left:
            left.enter_context(torch.inference_mode(False))
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                left.enter_context(torch.autocast(kind, enabled=False))
            return method(*args, **kwargs)

    return outside


def every_other(kept: np.ndarray, logged: Iterable[np.ndarray]) -> np.ndarray:
    """Half of the requests whose tokens are logged, at least one: bool `[n]`.

    Args:
        kept: bool `[n]`, requests whose tokens were logged so far.
        logged: Requests with tokens in the log. They come first, so that the log is not left empty.
    """
    seen, going = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
    for requests in logged:
        seen[requests] = True
    order = np.concatenate([np.flatnonzero(kept & seen), np.flatnonzero(kept & ~seen)])
    going[order[::2]] = True
    return going


class Learner(ABC):
    """Owns the weights that are trained, and the data to train them on."""

    @abstractmethod
    def refresh(
        self, rollouts: Rollouts, policy_version: int, policy: PolicyView, budget: LearningBudget, in_time: bool
    ) -> Distilled | None:
        """Learn from the newest rollouts.

        Args:
            rollouts: The newest rollouts.
            policy_version: Policy version from now on.
            policy: Provides the form of its logits.
            budget: Time budget, opened for this refresh.
            in_time: Whether there is time. The first refresh of an untrained head takes one step in any case.

        Returns:
            Report of the refresh; None if there was no time, or nothing to learn from.
        """

    def lesson(self, policy: PolicyView) -> SpareLesson | None:
        """Learning from the present call, which has no running requests, in time that nobody needs.

        Args:
            policy: Provides the form of its logits.

        Returns:
            The lesson, for `study`; None, the default, if there is nothing to learn from.
        """
        return None

    def study(self, lesson: SpareLesson) -> bool:
        """Do one piece of a lesson; returns whether another one is worth its time."""
        return lesson.advance()

    def end_lesson(self, lesson: SpareLesson) -> None:
        """End a lesson, perhaps in its middle; it is used no more."""
        lesson.end()

    @abstractmethod
    def shared(self) -> torch.Tensor | None:
        """See `Speculator.shared`. A rank that has not learned since the last mean adds zeros."""

    @abstractmethod
    def take_shared(self, total: torch.Tensor) -> None:
        """Set the head to the mean of all ranks' heads that have learned. Optimizer moments stay this rank's."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer moments, and what the weights belong to; no training data."""


OwnLearner = TypeVar("OwnLearner", bound=Learner)


class LearningSpeculator(Speculator, Generic[OwnLearner]):
    """A drafter that follows the policy. A subclass drafts and hands the tokens of a call to its learner.

    These rules hold for every drafter that learns:

    - During a call, tokens are only logged. The part of `observe` that no draft waits for is kept in `_put_off`, and done
      in `learn`, or before the next call, refresh or saved state. A call that is broken off drops it (`release`).
    - A refresh trains as long as the budget lasts. Survival on the newest rollouts tells the controller how good the
      head has become.
    - Between two calls it may learn on from the latest one (`study`), until `end_study`, a call or a refresh. Whatever
      reads or replaces the head ends that first: the head is then what it was at its best check.
    - Ranks share their heads' mean.
    - If the form of the policy's logits is unknown (`_follows` is False), nothing is logged or learned.

    Args:
        budget_share: Largest share of the time between two refreshes that the later one may take, divided among all
            heads that learn.
        clock: Returns seconds.

    Attributes:
        policy_version: Policy version of the latest refresh; -1 before.
        refreshes: Report of every refresh.
        budget: Time budget for learning.
        learner: Owns what is trained; a subclass makes it in `bind`.
    """

    learner: OwnLearner
    _policy: PolicyView
    _owner: str
    """Name of the drafter in errors and warnings."""
    _unlearned: str
    """What it does if it cannot learn, after the name of the drafter and "cannot learn them and"."""
    _state_format: tuple[str, int]
    """Kind and version of its saved state."""

    def __init__(self, budget_share: float, clock: Callable[[], float]) -> None:
        self.policy_version = -1
        self.refreshes: list[Distilled] = []
        self.budget = LearningBudget(budget_share, clock)
        self._clock = clock
        self._follows = True
        self._put_off: Callable[[], None] | None = None
        self._lesson: SpareLesson | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy, and follow it if the form of its logits is known."""
        self.end_study()
        super().bind(policy, couples_noise)
        self._policy = policy
        self._follows, self._put_off = policy.form is not None, None
        if not self._follows:
            logger.warning(
                "atlas_rl: the policy's logits are not a scaled or capped output of its LM head: the %s cannot learn them "
                "and %s", self._owner, self._unlearned,
            )  # fmt: skip

    def learn(self) -> None:
        """Log the latest tokens as training data for the refresh."""
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off()

    def release(self) -> None:
        """Drop the latest states of a call that was broken off; otherwise `learn` has logged them. The log stays."""
        super().release()
        self._put_off = None

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Learn from the newest rollouts, as long as the budget lasts."""
        with self.budget.refreshing(rollouts, self.name) as in_time:
            self.learn()
            self.end_study()
            self.policy_version = policy_version
            if self._follows:
                done = self.learner.refresh(rollouts, policy_version, self._bound(), self.budget, in_time)
                if done is not None:
                    self.refreshes.append(done)
        return np.cumprod(self.refreshes[-1].by_position) if self.refreshes else None

    def study(self) -> bool:
        if not (self._is_bound and self._follows):
            return False
        if self._lesson is None:
            self.learn()
            self._lesson = self.learner.lesson(self._bound())  # a piece of its own: it moves the call's tokens
            return self._lesson is not None
        return self.learner.study(self._lesson)

    def end_study(self) -> None:
        lesson, self._lesson = self._lesson, None
        if lesson is not None:
            self.learner.end_lesson(lesson)

    def shared(self) -> torch.Tensor | None:
        self.end_study()
        return self.learner.shared() if self._is_bound and self._follows else None

    def take_shared(self, total: torch.Tensor) -> None:
        self.end_study()
        self.learner.take_shared(total)

    def state_dict(self) -> dict[str, Any]:
        """Learned state, and what it belongs to; nothing before `bind`."""
        if not self._is_bound:
            return {}
        self.learn()
        self.end_study()
        kind, version = self._state_format
        return {"kind": kind, "version": version, "policy_version": self.policy_version, **self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. A state that belongs to another policy or head gives a warning and is left out.

        Raises:
            ValueError: The state is of another kind of speculator or another format, or damaged; nothing has changed
                then.
        """
        if isinstance(state, Mapping) and not state:
            return
        saved = SavedState(state, self._owner)
        saved.check_kind(*self._state_format)
        version = saved.policy_version()
        self.end_study()
        if self._restore(saved):
            self.policy_version = version

    @abstractmethod
    def _restore(self, saved: SavedState) -> bool:
        """Take over a saved learner's state; if it does not belong to this one, warn and return False.

        Raises:
            ValueError: The state is damaged; nothing has changed then.
        """

    @property
    def _is_bound(self) -> bool:
        return hasattr(self, "learner")

    def _bound(self) -> PolicyView:
        """The policy; `RuntimeError` before `bind`."""
        if not self._is_bound:
            raise RuntimeError(f"the {self._owner} has no policy yet: give it to an engine, or call bind(policy)")
        return self._policy
