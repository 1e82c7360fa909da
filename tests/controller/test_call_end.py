"""A call is over when its last request is: the controller forecasts that, and makes no drafts that would make it later."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.controller.base import Admission, Rest, Step
from atlas_rl.controller.call_end import CallEnd, _Retry, seconds_to_end
from atlas_rl.controller.cost import CostModel
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft, Verified
from benchmarks.call_end import COSTS, call_s, ratios, texts_of

FORWARD_S = 0.01


def plain_costs() -> CostModel:
    """Of forwards that cost the same for any number of tokens."""
    costs = CostModel()
    for tokens in (1, 8, 64, 512):
        for _ in range(4):
            costs.observe(tokens, FORWARD_S)
    return costs


def observed(end: CallEnd, gained: np.ndarray, generated: int, draft_s: float, *, num_waiting: int = 0) -> None:
    """A step in which each request, int64 `[batch]`, gained so many of 4 draft tokens; nobody ends before 96."""
    batch = len(gained)
    requests, slots = np.arange(batch), np.full(batch, 4)
    rest = Rest(requests, np.full(batch, generated), np.full(batch, 96 - generated), num_waiting)
    step = Step(np.full(batch, 50), 0, ["a"], {"a": slots}, {}, {"a": draft_s}, rest=rest)
    verified = Verified(
        requests, np.ones((batch, 5), np.int64), gained + 1, gained, slots, np.zeros(batch, bool)
    )  # fmt: skip
    end.observe(step, Admission(np.zeros(batch, np.int64), slots), verified, plain_costs(), sum(step.draft_s.values()))


def after_steps(gained: np.ndarray, draft_s: float, **options: int) -> bool:
    """Whether drafts are held back after a dozen steps."""
    end = CallEnd()
    for step in range(12):
        observed(end, gained, 1 + step, draft_s, **options)
    return end.holds_back


def test_the_slowest_request_decides():
    """All gain two tokens in a step that is a third longer, but one gains nothing."""
    everyone = np.full(16, 2)
    assert not after_steps(everyone, FORWARD_S / 3)
    all_but_one = np.where(np.arange(16) == 3, 0, everyone)
    assert after_steps(all_but_one, FORWARD_S / 3)


def test_while_requests_wait_for_a_row_every_token_counts_alike():
    all_but_one = np.where(np.arange(16) == 3, 0, 2)
    assert not after_steps(all_but_one, FORWARD_S / 3, num_waiting=5)


def test_nothing_is_forecast_of_a_step_that_does_not_say_what_its_requests_have_before_them():
    end = CallEnd()
    nothing = np.zeros(4, np.int64)
    step = Step(np.full(4, 50), 0, ["a"])
    verified = Verified(np.arange(4), np.ones((4, 1), np.int64), nothing + 1, nothing, nothing, np.ones(4, bool))
    end.observe(step, Admission(nothing, nothing), verified, plain_costs(), sum(step.draft_s.values()))
    assert not end.holds_back


def test_luck_that_evens_out_holds_nothing_back():
    """All requests are alike, but after some steps some have gained twice as much as others."""
    rng, end = np.random.default_rng(0), CallEnd()
    held_back = []
    for step in range(24):
        observed(end, rng.binomial(4, 0.5, 64), 1 + step, FORWARD_S / 3)
        held_back.append(end.holds_back)
    assert not any(held_back)


def test_seconds_to_the_end_are_those_of_the_steps():
    """Two requests: one of 4 steps, and one of 10; the batch of one is half as dear, and its drafts are free."""
    remaining, rate, slots = np.array([[8.0, 10.0]]), np.array([[2.0, 1.0]]), np.array([[1.0, 0.0]])
    table, share, draft_s = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.5, 0.5, 1.0]), np.array([0.0, 0.0, 0.25])
    assert seconds_to_end(remaining, rate, slots, table, share, draft_s) == pytest.approx(4 * (3 + 0.25) + 6 * 0.5)


@pytest.mark.parametrize("kind", ["60% repeat", "90% repeat", "spread"])
def test_calls_end_no_later_than_without_drafts(kind):
    """The toy that goodput loses in: some requests repeat themselves, and all run to the same limit."""
    seconds = ratios(kind, 32, COSTS["flat"], calls=3)
    assert seconds["off"][1:].sum() > 0.98 * seconds["call_end"][1:].sum()
    assert seconds["off"][1:].sum() < 0.97 * seconds["goodput"][1:].sum(), "a toy that nobody loses tells nothing"


@pytest.mark.parametrize("kind", ["alike", "geometric"])
def test_calls_that_drafts_bring_forward_are_not_held_back(kind):
    seconds = ratios(kind, 16, COSTS["flat"], calls=2)
    assert seconds["off"].sum() > 1.3 * seconds["call_end"].sum()
    assert seconds["goodput"].sum() > 0.98 * seconds["call_end"].sum()


def test_calls_whose_drafts_get_better_along_the_texts_are_not_held_back():
    """The latest gains would say so: they are small at the beginning of every text."""
    seconds = ratios("rising", 8, COSTS["ridge"], calls=4)
    assert seconds["off"][1:].sum() > 1.3 * seconds["call_end"][1:].sum()
    assert seconds["goodput"].sum() > 0.98 * seconds["call_end"].sum()


def test_drafts_that_get_better_for_half_of_the_requests_are_held_back():
    """The others decide when the call ends."""
    seconds = ratios("half late", 32, COSTS["flat"], calls=4)
    assert seconds["off"][1:].sum() > 0.98 * seconds["call_end"][1:].sum()
    assert seconds["goodput"][2:].sum() > seconds["call_end"][2:].sum()


def test_after_calls_that_were_held_back_one_begins_anew():
    """Drafters and policy have changed meanwhile. The next such call comes later."""
    retry, anew = _Retry(), []
    for _ in range(8 + 16):
        for step in range(10):
            retry.observe(drafted=step < 3, held_back=step >= 3)
        anew.append(retry.call_begins())
    assert np.flatnonzero(anew).tolist() == [7, 23]


@pytest.mark.parametrize("drawn", [False, True])
def test_what_is_admitted_does_not_depend_on_the_forecast(drawn):
    """It is made while a step runs. One that says otherwise in between must not choose among tokens that were drawn."""
    admissions = []
    for says in (False, True):
        controller = GoodputController(("a",))
        call_s(controller, texts_of("alike", 8, np.random.default_rng(1)), COSTS["flat"])
        probs = torch.zeros(8, 4, 2) if drawn else None
        rest = Rest(np.arange(8), np.full(8, 5), np.full(8, 91))
        asked = np.full(8, 4)
        draft = Draft(np.zeros((8, 4), np.int64), asked, np.full((8, 4), 0.9, np.float32), probs)
        step = Step(np.full(8, 50), 800, ["a"], rest=rest)
        controller.plan(step)
        step.asked["a"], step.drafts["a"], step.draft_s["a"] = asked, draft, 1e-4
        controller._end.holds_back = says
        admissions.append(controller.admit(step).lengths.tolist())
    assert admissions[0] == admissions[1]
    assert sum(admissions[0]) > 0
