"""The controllers that decide the same in every step."""

from __future__ import annotations

import numpy as np

from atlas_rl.controller.base import Step
from atlas_rl.controller.fixed import FixedController, NoSpeculation
from tests.controller_simulator import SimulatedDecoding, affine, sure


def test_the_fixed_controller_is_fixed():
    run = SimulatedDecoding(FixedController(["a", "b"], "b", 3), affine, {"a": sure(0.9), "b": sure(0.05)})
    run.run(50, batch=4)
    assert all(list(plan) == ["b"] for plan in run.asked)
    assert all((admission.lengths == 3).all() and (admission.drafters == 1).all() for admission in run.admissions)
    run.step(batch=4, room=2)
    assert (run.admissions[-1].lengths == 2).all()
    run.controller.policy_updated({})
    assert run.controller.plain_forward_s(4, 0) is None, "it never made one"


def test_a_drafter_that_is_not_ready_is_not_asked():
    controller, step = FixedController(["a", "b"], "b", 3), Step(np.full(4, 9), 0, ready=["a"])
    assert controller.plan(step) == {}
    assert controller.admit(step).lengths.tolist() == [0, 0, 0, 0]


def test_no_speculation_asks_nobody_and_learns_nothing():
    run = SimulatedDecoding(NoSpeculation(), affine, {"a": sure(0.99)}).run(20, batch=4)
    run.controller.policy_updated({"a": np.full(5, 0.9)})
    run.step(batch=2)
    assert run.asked == [{}] * 21
    assert [admission.lengths.tolist() for admission in run.admissions] == [[0] * 4] * 20 + [[0] * 2]
    assert run.tokens == [4] * 20 + [2]
    assert run.records == [None] * 21
    assert run.controller.speculators == ()
    assert run.controller.plain_forward_s(4, 0) is None
    assert run.controller.take_calibration() == {}
