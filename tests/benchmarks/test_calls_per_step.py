"""How many calls each verb of a step makes, on any machine: they are what the host's time is made of, and they are exact.

Counted are calls of Python functions and of built-in ones, numpy's and torch's among them. A step with two drafters makes
as many for 64 requests as for 8: nothing is done request by request. Where a limit is exceeded, something that was one
compiled call has become several; a limit is what was counted when it was set, and some room for other versions of numpy.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.base import Admission, Step
from atlas_rl.controller.fixed import NoSpeculation
from atlas_rl.decode.guard import Faults, GuardedController
from atlas_rl.replay.record import RecordingSpeculator
from benchmarks.pace import Learned, part_of, setting_of
from benchmarks.paced import Costs, PacedLoop
from tests.controller_simulator import SimulatedDrafter, simulate
from tests.models import tiny_bigram

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4]]
BATCHES = (8, 64)
DRAFTERS = ("history", "recurrent")
LIMITS = {"controller": 100, "draft": 131, "forward": 45, "sample": 42, "commit": 34, "observe": 49, "other": 30}
DEPTH = 3  # draft tokens
DECIDING = 116  # plans and the admission


class Both(NoSpeculation):
    """Asks one drafter and then the other, always for as much, and takes turns in using them."""

    speculators = DRAFTERS  # type: ignore[assignment]

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        left = [name for name in DRAFTERS if name not in step.drafts]
        return {left[0]: np.minimum(step.room, DEPTH)} if left else {}

    def admit(self, step: Step) -> Admission:
        drafters = np.arange(step.batch) % 2
        lengths = np.where(drafters, *(step.drafts[name].lengths for name in reversed(DRAFTERS)))
        return Admission(drafters, lengths)


@contextmanager
def counting(note: Callable[[], Any]):
    """Calls `note` for every call inside."""

    def hook(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            note()

    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Learned:
    folder: Path = tmp_path_factory.mktemp("recorded")
    engine = AtlasRolloutEngine(
        model=tiny_bigram(layers=3, seed=11), speculators=[RecordingSpeculator(folder)], console=False
    )
    for seed in range(2):
        engine.generate(PROMPTS, num_generations=16, max_new_tokens=24, eos_token_ids=[], seed=seed)
        engine.policy_updated()
    return Learned.of(folder)


def calls_of_a_step(learned: Learned, batch: int) -> dict[str, float]:
    """Median over the steps with room for all drafts and without an ending, by verb, without what runs beside the device."""
    part = np.arange(batch)
    drafters = learned.drafters(DRAFTERS)
    recorded = part_of(learned.recorded, part)
    loop = PacedLoop(recorded, drafters, GuardedController(Both(), Faults()), Costs(setting_of("Qwen3-8B, B200")))
    learned.recurrent.follow(learned.recorded, part, loop)
    steps, learn, step = [], loop._learn, loop.step
    learning = False

    def note() -> None:
        if not learning and not loop.device.num_outside:
            steps[-1][loop.recorder._running[-1]] += 1

    def learned_beside() -> float:
        nonlocal learning
        learning = True
        taken_s = learn()
        learning = False
        return taken_s

    def counted_step() -> None:
        roomy = loop.room.drafts(loop.active).min() >= DEPTH
        steps.append(Counter())
        with counting(note):
            step()
        if not roomy or len(loop.active) < batch:
            steps.pop()

    loop._learn, loop.step = learned_beside, counted_step  # type: ignore[method-assign]
    loop.run()
    assert loop.sequences.lengths.tolist() == recorded.sequences.lengths.tolist()
    assert len(steps) >= 3
    return {verb: statistics.median(calls[verb] for calls in steps) for verb in LIMITS}


def test_a_step_makes_few_calls_and_none_per_request(learned: Learned) -> None:
    few, many = (calls_of_a_step(learned, batch) for batch in BATCHES)
    assert few == many
    assert {verb: calls for verb, calls in few.items() if calls > LIMITS[verb]} == {}


def test_decisions_make_few_calls_and_none_per_request() -> None:
    def drafter(least: float) -> SimulatedDrafter:
        rng = np.random.default_rng(1)
        return SimulatedDrafter(
            lambda batch, depth: rng.uniform(least, 0.98, (batch, depth)).astype(np.float32), lambda c: c
        )

    few, many = (decisions_of_a_step(drafter, batch) for batch in BATCHES)
    assert few == many
    assert few <= DECIDING


def decisions_of_a_step(drafter: Callable[[float], SimulatedDrafter], batch: int) -> int:
    """Calls of the plans and the admission of a step that asks both drafters."""
    run = simulate(lambda tokens: 0.004 + 6e-6 * tokens, a=drafter(0.3), b=drafter(0.5))
    run.run(60, batch)
    steps: list[int] = []
    plan, admit = run.controller.plan, run.controller.admit

    def note() -> None:
        steps[-1] += 1

    def counted_plan(step: Step) -> dict[str, np.ndarray]:
        if not step.drafts:
            steps.append(0)
        with counting(note):
            return plan(step)

    def counted_admit(step: Step) -> Admission:
        with counting(note):
            return admit(step)

    run.controller.plan, run.controller.admit = counted_plan, counted_admit  # type: ignore[method-assign]
    run.run(20, batch)
    return max(n for n, asked in zip(steps, run.asked[-20:], strict=True) if len(asked) == 2)
