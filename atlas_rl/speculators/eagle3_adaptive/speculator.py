"""EAGLE-3 as an adaptive drafter: it starts as a copy of a static head and is refined after every policy update.

Drafting is that of the static head (`eagle3/speculator.py`), which is kept unchanged beside it; learning is in
`learner.py`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atlas_rl.core import Prompts, Rollouts, Sequences, Verified
from atlas_rl.speculators.base import NO_PROMPTS
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3_adaptive.learner import OWNER, HeadLearner, RefineSettings
from atlas_rl.speculators.learning_budget import SHARE, Distilled, LearningBudget
from atlas_rl.speculators.saved_state import SavedState

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

_STATE_KIND, _STATE_VERSION = "atlas_rl.eagle3_adaptive", 1


class AdaptiveEagle3Speculator(Eagle3Speculator):
    """Drafts with an EAGLE-3 head that follows the policy.

    Args:
        head: A loaded head, which is copied, or the folder of a checkpoint.
        settings: Training settings.
        budget_share: Largest share of the time between two refreshes that the later one may take, divided among all
            heads that learn.
        clock: Returns seconds.

    Raises:
        ValueError: At `bind`: the checkpoint is damaged or belongs to another policy.

    Attributes:
        policy_version: Policy version of the latest refresh; -1 before.
        refreshes: Report of every refresh.
        budget: Time budget for learning.
        learner: Owns the copy that is trained; exists once the speculator is bound.
    """

    name = "eagle3_adaptive"

    def __init__(
        self,
        head: Eagle3Head | str | Path,
        *,
        settings: RefineSettings | None = None,
        budget_share: float = SHARE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(copy.deepcopy(head) if isinstance(head, Eagle3Head) else head)
        self.policy_version = -1
        self.refreshes: list[Distilled] = []
        self.budget = LearningBudget(budget_share, clock)
        self._settings, self._clock = settings or RefineSettings(), clock
        self.learner: HeadLearner
        self._follows = True  # whether the form of the policy's logits is known
        self._put_off: Callable[[], None] | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Load the head for this policy; what was learned with the previous policy is kept if the head is the same."""
        before = getattr(self, "learner", None)
        super().bind(policy, couples_noise)
        self.needs = replace(self.needs, head_inputs=True)
        self._follows, self._put_off = policy.form is not None, None
        if not self._follows:
            logger.warning(
                "atlas_rl: the policy's logits are no scaled or capped output of its LM head: the adaptive EAGLE-3 head "
                "cannot learn them and stays as it is"
            )
        self.learner = HeadLearner(self.head, self._settings, self._clock)
        if before is not None:
            self.learner.take_over(before)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """As for the static head; a new `Sequences` starts a new call."""
        super().start(sequences, requests, prompts, cache)
        if not self._follows:
            return
        self.learn()
        log = self.learner.log
        if log is None or log.sequences is not sequences:
            log = self.learner.begin_call(sequences, self._policy)
        log.start(prompts, self._policy)

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """As for the static head; `learn` logs the states later."""
        self.learn()
        super().observe(sequences, verified)
        log = self.learner.log
        if log is not None:
            self._put_off = partial(log.observe, verified, sequences.lengths[verified.requests], self._policy)

    def learn(self) -> None:
        """Log the latest tokens as training data for the refresh."""
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off()

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Learn from the newest rollouts, as long as the budget lasts."""
        with self.budget.refreshing(rollouts, self.name) as in_time:
            self.learn()
            super().refresh(rollouts, policy_version)
            self.policy_version = policy_version
            if self._follows:
                done = self.learner.refresh(rollouts, policy_version, self._policy, self.budget, in_time)
                if done is not None:
                    self.refreshes.append(done)
        return np.cumprod(self.refreshes[-1].by_position) if self.refreshes else None

    def shared(self) -> torch.Tensor | None:
        return self.learner.shared() if self._follows and hasattr(self, "learner") else None

    def take_shared(self, total: torch.Tensor) -> None:
        self.learner.take_shared(total)

    def weights(self) -> Iterable[torch.Tensor]:
        return (*super().weights(), *self.learner.trainee.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Learned state, and the head that it belongs to."""
        if not hasattr(self, "learner"):
            return {}
        self.learn()
        head = {"kind": _STATE_KIND, "version": _STATE_VERSION, "policy_version": self.policy_version}
        return head | self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. The state of another head gives a warning, and drafting starts from the static one.

        Raises:
            ValueError: The state is of another kind of speculator or another format, or damaged; nothing has changed
                then.
        """
        if isinstance(state, Mapping) and not state:
            return
        saved = SavedState(state, OWNER)
        saved.check_kind(_STATE_KIND, _STATE_VERSION)
        version = saved.policy_version()
        if not self.learner.fits(saved):
            logger.warning(
                "atlas_rl: the saved adaptive EAGLE-3 head drafts other tokens than the given one, from which it starts"
            )
            return
        self.learner.load_state_dict(saved)
        self.policy_version = version
