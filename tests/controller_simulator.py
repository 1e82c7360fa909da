"""Simulates decode steps for a controller: known costs, known acceptance, simulated seconds, never a real clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft, Verified

RIGHT, WRONG = 1, 0
ROOM = 64
CONTEXT = 100  # tokens per request


@dataclass
class SimulatedDrafter:
    """A drafter of known confidence, acceptance and cost.

    Attributes:
        confidence: Of a draft for (batch, depth), float `[batch, depth]`.
        truth: Probability that positions of these confidences are accepted.
        draft_s: Seconds of a call of this depth.
        per_request_s: Seconds on top, for every request and position.
    """

    confidence: Callable[[int, int], np.ndarray]
    truth: Callable[[np.ndarray], np.ndarray]
    draft_s: Callable[[int], float] = lambda depth: 1e-5 * depth
    per_request_s: float = 0.0


def sure(confidence: float, truth: float | None = None, **options) -> SimulatedDrafter:
    """A drafter of constant confidence, accepted with probability `truth`; None for as often as it claims."""
    chance = confidence if truth is None else truth
    return SimulatedDrafter(
        confidence=lambda batch, depth: np.full((batch, depth), confidence),
        truth=lambda c: np.full(c.shape, chance),
        **options,
    )


def as_sure_as(chances: np.ndarray, **options) -> SimulatedDrafter:
    """A calibrated drafter with a confidence of its own for each request: `chances` is `[batch]`."""
    return SimulatedDrafter(lambda batch, depth: np.repeat(chances[:, None], depth, axis=1), lambda c: c, **options)


@dataclass
class SimulatedDecoding:
    """Runs a controller against known costs and acceptance, and keeps its decisions.

    Attributes:
        controller: The controller.
        cost: Seconds of a forward over so many tokens.
        drafters: By name, in the controller's order.
        noise: Relative noise of forwards; it only ever slows them down.
        draft_probs: Probabilities that every draft carries, so that it counts as drawn and verified by rejection.
        ahead: Drafters whose drafts are only queued ahead; learning from a step then happens while the next one runs.
        drafting_costs_s: Seconds of a step with drafts that neither its forward nor its drafters show.
        exposed_s: Seconds of the host that a step with drafts exposes beside its drafts.
        tells_exposed: Whether the controller is told.
        rng: Source of all randomness.
        asked: Draft tokens asked for, per step.
        admissions: Per step.
        records: Of `Controller.observe`, per step.
        seconds: Forward and drafts, per step.
        tokens: Committed tokens, per step.
    """

    controller: Controller
    cost: Callable[[int], float]
    drafters: dict[str, SimulatedDrafter]
    noise: float = 0.02
    draft_probs: torch.Tensor | None = None
    drafting_costs_s: float = 0.0
    ahead: tuple[str, ...] = ()
    exposed_s: float = 0.0
    tells_exposed: bool = True
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    asked: list[dict[str, np.ndarray]] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    records: list[dict | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    _queued: dict[str, int] = field(default_factory=dict)
    _learn: Callable[[], dict | None] | None = None  # from the previous step

    def step(self, batch: int, room: int = ROOM) -> None:
        step = Step(np.full(batch, room), batch * CONTEXT, list(self.drafters), ahead=self.ahead)
        step.planned_ahead = self._learn is not None
        right = {name: self._draft(step, name, np.full(batch, depth)) for name, depth in self._queued.items()}
        while plan := self.controller.plan(step):
            right |= {name: self._draft(step, name, most) for name, most in plan.items()}
        admission = self.controller.admit(step)
        accepted = np.zeros(batch, np.int64)
        for row, (drafter, length) in enumerate(zip(admission.drafters, admission.lengths, strict=True)):
            if length:
                stands = right[list(self.drafters)[drafter]][row, :length]
                accepted[row] = length if stands.all() else stands.argmin()
        forward_s = self.cost(batch + int(admission.lengths.sum())) * (1 + self.noise * abs(self.rng.normal()))
        tokens = np.full((batch, int(accepted.max()) + 1), RIGHT)
        verified = Verified(
            np.arange(batch), tokens, accepted + 1, accepted, admission.lengths.copy(), np.zeros(batch, bool)
        )
        draft_s = sum(step.draft_s.values())
        exposed_s = draft_s + (self.exposed_s if step.drafts else 0.0)
        step.exposed_s = exposed_s if self.tells_exposed else 0.0
        step_s = forward_s + exposed_s + (self.drafting_costs_s if admission.lengths.any() else 0.0)
        learn = partial(self.controller.observe, step, admission, verified, forward_s, step_s)
        if self.ahead:
            learn, self._learn = self._learn, learn
        if learn is not None:
            self.records.append(learn())
        if self.ahead:
            self._queued = self.controller.plan_ahead(step, self.ahead)
        self.asked.append(step.asked)
        self.admissions.append(admission)
        self.seconds.append(forward_s + exposed_s)
        self.tokens.append(int(accepted.sum()) + batch)

    def _draft(self, step: Step, name: str, most: np.ndarray) -> np.ndarray:
        """Ask a drafter; returns which of its tokens are right."""
        depth, drafter = int(most.max(initial=0)), self.drafters[name]
        confidence = drafter.confidence(step.batch, depth).astype(np.float32)
        right = self.rng.random((step.batch, depth)) < drafter.truth(confidence)
        step.asked[name] = most
        step.drafts[name] = Draft(np.where(right, RIGHT, WRONG), most.copy(), confidence, self.draft_probs)
        step.draft_s[name] = drafter.draft_s(depth) + drafter.per_request_s * depth * int((most > 0).sum())
        return right

    def run(self, steps: int, batch: int) -> SimulatedDecoding:
        for _ in range(steps):
            self.step(batch)
        return self

    def goodput(self, last: int = 0) -> float:
        """Tokens per second, of the last steps where given."""
        return sum(self.tokens[-last:]) / sum(self.seconds[-last:])

    def mean_length(self, last: int) -> float:
        """Admitted drafts per request and step."""
        return float(np.mean([admission.lengths.mean() for admission in self.admissions[-last:]]))


def simulate(
    cost: Callable[[int], float], ahead: tuple[str, ...] = (), **drafters: SimulatedDrafter
) -> SimulatedDecoding:
    return SimulatedDecoding(GoodputController(tuple(drafters)), cost, drafters, ahead=ahead)


def affine(tokens: int) -> float:
    return 0.050 + 0.002 * tokens


def shallow(tokens: int) -> float:
    return 0.050 + 0.0005 * tokens


def proportional(tokens: int) -> float:
    return 0.005 * tokens


def flat(tokens: int) -> float:
    return 0.050


def saturating(tokens: int) -> float:
    """Free up to 16 tokens, then every token costs."""
    return 0.050 + 0.004 * max(0, tokens - 16)


ADVERSE = {
    "hopeless": (affine, sure(0.6, truth=0.02)),
    "proportional": (proportional, sure(0.9)),
    "hopeless and costly": (affine, sure(0.6, truth=0.02, draft_s=lambda depth: 0.02 * depth)),
    "costly": (affine, sure(0.5, draft_s=lambda depth: 0.06 * depth)),
    "large batch": (saturating, sure(0.3)),
}
"""Costs and drafters of which drafts do not pay."""
