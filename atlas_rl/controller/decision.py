"""What the adaptive controller knows about one step while it decides."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from atlas_rl.controller.base import Step
from atlas_rl.controller.cost import CostModel
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.promises import Prediction, Promise


@dataclass(slots=True, eq=False)
class Decision:
    """State of one step's decision: `plan` opens it, and `observe` closes it, perhaps after the next plan.

    Attributes:
        step: The step.
        cost: Of its forward. The next forwards may have another one before this step is learned from.
        planned: Whether drafters were considered: the step is neither plain on purpose nor skipped by a pause.
        is_trial: Whether its drafts are verified whole, to measure the cost of such a forward.
        promise: Goodput expected when the latest drafter was asked; None if none was expected to pay.
        prediction: What `admit` expected of the step; None in a trial, and before any forward was seen.
        beside: float64 `[batch]` per drafter asked: survival of the first token of the best draft at that moment.
        survivals: float64 `[batch, MAX_LOOKAHEAD]` per draft: survival of its slots.
        best: The most promising drafts so far; None until first needed.
        is_drawn: Whether one of those was drawn from probabilities, and is therefore verified by rejection.
        began_ahead: Whether it was opened by `plan_ahead`, with `planned` decided for the step.
        extra_s: Seconds that drafting at all is expected to add to the step (`Exposed`).
    """

    step: Step
    cost: CostModel
    planned: bool = False
    is_trial: bool = False
    promise: Promise | None = None
    prediction: Prediction | None = None
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    survivals: dict[str, np.ndarray] = field(default_factory=dict)
    best: BestDrafts | None = None
    is_drawn: bool = False
    began_ahead: bool = False
    extra_s: float = 0.0

    def go_on(self, step: Step) -> None:
        """Take the decision, opened while the step before ran, to `step` itself, whose requests may be others.

        What was promised goes with the number of requests, and is void if none of those with drafts is left.
        """
        if self.promise is not None:
            drafter, goodput = self.promise
            scaled = Promise(drafter, goodput * step.batch / self.step.batch)
            self.promise = scaled if drafter in step.drafts else None
        former, now = self.step.rest, step.rest
        if former is not None and now is not None and self.beside:
            row_of = np.full(max(former.requests.max(), now.requests.max()) + 1, len(former.requests))
            row_of[former.requests] = np.arange(len(former.requests))
            rows = row_of[now.requests]
            self.beside = {name: np.append(survival, 0.0)[rows] for name, survival in self.beside.items()}
        self.step, self.best = step, None


@dataclass(slots=True)
class BestDrafts:
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
    def none(cls, batch: int, columns: int) -> BestDrafts:
        """No drafts yet."""
        return cls(np.zeros((batch, MAX_LOOKAHEAD)), np.zeros(batch), np.zeros(batch, np.int64), columns)
