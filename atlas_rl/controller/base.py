"""The interface of controllers, and the one that always does the same.

A controller decides in every decode step which speculators draft, for which requests and how far, and how much of what they
drafted is verified. Pure logic over numpy arrays: no tensors, and no clock but the times it is told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_rl.controller.cost import CostModel
from atlas_rl.core import Draft, Verified


@dataclass(slots=True)
class Step:
    """One decode step before its forward.

    Attributes:
        room: int64 `[batch]`, most draft tokens each active request can still use.
        context_tokens: Committed tokens of all active requests.
        ready: Speculators that can draft now.
        asked: int64 `[batch]` per speculator asked so far in this step: most tokens wanted.
        drafts: What they drafted; every draft has a row for every request.
        draft_s: Seconds that took.
        backlog: `Speculator.backlog`, of all requests; once a speculator was asked, of those it drafted for.
        drawn_as: How tokens are drawn, whatever tells ways apart: acceptance at one temperature says little of another.
    """

    room: np.ndarray
    context_tokens: int
    ready: Sequence[str]
    asked: dict[str, np.ndarray] = field(default_factory=dict)
    drafts: dict[str, Draft] = field(default_factory=dict)
    draft_s: dict[str, float] = field(default_factory=dict)
    backlog: dict[str, int] = field(default_factory=dict)
    drawn_as: Hashable = None

    @property
    def batch(self) -> int:
        """Active requests."""
        return len(self.room)


@dataclass(slots=True)
class Admission:
    """What is verified in one step.

    Attributes:
        arms: int64 `[batch]`, index of the speculator whose draft is used; meaningless where the length is 0.
        lengths: int64 `[batch]`, admitted draft tokens.
    """

    arms: np.ndarray
    lengths: np.ndarray


class Controller(ABC):
    """Plans every decode step. The same object serves the whole run and learns from it."""

    speculators: tuple[str, ...]
    """Names of the engine's speculators, in the order that `Admission.arms` refers to."""

    @abstractmethod
    def plan(self, step: Step) -> dict[str, np.ndarray]:
        """Whom to ask for drafts next. Called again with what they drafted, until nobody is asked.

        Returns:
            Speculator, one of `step.ready` that has no draft yet, to int64 `[batch]`, most draft tokens wanted; requests
            with 0 are not asked for.
        """

    @abstractmethod
    def admit(self, step: Step) -> Admission:
        """Pick, per request, the draft to use and how much of it. Uses confidences only, never the drafted tokens."""

    @abstractmethod
    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        """Learn from a step: what was drafted, admitted and committed, and the seconds it took.

        Args:
            step: What was proposed.
            admission: What of it was verified.
            verified: What was committed.
            forward_s: Seconds of the target forward.
            step_s: Seconds of the whole step so far: planning, proposals, forward, sampling and commit.

        Returns:
            Why the step was what it was, as JSON values, for a controller that explains itself.
        """

    @abstractmethod
    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        """The policy moved on, and the speculators have been refreshed.

        Args:
            expected: Survival of drafts by position, `Speculator.expected_survival`, of speculators that measured it.
        """

    @abstractmethod
    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        """Estimated seconds of a forward that decodes one token for each of `batch` requests; None if unknown."""

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        """Per speculator, drafts scored since the last call and the error of the acceptance expected of them."""
        return {}


def step_record(
    step: Step, admission: Admission, verified: Verified, forward_s: float, speculators: Sequence[str]
) -> dict[str, Any]:
    """What a step did and took, as JSON values: what every controller can say of it, and `Costs.of` reads."""
    slots = np.bincount(admission.arms, weights=admission.lengths, minlength=len(speculators))
    return {
        "batch": step.batch,
        "context_tokens": step.context_tokens,
        "asked": {
            name: {
                "requests": int((most > 0).sum()),
                "depth": int(most.max()),
                "backlog": step.backlog.get(name, 0),
                "seconds": step.draft_s[name],
            }
            for name, most in step.asked.items()
        },
        "admitted": {name: int(n) for name, n in zip(speculators, slots, strict=False) if n},
        "tokens": int(verified.num_committed.sum()),
        "forward_s": forward_s,
    }


class FixedController(Controller):
    """One speculator, always the same number of draft tokens: an arm of a comparison, not a policy for a run.

    Args:
        speculators: Names, in the order that `Admission.arms` refers to.
        arm: The one that drafts.
        num_draft_tokens: Draft tokens per request and step, as far as the speculator has them.
    """

    def __init__(self, speculators: Sequence[str], arm: str, num_draft_tokens: int) -> None:
        if arm not in speculators:
            raise ValueError(f"no speculator '{arm}' among {list(speculators)}")
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}: 0 is speculation=False")
        self.speculators = tuple(speculators)
        self._arm = arm
        self._index = list(speculators).index(arm)
        self._num_draft_tokens = num_draft_tokens
        self._cost = CostModel()

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        if self._arm in step.drafts or self._arm not in step.ready:
            return {}
        return {self._arm: np.minimum(step.room, self._num_draft_tokens)}

    def admit(self, step: Step) -> Admission:
        drafted = step.drafts.get(self._arm, Draft.empty(step.batch))  # one that is not ready was not asked
        return Admission(np.full(step.batch, self._index), drafted.lengths.copy())

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        self._cost.observe(step.batch + int(admission.lengths.sum()), forward_s, step.context_tokens)
        return None

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        """Nothing to do: it learns nothing about speculators."""

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        table = self._cost.predict(batch, context_tokens)
        return None if table is None else float(table[batch])
