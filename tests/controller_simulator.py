"""Synthetic worlds for the controller: known costs, known acceptance, times that are told, never a real clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Controller, Step
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft, Verified

RIGHT, WRONG = 1, 0
ROOM = 64
CONTEXT = 100  # tokens per request


@dataclass
class Arm:
    """A speculator of a synthetic world.

    `confidence` gives `[batch, depth]`, `truth` the probability that a position of that confidence is accepted, and
    `draft_s` the seconds of a call of that depth.
    """

    confidence: Callable[[int, int], np.ndarray]
    truth: Callable[[np.ndarray], np.ndarray]
    draft_s: Callable[[int], float] = lambda depth: 1e-5 * depth
    per_request_s: float = 0.0  # on top, for every request and position


def sure(confidence: float, truth: float | None = None, **options) -> Arm:
    """Every draft has the same confidence, which is right or not."""
    wanted = confidence if truth is None else truth
    return Arm(lambda batch, depth: np.full((batch, depth), confidence), lambda c: np.full(c.shape, wanted), **options)


@dataclass
class World:
    """Runs a controller against known costs and acceptance, and keeps what it did."""

    controller: Controller
    cost: Callable[[int], float]
    arms: dict[str, Arm]
    noise: float = 0.02
    draft_probs: torch.Tensor | None = None  # as drafts have them that rejection verifies
    drafting_costs_s: float = 0.0  # seconds of a drafting step that neither forward nor drafter shows
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    asked: list[dict[str, np.ndarray]] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    records: list[dict | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def step(self, batch: int, room: int = ROOM) -> None:
        step = Step(np.full(batch, room), batch * CONTEXT, list(self.arms))
        right = {}
        while plan := self.controller.plan(step):
            for name, most in plan.items():
                depth, arm = int(most.max(initial=0)), self.arms[name]
                confidence = arm.confidence(batch, depth).astype(np.float32)
                right[name] = self.rng.random((batch, depth)) < arm.truth(confidence)
                step.asked[name] = most
                step.drafts[name] = Draft(
                    np.where(right[name], RIGHT, WRONG), most.copy(), confidence, self.draft_probs
                )
                step.draft_s[name] = arm.draft_s(depth) + arm.per_request_s * depth * int((most > 0).sum())
        admission = self.controller.admit(step)
        accepted = np.zeros(batch, np.int64)
        for row, (arm, length) in enumerate(zip(admission.arms, admission.lengths, strict=True)):
            if length:
                stands = right[list(self.arms)[arm]][row, :length]
                accepted[row] = length if stands.all() else stands.argmin()
        forward_s = self.cost(batch + int(admission.lengths.sum())) * (1 + self.noise * abs(self.rng.normal()))
        tokens = np.full((batch, int(accepted.max()) + 1), RIGHT)
        verified = Verified(
            np.arange(batch), tokens, accepted + 1, accepted, admission.lengths.copy(), np.zeros(batch, bool)
        )
        draft_s = sum(step.draft_s.values())
        step_s = forward_s + draft_s + (self.drafting_costs_s if admission.lengths.any() else 0.0)
        self.records.append(self.controller.observe(step, admission, verified, forward_s, step_s))
        self.asked.append(step.asked)
        self.admissions.append(admission)
        self.seconds.append(forward_s + draft_s)
        self.tokens.append(int(accepted.sum()) + batch)

    def run(self, steps: int, batch: int) -> World:
        for _ in range(steps):
            self.step(batch)
        return self

    def goodput(self, last: int = 0) -> float:
        """Tokens per second, of the last steps where given."""
        return sum(self.tokens[-last:]) / sum(self.seconds[-last:])

    def mean_length(self, last: int) -> float:
        """Admitted drafts per request and step."""
        return float(np.mean([admission.lengths.mean() for admission in self.admissions[-last:]]))


def world(cost: Callable[[int], float], **arms: Arm) -> World:
    return World(GoodputController(tuple(arms)), cost, arms)


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
