"""Under rejection, whether a drawn token is verified depends on its prefix alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.controller.base import Step
from atlas_rl.controller.cost import CostModel
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft
from tests.controller_simulator import CONTEXT, ROOM, SimulatedDecoding, affine, simulate, sure


def plateau(tokens: int) -> float:
    """One more token than the batch costs as much as many more: slots pay together or not at all."""
    return 0.050 if tokens <= 4 else 0.062


def depends_on_the_drawn_token(draft_probs: torch.Tensor | None) -> int:
    """How often a slot's fate changes with confidences of later positions, which a drawn token decides."""
    rng = np.random.default_rng(5)
    controller = simulate(plateau, a=sure(0.8), b=sure(0.8)).run(60, batch=4).controller
    changes = 0
    for _ in range(150):
        confidence = {name: rng.uniform(0.02, 0.98, (4, 5)).astype(np.float32) for name in ("a", "b")}

        def admit(confidence=confidence):
            tokens, lengths = np.zeros((4, 5), np.int64), np.full(4, 5)
            drafts = {name: Draft(tokens, lengths, values, draft_probs) for name, values in confidence.items()}
            asked = dict.fromkeys(drafts, lengths)
            step = Step(np.full(4, ROOM), 4 * CONTEXT, list(drafts), asked, drafts, dict.fromkeys(drafts, 1e-5))
            return controller.admit(step)

        before = admit()
        row, position = int(rng.integers(4)), int(rng.integers(4))
        for values in confidence.values():
            values[row, position + 1 :] = rng.uniform(0.02, 0.98, 4 - position)
        after = admit()
        changes += min(before.lengths[row], position + 1) != min(after.lengths[row], position + 1)
        changes += bool(min(before.lengths[row], after.lengths[row])) and before.drafters[row] != after.drafters[row]
    return changes


def test_whether_a_draw_is_verified_depends_on_its_prefix_alone():
    """Rejection sampling is exact only then. A later position's confidence is a function of the drawn token."""
    assert depends_on_the_drawn_token(torch.zeros(4, 5, 2)) == 0


def test_the_test_itself_catches_a_controller_that_looks_ahead():
    """As it may where one seed gives one text whatever is drafted, and drafts carry no probabilities."""
    assert depends_on_the_drawn_token(None) > 10


def depends_on_the_drafts_seconds(draft_probs: torch.Tensor | None) -> bool:
    """Whether a draft that was done sooner, as one is that drew an ending token, is admitted differently."""
    controller = simulate(affine, a=sure(0.8)).run(60, batch=4).controller
    admitted = set()
    for draft_s in (1e-6, 1.0):
        lengths = np.full(4, 5)
        draft = Draft(np.zeros((4, 5), np.int64), lengths, np.full((4, 5), 0.3, np.float32), draft_probs)
        step = Step(np.full(4, ROOM), 4 * CONTEXT, ["a"], {"a": lengths}, {"a": draft}, {"a": draft_s})
        admitted.add(tuple(controller.admit(step).lengths))
    return len(admitted) > 1


def test_the_clock_does_not_tell_what_was_drawn():
    assert not depends_on_the_drafts_seconds(torch.zeros(4, 5, 2))


def test_the_test_of_the_clock_catches_a_controller_that_reads_it():
    """As it may where drafts carry no probabilities: what was spent on them is spent."""
    assert depends_on_the_drafts_seconds(None)


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
def test_drawn_drafts_are_still_worth_their_while(chance):
    arms = {"cheap": sure(chance)}
    run = SimulatedDecoding(GoodputController(("cheap",)), affine, arms, draft_probs=torch.zeros(8, 16, 2)).run(
        300, batch=8
    )
    assert run.goodput(last=200) > 0.85 * simulate(affine, **arms).run(300, batch=8).goodput(last=200)


def test_whether_a_trial_is_verified_does_not_depend_on_an_ending_token_that_was_drawn():
    """A row that drew one is shorter, and forwards of the size that is left were seen before."""
    admitted = []
    for first_length in (4, 1):
        controller = simulate(affine, a=sure(0.8)).run(1, batch=4).controller
        for _ in range(3):
            controller._cost.observe(4 + 13, affine(4 + 13), 4 * CONTEXT)
        step = Step(np.full(4, ROOM), 4 * CONTEXT, ["a"])
        asked = controller.plan(step)["a"]
        assert asked.tolist() == [4] * 4, "the first call of a speculator is a trial"
        lengths = np.array([first_length, 4, 4, 4])
        confidence = np.full((4, 4), 0.02, np.float32)
        step.asked["a"], step.draft_s["a"] = asked, 1e-5
        step.drafts["a"] = Draft(np.zeros((4, 4), np.int64), lengths, confidence, torch.zeros(4, 4, 2))
        admitted.append(np.minimum(controller.admit(step).lengths, [1, 4, 4, 4]).tolist())
    assert admitted[0] == admitted[1]


def test_an_ending_token_that_was_drawn_does_not_bring_newer_costs_into_the_decision(monkeypatch: pytest.MonkeyPatch):
    """Asked for a larger forward than before, the costs are fitted anew, to the newest measurements."""
    asked: list[int] = []
    tables = CostModel.tables
    monkeypatch.setattr(
        CostModel, "tables", lambda self, size, context: asked.append(size) or tables(self, size, context)
    )
    seen = []
    for first_length in (4, 1):
        controller = simulate(affine, a=sure(0.8)).run(1, batch=4).controller
        lengths = np.array([first_length, 4, 4, 4])
        draft = Draft(np.zeros((4, 4), np.int64), lengths, np.full((4, 4), 0.9, np.float32), torch.zeros(4, 4, 2))
        step = Step(np.full(4, ROOM), 4 * CONTEXT, ["a"], {"a": np.full(4, 4)}, {"a": draft}, {"a": 1e-5})
        asked.clear()
        controller.admit(step)
        seen.append(list(asked))
    assert seen[0] == seen[1] != []
