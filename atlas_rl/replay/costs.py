"""Costs of forwards and drafts, fitted to a live run, and a clock that advances by them in a replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_rl.controller.base import Controller, Step
from atlas_rl.controller.cost import CostModel, DraftCost
from atlas_rl.core import Sequences
from atlas_rl.decode.observing import Observing
from atlas_rl.decode.propose import Proposing
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import Speculator


@dataclass(slots=True)
class Costs:
    """Seconds of a machine's forwards and drafts, fitted to a live run.

    Attributes:
        forward: Cost of target forwards.
        drafts: Cost of each speculator's proposals.
    """

    forward: CostModel = field(default_factory=CostModel)
    drafts: dict[str, DraftCost] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Iterable[Mapping[str, Any]]) -> Costs:
        """Fit to the lines of a controller's trace (`EngineConfig.trace`)."""
        costs = cls()
        for step in trace:
            slots = sum(step["admitted"].values())
            costs.forward.observe(step["batch"] + slots, step["forward_s"], step["context_tokens"])
            for name, asked in step["asked"].items():
                known = costs.drafts.setdefault(name, DraftCost())
                known.observe(asked["requests"], asked["depth"], asked["seconds"], asked.get("backlog", 0))
        return costs


class ToldClock:
    """A clock that advances only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class PaidProposing(Proposing):
    """Proposes as usual; drafts advance the clock by their fitted cost.

    Args:
        speculators: See `Proposing`.
        controller: See `Proposing`.
        recorder: See `Proposing`.
        observing: See `Proposing`.
        costs: Seconds that drafts take.
        clock: Clock that drafts advance.
    """

    def __init__(
        self,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        recorder: StepRecorder,
        observing: Observing,
        costs: Costs,
        clock: ToldClock,
    ) -> None:
        super().__init__(speculators, controller, recorder, observing)
        self._costs, self._clock = costs, clock

    def ask(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray, step: Step) -> None:
        super().ask(name, sequences, requests, wanted, step)
        if wanted.any():
            known = self._costs.drafts.get(name)
            if known is None:
                raise ValueError(
                    f"the trace has no drafts of '{name}', so their seconds are unknown: fit the costs to a run in which it "
                    f"drafted, or set costs.drafts['{name}']"
                )
            rows, depth = int((wanted > 0).sum()), float(wanted.max())
            step.draft_s[name] = known.predict(rows, depth, step.backlog[name])
            with self._recorder.time("draft"):
                self._clock.now_s += step.draft_s[name]
