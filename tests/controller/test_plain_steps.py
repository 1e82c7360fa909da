"""Steps without drafts are measured as often as they surprise, and the latest ones tell what plain decoding takes."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.base import Step
from atlas_rl.controller.plain_steps import PlainSteps

MANY = 10  # forwards of a size that is known


def drafted_until_due(steps: PlainSteps, most: int = 300) -> int:
    """Steps with drafts after the latest plain one until another is due."""
    steps.passed(drafted=False)
    for count in range(most):
        if steps.are_due(MANY):
            return count
        steps.passed(drafted=True)
    return most


def test_the_first_step_is_plain_and_the_next_ones_until_its_size_is_known():
    steps = PlainSteps()
    assert steps.are_due(0)
    steps.passed(drafted=False)
    assert not steps.are_due(1)
    for _ in range(4):
        steps.passed(drafted=True)
    assert steps.are_due(2)
    assert not steps.are_due(MANY)
    assert steps.are_due(0), "a size that was never seen"


def step_of(batch: int = 4) -> Step:
    return Step(room=np.full(batch, 9), context_tokens=100, ready=())


@pytest.mark.parametrize("off", [0.8, 1.2])
def test_a_machine_that_changes_is_measured_more_often(off: float):
    steps = PlainSteps()
    assert drafted_until_due(steps) == 100
    waits = []
    for factor in (1.0, off, off, off, 1.02, 0.98, 1.0):
        steps.observe(step_of(), 0.9 * factor, factor, 1.0, MANY)
        waits.append(drafted_until_due(steps))
    assert waits == [100, 50, 25, 25, 50, 100, 100]


def test_sizes_without_evidence_say_nothing_about_the_machine():
    steps = PlainSteps()
    steps.observe(step_of(), 0.9, 3.0, 1.0, 1)
    steps.observe(step_of(), 0.9, 3.0, None, 0)
    assert drafted_until_due(steps) == 100
    assert steps.forward_s(1.0, lambda batch, context_tokens: 1.0) == pytest.approx(0.3)


def test_the_estimate_follows_the_latest_plain_steps():
    """Weights have come to be read a fifth faster, which steps with drafts do not show; one step was interrupted."""
    steps = PlainSteps()
    predicted = 1.0

    def predict(batch: int, context_tokens: int) -> float:
        assert context_tokens == 100
        return predicted * batch

    assert steps.forward_s(1.0, predict) is None
    for factor in (1.0, 1.0, 1.0, 0.8, 5.0, 0.8):
        steps.observe(step_of(2), 1.8 * factor, 2 * factor, 2.0, MANY)
    assert steps.forward_s(3.0, predict) == pytest.approx(0.9 * 3.0 * 0.8)
    predicted = 0.8  # the model has followed: nothing is left to correct
    assert steps.forward_s(2.4, predict) == pytest.approx(0.9 * 2.4)
