"""Controllers that decide the same in every step: always the same drafter, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atlas_rl.controller.base import Admission, Controller, Step, step_record
from atlas_rl.controller.cost import CostModels
from atlas_rl.core import Draft, Verified


class NoSpeculation(Controller):
    """Never drafts: plain decoding, one token per request and step.

    Args:
        explain: Return a record of every step from `observe`.
    """

    speculators = ()

    def __init__(self, *, explain: bool = False) -> None:
        self._explain = explain

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        return {}

    def admit(self, step: Step) -> Admission:
        return Admission(np.zeros(step.batch, np.int64), np.zeros(step.batch, np.int64))

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        return step_record(step, admission, verified, forward_s, self.speculators) if self._explain else None

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        """Do nothing: nothing is learned."""

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        return None


class FixedController(Controller):
    """Always uses one drafter with a fixed number of draft tokens: a baseline for comparisons.

    Args:
        speculators: Names, in the order that `Admission.drafters` refers to.
        drafter: Name of the one that drafts.
        num_draft_tokens: Draft tokens per request and step, at least 1; fewer if the drafter gives fewer.
        ahead: Whether its drafts are queued ahead where that is possible. They are the same, and the device waits less.

    Raises:
        ValueError: If `drafter` is not among `speculators`, or `num_draft_tokens` is below 1.
    """

    def __init__(self, speculators: Sequence[str], drafter: str, num_draft_tokens: int, *, ahead: bool = False) -> None:
        if drafter not in speculators:
            raise ValueError(f"no speculator '{drafter}' among {list(speculators)}")
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}: 0 is speculation=False")
        self.speculators = tuple(speculators)
        self._drafter = drafter
        self._index = list(speculators).index(drafter)
        self._num_draft_tokens, self.plans_ahead = num_draft_tokens, ahead
        self._costs = CostModels()
        self._cost = self._costs.of()

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        if self._drafter not in step.left:
            return {}
        return {self._drafter: np.minimum(step.room, self._num_draft_tokens)}

    def plan_ahead(self, step: Step, names: Sequence[str]) -> dict[str, int]:
        return {self._drafter: self._num_draft_tokens} if self._drafter in names else {}

    def admit(self, step: Step) -> Admission:
        # A drafter that is not ready was not asked and has no draft.
        drafted = step.drafts.get(self._drafter, Draft.empty(step.batch))
        return Admission(np.full(step.batch, self._index), drafted.lengths.copy())

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        self._cost.observe(step.batch + int(admission.lengths.sum()), forward_s, step.context_tokens)
        return None

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        """Do nothing: nothing is learned."""

    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        self._cost = self._costs.of(sizes)

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        plain_s = self._cost.seconds(batch, context_tokens)
        if plain_s is None or not self._cost.knows(batch):
            return None
        return plain_s * self._cost.mean_over_median
