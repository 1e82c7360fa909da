"""What drafting exposes beside the drafts is measured, kept out of the forward's price, and paid by the first drafter."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.base import Step
from atlas_rl.controller.exposed import Exposed
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft
from tests.controller_simulator import SimulatedDecoding, sure

PLAIN_S, DRAFTED_S = 1e-4, 5e-4
BATCH = 8


def step(batch: int, exposed_s: float, draft_s: float | None = None, wasted_s: float = 0.0) -> Step:
    made = Step(np.full(batch, 9), 800, ["a"], exposed_s=exposed_s, wasted_s=wasted_s)
    if draft_s is not None:
        made.drafts["a"], made.draft_s["a"] = Draft.empty(batch), draft_s
    return made


def test_nothing_is_known_before_both_kinds_of_step_were_seen() -> None:
    exposed = Exposed()
    for _ in range(3):
        assert exposed.observe(step(BATCH, DRAFTED_S + 2e-4, 2e-4)) == 0.0
        assert exposed.extra_s[BATCH.bit_length()] == 0.0
    for _ in range(3):
        assert exposed.extra_s[BATCH.bit_length()] == 0.0
        exposed.observe(step(BATCH, PLAIN_S))
    assert exposed.extra_s[BATCH.bit_length()] == pytest.approx(DRAFTED_S - PLAIN_S)


def test_drafts_and_waits_in_vain_are_no_part_of_it() -> None:
    exposed = Exposed()
    exposed.observe(step(BATCH, PLAIN_S))
    assert exposed.observe(step(BATCH, DRAFTED_S + 3e-4, 2e-4, wasted_s=1e-4)) == pytest.approx(DRAFTED_S - PLAIN_S)
    assert exposed.observe(step(BATCH, PLAIN_S)) == 0.0


def test_one_interrupted_step_does_not_count_and_other_batches_follow_the_nearest() -> None:
    exposed = Exposed()
    for _ in range(3):
        exposed.observe(step(BATCH, PLAIN_S))
        exposed.observe(step(BATCH, DRAFTED_S, 0.0))
        exposed.observe(step(64, 2 * PLAIN_S))
        exposed.observe(step(64, 4 * DRAFTED_S, 0.0))
    exposed.observe(step(BATCH, 1.0, 0.0))
    assert exposed.extra_s[BATCH.bit_length()] == exposed.extra_s[1] == pytest.approx(DRAFTED_S - PLAIN_S)
    assert exposed.extra_s[20] == pytest.approx(4 * DRAFTED_S - 2 * PLAIN_S)


def test_an_octave_is_known_from_three_steps_of_both_kinds() -> None:
    """A single step with drafts, interrupted for 50 ms, would stop drafting in its octave and in all lower ones."""
    exposed = Exposed()
    for _ in range(3):
        exposed.observe(step(64, PLAIN_S))
        exposed.observe(step(64, DRAFTED_S, 0.0))
        exposed.observe(step(BATCH, PLAIN_S))
    usual = [pytest.approx(DRAFTED_S - PLAIN_S)] * len(exposed.extra_s)
    for exposed_s in (50e-3, DRAFTED_S, DRAFTED_S):
        exposed.observe(step(BATCH, exposed_s, 0.0))
        assert exposed.extra_s == usual


def test_of_two_steps_the_usual_one_is_not_the_interrupted_one() -> None:
    exposed = Exposed()
    exposed.observe(step(BATCH, 50e-3))
    exposed.observe(step(BATCH, PLAIN_S))
    assert exposed.observe(step(BATCH, DRAFTED_S, 0.0)) == pytest.approx(DRAFTED_S - PLAIN_S)


def test_what_plans_are_charged_from_the_nearest_octave_is_not_left_to_the_forward() -> None:
    """No step without drafts was seen at this batch: its plans pay what others expose, so its forwards must not."""
    exposed = Exposed()
    for _ in range(3):
        exposed.observe(step(64, PLAIN_S))
        exposed.observe(step(64, DRAFTED_S, 0.0))
    assert exposed.observe(step(BATCH, DRAFTED_S, 0.0)) == pytest.approx(exposed.extra_s[BATCH.bit_length()])
    assert exposed.observe(step(BATCH, PLAIN_S, 0.0)) == pytest.approx(PLAIN_S), "no more than it exposed"
    assert exposed.observe(step(16, PLAIN_S)) == 0.0


def run_with(exposed_s: float, *, told: bool) -> SimulatedDecoding:
    """Decode with one drafter that gains a little, if every step with drafts exposes `exposed_s`."""
    run = SimulatedDecoding(
        GoodputController(("a",)), lambda tokens: 4e-3, {"a": sure(0.12, draft_s=lambda depth: 1e-5 * depth)},
        noise=0.0, exposed_s=exposed_s, tells_exposed=told,
    )  # fmt: skip
    return run.run(400, batch=BATCH)


def asks(run: SimulatedDecoding) -> float:
    """Share of the latest steps in which anybody is asked."""
    return float(np.mean([bool(asked) for asked in run.asked[-150:]]))


def test_a_drafter_is_not_asked_if_it_gains_less_than_asking_exposes() -> None:
    assert asks(run_with(0.0, told=True)) > 0.9
    assert asks(run_with(1e-3, told=True)) < 0.15


def test_what_drafting_exposes_is_no_part_of_a_forward() -> None:
    """Sizes that only occur with drafts would look dearer than they are."""
    costs = {}
    for told in (True, False):
        run = run_with(2e-4, told=told)
        table = run.controller._cost.predict(2 * BATCH, BATCH * 100)
        costs[told] = table[2 * BATCH] - table[BATCH]
    assert costs[True] == pytest.approx(0.0, abs=2e-5)
    assert costs[False] > 5e-5  # the control: nobody told
