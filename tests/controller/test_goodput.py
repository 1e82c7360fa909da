"""The adaptive controller in simulated worlds: known costs, known acceptance, never a real clock."""

from __future__ import annotations

import json

import numpy as np
import pytest

from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.controller.goodput import GoodputController
from tests.controller_simulator import (
    ADVERSE,
    CONTEXT,
    SimulatedDecoding,
    SimulatedDrafter,
    affine,
    as_sure_as,
    flat,
    proportional,
    saturating,
    shallow,
    simulate,
    sure,
)


def test_nothing_is_drafted_before_a_plain_forward_is_known():
    run = simulate(affine, cheap=sure(0.9))
    assert run.controller.plain_forward_s(4, 0) is None
    run.step(batch=4)
    assert run.admissions[0].lengths.sum() == 0
    assert run.controller.plain_forward_s(4, 0) is None, "one forward may have been interrupted"
    run.run(20, batch=4)
    assert run.controller.plain_forward_s(4, 0) == pytest.approx(affine(4), rel=0.1)
    assert run.controller.plain_forward_s(64, 0) is None, "nor is it known of a size that nobody tried"


def test_an_admission_of_nothing_has_two_arrays():
    """Whoever changes one, as an engine that trims drafts does, must not change the other."""
    run = simulate(affine, cheap=sure(0.9))
    run.step(batch=4)
    assert not np.shares_memory(run.admissions[0].drafters, run.admissions[0].lengths)


@pytest.mark.parametrize("tick_s", [0.0, 0.06])
def test_a_clock_that_stands_still_or_is_coarse_stops_nothing(tick_s):
    """Of 0.06 s: some steps seem to take nothing, and some less than their drafts."""
    run = SimulatedDecoding(Timed(tick_s), affine, {"cheap": sure(0.9)}, noise=0.0)
    run.run(200, batch=4)
    assert np.isfinite([record["discount"] for record in run.records]).all()
    assert sum(admission.lengths.sum() for admission in run.admissions) > 0
    assert run.controller.plain_forward_s(4, 0) > 0


class Timed(GoodputController):
    """Reads its seconds from a clock that ticks now and then: never, if that is every 0 seconds."""

    def __init__(self, tick_s):
        super().__init__(("cheap",), explain=True)
        self._tick_s, self._now_s = tick_s, 0.0

    def observe(self, step, admission, verified, forward_s, step_s):
        drafted_s = sum(step.draft_s.values())
        step.draft_s = {name: self._shown(self._now_s, seconds) for name, seconds in step.draft_s.items()}
        forward_s = self._shown(self._now_s + drafted_s, forward_s)
        step_s, self._now_s = self._shown(self._now_s, step_s), self._now_s + step_s
        return super().observe(step, admission, verified, forward_s, step_s)

    def _shown(self, since_s, seconds):
        if not self._tick_s:
            return 0.0
        return ((since_s + seconds) // self._tick_s - since_s // self._tick_s) * self._tick_s


def test_no_more_is_asked_or_admitted_than_there_is_room_for():
    run = simulate(flat, cheap=sure(0.97))
    for step in range(150):
        run.step(batch=4, room=step % 5)
        for most in run.asked[-1].values():
            assert most.max() <= step % 5
        assert run.admissions[-1].lengths.max() <= step % 5


def test_hopeless_drafts_are_not_verified():
    """The drafter boasts: it claims 0.6 and is right once in fifty times."""
    run = simulate(affine, cheap=sure(0.6, truth=0.02)).run(400, batch=8)
    assert run.mean_length(last=200) < 0.02
    assert run.mean_length(last=400) > 0  # it had its chance


def test_drafts_that_cost_as_much_as_they_bring_are_not_verified():
    run = simulate(proportional, cheap=sure(0.85)).run(400, batch=8)
    assert run.mean_length(last=200) < 0.1


def test_where_nothing_pays_planning_is_rare_too():
    drafters = {"cheap": sure(0.02)}
    run = SimulatedDecoding(GoodputController(("cheap",), explain=True), proportional, drafters).run(300, batch=32)
    planned = np.array([record["planned"] for record in run.records])
    assert planned[-100:].mean() < 0.2
    assert np.diff(np.flatnonzero(planned)).max() <= 10  # what begins to pay is seen soon
    run.run(2, batch=8)  # the first measures what no speculation costs
    assert run.records[-1]["planned"], "a batch that shrinks ends the pause"
    run.drafters["cheap"] = sure(0.9)
    run.cost = flat
    run.run(60, batch=8)
    assert all(record["planned"] for record in run.records[-10:])


def test_drafts_are_long_where_verification_is_free_and_acceptance_high():
    run = simulate(flat, cheap=sure(0.95)).run(200, batch=4)
    assert run.mean_length(last=100) > 8


def test_lengths_follow_the_confidence_of_each_row():
    chances = np.array([0.97, 0.2, 0.97, 0.2, 0.7, 0.7])
    run = simulate(affine, cheap=as_sure_as(chances)).run(300, batch=6)
    mean = np.mean([admission.lengths for admission in run.admissions[-150:]], axis=0)
    assert mean[[0, 2]].min() > 4
    assert mean[[1, 3]].max() < 0.5
    assert mean[[4, 5]].min() > mean[[1, 3]].max()
    assert mean[[4, 5]].max() < mean[[0, 2]].min()


def test_each_request_uses_the_more_promising_draft():
    even = np.arange(6) % 2 == 0
    a, b = as_sure_as(np.where(even, 0.95, 0.3)), as_sure_as(np.where(even, 0.3, 0.95))
    run = simulate(affine, a=a, b=b).run(200, batch=6)
    last = run.admissions[-20:]
    assert all((admission.lengths > 0).all() or not admission.lengths.any() for admission in last)
    drafters = np.array([admission.drafters for admission in last if admission.lengths.any()])
    assert (drafters == np.where(even, 0, 1)).all()


def test_drafts_grow_longer_as_the_batch_shrinks():
    run = simulate(saturating, cheap=sure(0.8))
    lengths = []
    for batch in (32, 16, 8, 4, 2):
        run.run(150, batch)
        lengths.append(run.mean_length(last=75))
    assert lengths == sorted(lengths)
    assert lengths[0] < 0.7
    assert lengths[-1] > 4


def test_a_costly_drafter_that_wins_is_used():
    run = simulate(affine, costly=sure(0.9, draft_s=lambda depth: 0.005 * depth)).run(300, batch=8)
    asked = [bool(plan) for plan in run.asked[-200:]]
    assert np.mean(asked) > 0.9
    assert run.goodput(last=200) > 1.4 * 8 / affine(8)


def test_a_costly_drafter_that_loses_is_tried_dropped_and_rarely_tried_again():
    run = simulate(affine, costly=sure(0.5, draft_s=lambda depth: 0.06 * depth)).run(1500, batch=8)
    asked = np.array([bool(plan) for plan in run.asked])
    assert asked[:20].sum() >= 1
    assert asked[100:].mean() < 0.03
    assert asked[100:].sum() >= 1


def test_a_costly_drafter_has_to_beat_the_cheap_one():
    """Alone it would win; beside a free drafter that is nearly as good it does not pay."""
    costly = sure(0.85, draft_s=lambda depth: 0.02 * depth)
    both = simulate(affine, cheap=sure(0.8), costly=costly).run(600, batch=4)
    alone = simulate(affine, costly=costly).run(600, batch=4)
    assert np.mean(["costly" in plan for plan in both.asked[200:]]) < 0.1
    assert np.mean(["costly" in plan for plan in alone.asked[200:]]) > 0.8
    assert np.mean(["cheap" in plan for plan in both.asked[200:]]) > 0.9


@pytest.mark.parametrize("name", ADVERSE)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_run_is_not_slower_than_without_speculation(name, batch):
    """Everything counted: learning, trials, and drafts that were in vain."""
    cost, drafter = ADVERSE[name]
    run = simulate(cost, only=drafter).run(600, batch)
    plain = SimulatedDecoding(NoSpeculation(), cost, {}).run(600, batch)
    assert run.goodput() > 0.97 * plain.goodput()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [flat, affine, saturating, proportional])
def test_a_run_is_nearly_as_fast_as_with_the_best_fixed_length(cost, chance, batch):
    drafters = {"cheap": sure(chance)}
    run = simulate(cost, **drafters).run(300, batch)
    fixed = [
        SimulatedDecoding(FixedController(["cheap"], "cheap", k), cost, drafters).run(60, batch)
        for k in (1, 2, 4, 8, 16)
    ]
    best = max(batch / cost(batch), *(other.goodput() for other in fixed))
    assert run.goodput(last=200) > 0.9 * best


def test_what_plain_decoding_costs_stays_known_while_everything_is_drafted():
    run = simulate(affine, cheap=sure(0.95)).run(400, batch=8)
    assert run.mean_length(last=300) > 2
    assert run.controller.plain_forward_s(8, 8 * CONTEXT) == pytest.approx(affine(8), rel=0.1)


def test_outliers_do_not_confuse_it():
    rng = np.random.default_rng(3)

    def hiccups(tokens):
        return affine(tokens) * (10 if rng.random() < 0.05 else 1)

    calm, rough = simulate(affine, cheap=sure(0.8)), simulate(hiccups, cheap=sure(0.8))
    assert rough.run(400, batch=8).mean_length(200) == pytest.approx(calm.run(400, batch=8).mean_length(200), rel=0.3)


def test_one_interrupted_step_of_a_new_batch_size_does_not_make_drafting_look_free():
    """Nothing contradicts it by itself: drafting everything takes as long as plain decoding was then thought to take."""

    def cost(tokens):
        return 0.08 + 0.00375 * tokens

    run = simulate(cost, only=sure(0.35)).run(180, batch=12)
    run.cost = lambda tokens: 9 * cost(tokens)
    run.step(24)
    run.cost = cost
    run.seconds.clear()
    run.tokens.clear()
    run.run(100, batch=32)
    assert run.goodput() > 0.97 * 32 / cost(32)


def test_interrupted_steps_of_a_size_do_not_make_it_look_dear_for_good():
    """The first two steps with drafts were interrupted: nothing else would ever make that size be tried again."""

    def length(seed: int) -> float:
        run, drafting = simulate(shallow, cheap=sure(0.8)), iter(range(10**6))
        run.rng = np.random.default_rng(seed)
        run.cost = lambda tokens: shallow(tokens) * (10 if tokens > 8 and next(drafting) in (0, 2) else 1)
        return run.run(150, batch=8).mean_length(last=50)

    assert np.mean([length(seed) for seed in range(5)]) > 1.5


def test_a_machine_that_slows_down_while_it_drafts_does_not_make_plain_decoding_look_cheap_or_dear():
    run = simulate(affine, cheap=sure(0.8)).run(150, batch=4)
    before = run.mean_length(last=50)
    run.cost = lambda tokens: 3 * affine(tokens)
    run.drafters["cheap"].draft_s = lambda depth: 3e-5 * depth
    run.run(100, batch=4)
    assert run.mean_length(last=50) == pytest.approx(before, rel=0.25)


def test_a_policy_update_gives_a_failed_drafter_another_chance():
    drafter = sure(0.6, truth=0.02)
    run = simulate(affine, cheap=drafter).run(60, batch=8)
    assert run.mean_length(last=20) == 0
    drafter.truth = lambda c: np.full(c.shape, 0.9)  # its refresh has cured it
    for _ in range(20):
        run.controller.policy_updated({})
        run.run(20, batch=8)
    assert run.mean_length(last=20) > 1


def test_what_a_drafter_cost_for_many_does_not_keep_it_from_few():
    """Far too dear at 32 requests, it would double the speed of one: nobody knows before it is tried."""
    dear = sure(0.9, draft_s=lambda depth: 1e-3 * depth, per_request_s=4e-3)
    run = SimulatedDecoding(GoodputController(("dear",)), affine, {"dear": dear}).run(200, batch=32)
    assert run.mean_length(last=100) == 0
    assert run.run(30, batch=1).mean_length(last=20) > 2


def test_costs_that_no_model_sees_are_noticed_and_stop_drafting():
    """Each drafting step takes longer than it shows: what it keeps of its promise says so."""
    hidden = simulate(affine, history=sure(0.5))
    hidden.drafting_costs_s = 0.1
    open_ = simulate(affine, history=sure(0.5))
    assert open_.run(300, 8).mean_length(100) > 0.5
    assert hidden.run(300, 8).mean_length(100) < 0.2 * open_.mean_length(100)


@pytest.mark.slow
def test_a_costly_drafter_is_asked_for_the_requests_that_the_cheap_one_leaves():
    """The history knows half of the requests by heart; the head is worth its price for the others alone."""
    known = np.arange(8) % 2 == 0
    cheap = as_sure_as(np.where(known, 0.9, 0.02))
    costly = sure(0.85, draft_s=lambda depth: 0.0003 * depth, per_request_s=0.0002)

    def goodput(seed: int, **drafters: SimulatedDrafter) -> float:
        run = simulate(shallow, **drafters)
        run.rng = np.random.default_rng(seed)
        run.run(400, batch=8)
        if "costly" in drafters:
            asked = np.array([step["costly"] for step in run.asked[200:] if "costly" in step])
            assert len(asked) > 150
            assert (asked[:, ~known] > 0).mean() > 0.9
            assert (asked[:, known] > 0).mean() < 0.1
        return run.goodput(last=200)

    gains = [goodput(seed, cheap=cheap, costly=costly) / goodput(seed, cheap=cheap) for seed in range(3)]
    assert np.mean(gains) > 1.1


@pytest.mark.parametrize("steps_before", [100, 130, 160])
def test_a_refresh_that_measured_its_drafter_needs_no_gamble(steps_before):
    """A useless head becomes good. Measured, it is asked in the next step; otherwise it waits until it is due for a trial.

    Trials may take 0.3% of the time, and one takes 60% of a step: the head is due once in some 200 steps.
    """

    def steps_until_asked(measured: bool) -> int:
        head = sure(0.3, draft_s=lambda depth: 0.01 * depth)
        run = simulate(affine, head=head)
        run.controller.policy_updated({"head": np.full(5, 0.1)})
        run.run(steps_before, batch=8)
        assert np.mean([bool(plan) for plan in run.asked[50:]]) < 0.1
        run.drafters["head"] = sure(0.95, draft_s=head.draft_s)
        run.controller.policy_updated({"head": np.cumprod(np.full(5, 0.95))} if measured else {})
        run.run(200, batch=8)
        return [bool(plan) for plan in run.asked[steps_before:]].index(True)

    assert steps_until_asked(measured=True) == 0
    assert steps_until_asked(measured=False) > 30


def test_a_drafter_that_was_not_verified_is_judged_all_the_same():
    """`b` is never admitted beside the confident `a`, yet what it would have got right is known."""
    boaster = sure(0.5, truth=0.95)
    run = simulate(affine, a=sure(0.9, truth=0.9), b=boaster).run(100, batch=8)
    used = np.concatenate([admission.drafters[admission.lengths > 0] for admission in run.admissions[-20:]])
    assert (used == 1).mean() > 0.9


def test_every_step_can_be_explained():
    drafters = {"cheap": sure(0.8)}
    run = SimulatedDecoding(GoodputController(("cheap",), explain=True), affine, drafters).run(60, batch=4)
    silent = simulate(affine, cheap=sure(0.8)).run(60, batch=4)
    assert silent.records == [None] * 60
    assert run.tokens == silent.tokens
    json.dumps(run.records)
    first, last = run.records[0], run.records[-1]
    assert first["asked"] == first["admitted"] == {}
    assert last["asked"]["cheap"]["requests"] == 4
    assert sum(last["admitted"].values()) == run.admissions[-1].lengths.sum()
    assert last["longest"] == run.admissions[-1].lengths.max()
    assert last["tokens"] == run.tokens[-1]
    expected, came = (np.sum([r[key] for r in run.records[30:]]) for key in ("expected_tokens", "tokens"))
    assert expected == pytest.approx(came, rel=0.1)


def test_forwards_that_stop_growing_dearer_are_found():
    """From 32 to 48 tokens they grow, beyond they do not: a line through what a few drafts take would never go there."""
    found = []
    for seed in range(8):  # a run of 150 steps may be unlucky in what it tries
        simulated = simulate(lambda tokens: 0.050 + 0.002 * min(max(tokens - 32, 0), 16), cheap=sure(0.5))
        simulated.rng = np.random.default_rng(seed)
        found.append(simulated.run(150, batch=32).mean_length(last=50))
    assert np.mean(found) > 1
