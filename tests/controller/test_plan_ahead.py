"""Drafts that the adaptive controller plans while the step before runs."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller import goodput
from atlas_rl.controller.arms import NOT_ASKED, ask_next
from atlas_rl.controller.base import Admission, Rest, Step
from atlas_rl.controller.cost import CostModel
from atlas_rl.controller.decision import Decision
from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.controller.promises import Promise
from atlas_rl.core import Draft, Verified
from tests.controller_simulator import (
    ADVERSE,
    SimulatedDecoding,
    affine,
    as_sure_as,
    proportional,
    saturating,
    shallow,
    simulate,
    sure,
)

HEAD = ("head",)


def asked_share(run, name, last=200):
    return np.mean([name in asked for asked in run.asked[-last:]])


def test_a_head_that_pays_drafts_ahead_in_nearly_every_step():
    run = simulate(affine, HEAD, head=sure(0.8)).run(300, batch=8)
    plain = SimulatedDecoding(NoSpeculation(), affine, {}).run(300, 8)
    assert asked_share(run, "head") > 0.9
    assert run.goodput(last=200) > 1.3 * plain.goodput()


@pytest.mark.parametrize("name", ADVERSE)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_run_is_not_slower_than_without_speculation(name, batch):
    """Drafts queued in vain are in it. Learning lags one step behind, so that a drafter is tried once more at first."""
    cost, drafter = ADVERSE[name]
    run = simulate(cost, HEAD, head=drafter).run(600, batch)
    plain = SimulatedDecoding(NoSpeculation(), cost, {}).run(600, batch)
    assert run.goodput() > 0.96 * plain.goodput()


def test_it_is_about_as_good_as_the_same_drafters_asked_in_the_usual_way():
    """Although the other's drafts are not known when it is planned, and these heads do not tell what the other knows."""
    drafters = {
        "cheap": as_sure_as(np.where(np.arange(8) % 2 == 0, 0.9, 0.02)),
        "head": sure(0.8, draft_s=lambda depth: 0.0003 * depth),
    }
    usual, ahead = (simulate(shallow, names, **drafters).run(400, 8) for names in ((), HEAD))
    assert asked_share(ahead, "head") > 0.9
    assert ahead.goodput(last=200) > 0.95 * usual.goodput(last=200)


def test_a_head_beside_one_that_knows_everything_is_left_alone():
    """What the other drafted in the step before stands for what it will draft."""
    drafters = {"cheap": sure(0.97), "head": sure(0.5, draft_s=lambda depth: 0.003 * depth)}
    run = simulate(affine, HEAD, **drafters).run(400, batch=4)
    alone = simulate(affine, HEAD, head=drafters["head"]).run(400, batch=4)
    assert asked_share(run, "head") < 0.1 < 0.8 < asked_share(alone, "head")
    assert asked_share(run, "cheap") > 0.9


def test_plain_steps_stay_plain():
    """They measure plain decoding: nothing is queued for them, and nobody else is asked."""
    run = simulate(affine, HEAD, cheap=sure(0.9), head=sure(0.9)).run(400, batch=8)
    plain = [index for index, asked in enumerate(run.asked) if not asked]
    assert 2 <= len([index for index in plain if index > 50]) <= 8


@pytest.mark.parametrize("cost", [affine, saturating, proportional])
def test_where_nothing_pays_planning_ahead_is_rare_too(cost):
    run = simulate(cost, HEAD, head=sure(0.02, draft_s=lambda depth: 0.02 * depth)).run(300, batch=8)
    assert asked_share(run, "head") < 0.05
    paused = run.controller._pause
    assert paused.num_vain > 3


def test_what_drafts_ahead_is_not_asked_later():
    run = simulate(affine, HEAD, cheap=sure(0.5), head=sure(0.95)).run(100, batch=8)
    step = Step(np.full(8, 9), 800, ["cheap", "head"], ahead=HEAD)
    for _ in range(3):
        assert "head" not in run.controller.plan(step)
    fixed = FixedController(["head"], "head", 3, ahead=True)
    assert fixed.plan(Step(np.full(8, 9), 800, HEAD, ahead=HEAD)) == {}
    assert fixed.plan_ahead(step, HEAD) == {"head": 3}
    assert fixed.plan_ahead(step, ()) == {}


def test_a_drafter_that_the_controller_does_not_know_is_not_asked():
    """It may have been made for the first of the engine's drafters only."""
    run = simulate(affine, cheap=sure(0.5)).run(1, batch=8)  # so that nobody has been asked yet
    step = Step(np.full(8, 9), 800, ["cheap", "head"])
    run.controller.plan(step)
    assert run.controller.plan_ahead(step, HEAD) == {}
    run.controller.admit(step)


def test_a_plan_ahead_is_for_all_requests_and_no_other_plan_is(monkeypatch):
    """The draft is made for all of them, so it must pay at that price."""
    asked = []

    def noting(*arguments):
        asked.append((bool(arguments[2][1] != NOT_ASKED), arguments[9]))
        return ask_next(*arguments)

    monkeypatch.setattr(goodput, "ask_next", noting)
    simulate(affine, HEAD, cheap=sure(0.5), head=sure(0.8)).run(50, batch=8)
    assert set(asked) == {(False, False), (True, True)}


def observed(controller, step, admission, step_s):
    verified = Verified(
        np.arange(step.batch), np.ones((step.batch, 1), np.int64), np.zeros(step.batch, np.int64) + 1,
        np.zeros(step.batch, np.int64), admission.lengths.copy(), np.zeros(step.batch, bool),
    )  # fmt: skip
    controller.observe(step, admission, verified, 0.05, step_s)


def test_waiting_for_drafts_that_nobody_can_use_is_part_of_no_cost():
    found = []
    for wasted_s in (0.0, 0.04):
        controller = GoodputController(HEAD)
        for _ in range(30):
            step = Step(np.full(4, 9), 400, HEAD, wasted_s=wasted_s)
            controller.plan(step)
            observed(controller, step, Admission(np.zeros(4, np.int64), np.zeros(4, np.int64)), 0.06 + wasted_s)
        found.append(controller._cost.seconds(4, 400))
    assert found == pytest.approx([0.06, 0.06], rel=1e-6)


def test_a_promise_goes_with_its_requests():
    def decision_of(batch, drafts, promise):
        former = Decision(Step(np.full(4, 9), 400, HEAD), CostModel(), began_ahead=True, promise=promise)
        former.go_on(Step(np.full(batch, 9), 400, HEAD, drafts=drafts))
        return former

    drafts = {"head": Draft.empty(3)}
    assert decision_of(3, drafts, Promise("head", 400.0)).promise == ("head", pytest.approx(300.0))
    assert decision_of(3, {}, Promise("head", 400.0)).promise is None, "nobody is left who has a draft"
    assert decision_of(3, drafts, None).promise is None


def test_what_stood_beside_a_draft_moves_with_its_request():
    def rest(*requests):
        return Rest(np.array(requests), np.ones(len(requests), np.int64), np.ones(len(requests), np.int64))

    before, after = (Step(np.full(len(one.requests), 9), 100, HEAD, rest=one) for one in (rest(4, 0, 7), rest(7, 4, 9)))
    decision = Decision(before, CostModel(), began_ahead=True)
    decision.beside["head"] = np.array([0.4, 0.1, 0.7])
    decision.go_on(after)
    assert decision.step is after
    assert decision.beside["head"].tolist() == [0.7, 0.4, 0.0]


def test_a_decision_opened_ahead_is_that_of_the_next_step():
    controller = GoodputController(HEAD)
    run = SimulatedDecoding(controller, affine, {"head": sure(0.9)}, ahead=HEAD).run(50, batch=4)
    step = Step(np.full(4, 9), 400, HEAD, ahead=HEAD)
    controller.plan(step)
    controller.admit(step)
    assert controller.plan_ahead(step, HEAD)["head"] >= 1
    following = Step(np.full(4, 9), 400, HEAD, ahead=HEAD, planned_ahead=True)
    decision = controller._decision(following)
    assert decision.began_ahead
    assert decision.planned
    assert controller._decision(following) is decision
    assert run.asked[-1]


def test_a_decision_about_a_step_after_the_end_of_its_call_is_dropped():
    run = simulate(affine, HEAD, head=sure(0.9)).run(50, batch=4)
    assert run.controller._ahead is not None
    first = run.controller._decision(Step(np.full(4, 9), 400, HEAD, ahead=HEAD))
    assert not first.began_ahead
    assert run.controller._ahead is None


def test_forwards_that_change_their_form_after_a_plan_ahead_stop_nothing() -> None:
    """A capture that is refused is told before the next step, and learned from after that one was planned."""
    run = SimulatedDecoding(GoodputController(HEAD), affine, {"head": sure(0.9)}, ahead=HEAD)
    run.controller.forwards_are_padded((8, 16, 32, 64))
    run.run(50, batch=4)
    controller = run.controller
    assert controller._ahead.planned
    padded = controller._cost
    known = padded.num_observed
    controller.forwards_are_padded(())
    run.run(1, batch=4)
    assert run.asked[-1].keys() <= {"head"}, "what was queued is there"
    assert run.admissions[-1].lengths.sum() == 0, "but nothing is known of a forward"
    assert (padded.num_observed, controller._cost.num_observed) == (known + 1, 0)
    kept = controller._models["head"].kept.mean
    run.run(1, batch=4)
    assert controller._models["head"].kept.mean == kept, "nobody broke the promise of what was queued"
    run.run(100, batch=4)
    assert controller._cost.num_observed == 101
    assert asked_share(run, "head", last=50) > 0.9
