"""The interface of controllers.

In every decode step a controller decides which speculators draft, for which requests and how far, and how many of the
draft tokens are verified. It is pure logic over numpy arrays: no tensors, and no clock except the times passed to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_rl.core import Draft, Verified


@dataclass(slots=True)  # one per step: a frozen one takes a call per field to make
class Rest:
    """Tokens that the requests of a step have generated, and tokens left until their limits.

    Attributes:
        requests: int64 `[batch]`, indices of these requests in the call.
        generated: int64 `[batch]`, completion tokens so far, at least 1.
        left: int64 `[batch]`, most tokens still to come, at least 1.
        num_waiting: Requests of the call that wait for a row.
    """

    requests: np.ndarray
    generated: np.ndarray
    left: np.ndarray
    num_waiting: int = 0


@dataclass(slots=True)
class Step:
    """One decode step before its forward.

    Attributes:
        room: int64 `[batch]`, the most draft tokens that each active request can still use.
        context_tokens: Committed tokens of all active requests.
        ready: Speculators that can draft now.
        asked: int64 `[batch]` per speculator asked so far in this step: most tokens wanted from it.
        drafts: Drafts of those speculators; every draft has a row for every request.
        draft_s: Seconds that asking for each of those drafts took. Where the device runs a forward while speculators
            observe, one that is asked observes before it, and that is part of asking.
        backlog: `Speculator.backlog` over all requests; after a speculator drafted, over the requests it drafted for.
        drawn_as: Key of the sampling distribution: acceptance at one temperature says little about another.
        rest: Remaining work of the requests; None if the call does not end with its last request, as in a server's
            traffic. Every token then counts alike.
        ahead: Speculators that drafts of this step could be queued of (`Controller.plan_ahead`): those without a draft now
            cannot be asked.
        planned_ahead: Whether `Controller.plan_ahead` has decided about this step.
        wasted_s: Seconds of waiting for queued drafts that no request can use. They are part of no cost.
        exposed_s: Seconds from the previous outcome to this step's forward, drafts included; observing only as far as it is
            in `draft_s`. 0 where nobody measures it.
    """

    room: np.ndarray
    context_tokens: int
    ready: Sequence[str]
    asked: dict[str, np.ndarray] = field(default_factory=dict)
    drafts: dict[str, Draft] = field(default_factory=dict)
    draft_s: dict[str, float] = field(default_factory=dict)
    backlog: dict[str, int] = field(default_factory=dict)
    drawn_as: Hashable = None
    rest: Rest | None = None
    ahead: Sequence[str] = ()
    planned_ahead: bool = False
    wasted_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def left(self) -> list[str]:
        """Speculators that can still be asked."""
        return [name for name in self.ready if name not in self.drafts and name not in self.ahead]

    @property
    def batch(self) -> int:
        """Number of active requests."""
        return len(self.room)


@dataclass(slots=True)
class Admission:
    """Which tokens one step verifies.

    Attributes:
        drafters: int64 `[batch]`, index of the speculator whose draft is used; undefined for a request with length 0.
        lengths: int64 `[batch]`, number of draft tokens to verify.
    """

    drafters: np.ndarray
    lengths: np.ndarray


class Controller(ABC):
    """Plans every decode step. One object serves the whole run and learns from it."""

    speculators: tuple[str, ...]
    """Names of the engine's speculators, in the order that `Admission.drafters` refers to."""

    plans_ahead = False
    """Whether `plan_ahead` is implemented. If not, all drafts are asked for by `plan`."""

    @abstractmethod
    def plan(self, step: Step) -> dict[str, np.ndarray]:
        """Choose which speculators to ask next. Called again with their drafts until it asks none, or none is left.

        Returns:
            By speculator, each from `step.left`: int64 `[batch]`, the most draft tokens wanted. A request with 0 gets
            no draft.
        """

    def plan_ahead(self, step: Step, names: Sequence[str]) -> dict[str, int]:
        """Choose which drafts of the next step are queued now, while the forward of `step` runs.

        They are there when the next step is planned, if any of its requests has one. What is not queued now cannot be
        asked for then. Called after the previous step was learned from. By default nothing is queued.

        Args:
            step: The step whose forward runs, with its drafts.
            names: Speculators that can draft ahead, each ready.

        Returns:
            By speculator, draft tokens for every request, at least 1.
        """
        return {}

    @abstractmethod
    def admit(self, step: Step) -> Admission:
        """Choose the draft of each request and how many of its tokens to verify.

        Reads confidences only, never the drafted tokens.
        """

    @abstractmethod
    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        """Learn from a step: drafted, admitted and committed tokens, and its seconds.

        Args:
            step: The step with its drafts.
            admission: Draft tokens that were verified.
            verified: Tokens that were committed.
            forward_s: Seconds of the target forward.
            step_s: Seconds of the whole step, from the previous step's outcome to its own. If learning runs beside the
                device, the next step has already been planned.

        Returns:
            A record of the step as JSON values if the controller explains itself; else None.
        """

    @abstractmethod
    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        """The policy changed, and the speculators have been refreshed.

        Args:
            expected: Survival measured at the refresh, by speculator that measured it: float64 `[n]`, probability that
                a draft survives up to each position.
        """

    @abstractmethod
    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        """Estimated seconds of a forward that decodes one token for each of `batch` requests.

        None unless forwards of that size, or of nearby sizes with about the same cost, were measured.
        """

    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        """Set the sizes (tokens, rising) that forwards are padded to: a forward costs what the next such size costs.

        Forwards beyond the last size are not padded; nor is any if `sizes` is empty. May be called repeatedly. What
        was learned under other sizes is kept for the time when they return. By default nothing happens.
        """
        return

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        """Per speculator: draft tokens scored since the last call, and the calibration error of their estimates."""
        return {}


def step_record(
    step: Step, admission: Admission, verified: Verified, forward_s: float, speculators: Sequence[str]
) -> dict[str, Any]:
    """Tokens and seconds of one step as JSON values, for any controller; replay costs are fitted to such records."""
    slots = np.bincount(admission.drafters, weights=admission.lengths, minlength=len(speculators))
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
