"""EAGLE-3 as an adaptive drafter: it starts as a copy of a static head and is refined after every policy update.

Drafting is that of the static head (`eagle3/speculator.py`), which is kept unchanged beside it; learning is in
`learner.py`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlas_rl.core import Prompts, Rollouts, Sequences, Verified
from atlas_rl.speculators.base import NO_PROMPTS
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3_adaptive.learner import OWNER, Eagle3Learner, RefineSettings
from atlas_rl.speculators.learning import LearningSpeculator
from atlas_rl.speculators.learning_budget import SHARE
from atlas_rl.speculators.saved_state import SavedState

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)


class AdaptiveEagle3Speculator(LearningSpeculator[Eagle3Learner], Eagle3Speculator):
    """Drafts with an EAGLE-3 head that follows the policy.

    Args:
        head: A loaded head, which is copied, or the folder of a checkpoint.
        settings: Training settings.
        budget_share: See `LearningSpeculator`, here and for the next one.
        clock: Returns seconds.

    Raises:
        ValueError: At `bind`: the checkpoint is damaged or belongs to another policy.
    """

    name = "eagle3_adaptive"
    _owner, _unlearned = OWNER, "stays as it is"
    _state_format = "atlas_rl.eagle3_adaptive", 1

    def __init__(
        self,
        head: Eagle3Head | str | Path,
        *,
        settings: RefineSettings | None = None,
        budget_share: float = SHARE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        LearningSpeculator.__init__(self, budget_share, clock)
        Eagle3Speculator.__init__(self, copy.deepcopy(head) if isinstance(head, Eagle3Head) else head)
        self._settings = settings or RefineSettings()

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Load the head for this policy; what was learned with the previous policy is kept if the head is the same."""
        before = self.learner if self._is_bound else None
        super().bind(policy, couples_noise)
        self.needs = replace(self.needs, head_inputs=True)
        self.learner = Eagle3Learner(self.head, self._settings, self._clock)
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

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Learn from the newest rollouts. First free the cache of requests that still run: training needs the memory."""
        Eagle3Speculator.release(self)  # the static head's part: `learn` has yet to log the latest states
        return super().refresh(rollouts, policy_version)

    def weights(self) -> Iterable[torch.Tensor]:
        return (*super().weights(), *self.learner.trainee.parameters())

    def _restore(self, saved: SavedState) -> bool:
        """Take over the state of a learner whose head drafts the same tokens."""
        self._bound()
        if not self.learner.fits(saved):
            logger.warning(
                "atlas_rl: the saved adaptive EAGLE-3 head drafts other tokens than the given one, from which it starts"
            )
            return False
        self.learner.load_state_dict(saved)
        return True
