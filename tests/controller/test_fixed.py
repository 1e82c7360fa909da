"""The controllers that decide the same in every step."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.base import Admission, Step
from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.core import Verified
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


def test_interrupted_forwards_count_in_the_estimate_of_a_plain_run():
    """A sum of forwards has them; a median has not."""
    controller, step = FixedController(["a"], "a", 3), Step(np.full(4, 9), 0, ready=[])
    ones, nothing = np.ones(4, np.int64), np.zeros(4, np.int64)
    verified = Verified(np.arange(4), np.ones((4, 1), np.int64), ones, nothing, nothing, np.zeros(4, bool))
    for forward in range(200):
        forward_s = 0.009 if forward % 5 == 4 else 0.005
        controller.observe(step, Admission(nothing, nothing), verified, forward_s, forward_s)
    assert controller.plain_forward_s(4, 0) == pytest.approx(0.0058, rel=0.03)


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
