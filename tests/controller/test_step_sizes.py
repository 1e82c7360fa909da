"""Forwards that are padded cost what the size costs that they are padded to, and the controller fills it."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.cost import CostModel, CostModels
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.controller.step_sizes import StepSizes
from atlas_rl.decode.guard import Faults, GuardedController
from atlas_rl.policy.step_graphs import SIZES
from tests.controller_simulator import SimulatedDecoding, as_sure_as, sure

PADDED = (1, 2, 4, 8, 12, 16, 24, 50)


def padded_to(num_tokens, sizes=SIZES):
    return next(size for size in (*sizes, num_tokens) if size >= num_tokens)


def staircase(fixed_s, token_s):
    return lambda num_tokens: fixed_s + token_s * padded_to(num_tokens)


def buckets_of(sizes):
    return np.array([sizes.bucket(size) for size in range(1, 301)])


def test_buckets_are_ordered_and_narrow():
    sizes, buckets = np.arange(1, 301), buckets_of(StepSizes())
    assert (buckets <= sizes).all()
    assert (np.diff(buckets) >= 0).all()
    assert (buckets[:15] == sizes[:15]).all()
    assert ((sizes - buckets) <= sizes / 8).all()


@pytest.mark.parametrize("padded", [(), PADDED, SIZES, (17,)])
def test_buckets_do_not_overlap_and_leave_nothing_out(padded):
    sizes = StepSizes(padded)
    begin = sizes.bucket(0)
    while begin <= 700:
        end = sizes.end(begin)
        assert {sizes.bucket(size) for size in range(begin, end)} == {begin}
        assert sizes.bucket(end) == end
        begin = end


def test_a_bucket_is_what_is_padded_to_one_size():
    sizes = StepSizes(PADDED)
    assert [sizes.bucket(n) for n in (1, 2, 3, 4, 9, 12, 13, 25, 50, 51, 52)] == [0, 2, 3, 3, 9, 9, 13, 25, 25, 51, 52]
    assert sizes.run(60).tolist() == [1, *(padded_to(n, PADDED) for n in range(1, 61))]
    assert StepSizes().run(20).tolist() == list(range(21))


def test_one_forward_tells_what_all_of_its_size_cost():
    model = CostModel(PADDED)
    for size in (3, 10, 20):
        for _ in range(15):
            model.observe(size, 0.05 + 0.002 * padded_to(size, PADDED))
    table = model.predict(60)
    for size in range(1, 25):
        assert table[size] == pytest.approx(0.05 + 0.002 * padded_to(size, PADDED), rel=0.02)
    assert table[25] == table[50] > table[24]
    assert model.num_samples(9) == model.num_samples(12) == 15
    assert model.num_samples(13) == 0
    assert model.knows(11)
    assert not model.knows(40)


@pytest.mark.parametrize("size", [1, 9, 16, 17, 48, 49, 55, 64, 500])
def test_a_size_beyond_the_last_is_learned_as_ever(size):
    model = CostModel((1, 48))
    for _ in range(15):
        model.observe(size, 0.04)
    assert model.predict(600)[size] == pytest.approx(0.04, rel=0.15)


def run_of(cost, drafter, batch, *, told, seed, steps=250):
    simulated = SimulatedDecoding(
        GoodputController(("drafter",)), cost, {"drafter": drafter}, rng=np.random.default_rng(seed)
    )
    if told:
        simulated.controller.forwards_are_padded(SIZES)
    return simulated.run(steps, batch)


def goodput_of(run, chances):
    """Tokens per second that the decisions of a run bring in expectation."""
    gained = 0.0
    for admission in run.admissions:
        slots = np.arange(1, admission.lengths.max(initial=0) + 1) <= admission.lengths[:, None]
        gained += (chances[:, None] ** np.arange(1, slots.shape[1] + 1) * slots).sum()
    return (gained + len(chances) * len(run.admissions)) / sum(run.seconds)


CASES = [  # cost, the chances of each request's drafts, and the least that is gained
    (staircase(0.050, 0.0005), np.full(33, 0.7), 1.04),
    (staircase(0.050, 0.002), np.random.default_rng(1).uniform(0.05, 0.95, 5), 1.02),
    (staircase(0.050, 0.002), np.random.default_rng(1).uniform(0.05, 0.95, 33), 1.02),
    (staircase(0.020, 0.004), np.random.default_rng(1).uniform(0.05, 0.95, 33), 1.15),
]


@pytest.mark.parametrize(("cost", "chances", "least"), CASES)
def test_who_knows_the_edges_gains_by_them(cost, chances, least):
    goodput = {
        told: np.mean([
            goodput_of(run_of(cost, as_sure_as(chances), len(chances), told=told, seed=seed), chances) for seed in (0, 1)
        ])
        for told in (False, True)
    }  # fmt: skip
    assert goodput[True] >= least * goodput[False]


def test_steps_are_filled_and_edges_not_crossed_for_little():
    """33 requests that are all about as sure: 40, 48 and 56 tokens are the ends of stairs."""
    chances = np.random.default_rng(0).uniform(0.5, 0.6, 33)
    run = run_of(staircase(0.020, 0.004), as_sure_as(chances), 33, told=True, seed=0)
    sizes = np.array([33 + admission.lengths.sum() for admission in run.admissions[-100:]])
    drafted = sizes[sizes > 33]
    assert len(drafted) > 50
    assert np.isin(drafted, SIZES).mean() > 0.9


def test_what_was_learned_is_of_steps_of_one_form_and_is_there_when_they_return():
    run = run_of(staircase(0.05, 0.002), sure(0.7), 5, told=True, seed=0, steps=40)
    controller = GuardedController(run.controller, Faults())
    known = controller.plain_forward_s(5, 500)
    controller.forwards_are_padded(list(SIZES))
    assert known is not None
    assert controller.plain_forward_s(5, 500) == known
    controller.forwards_are_padded(())
    assert controller.plain_forward_s(5, 500) is None
    controller.forwards_are_padded(SIZES)
    assert controller.plain_forward_s(5, 500) == known


def test_forwards_of_either_form_are_counted_for_it_alone():
    costs = CostModels()
    for padded, count in (((), 2), (PADDED, 3), ((), 4)):
        for _ in range(count):
            costs.of(padded).observe(9, 0.05)
    assert costs.of().num_samples(9) == 6
    assert costs.of(list(PADDED)).num_samples(12) == 3


def test_a_baseline_keeps_what_it_learned_of_either_form():
    controller = FixedController(["drafter"], "drafter", 2)
    SimulatedDecoding(controller, lambda n: 0.05, {"drafter": sure(0.5)}).run(4, batch=3)  # forwards over 9 tokens
    known = controller.plain_forward_s(9, 900)
    assert known is not None
    controller.forwards_are_padded(PADDED)
    controller.forwards_are_padded(())
    assert controller.plain_forward_s(9, 900) == known


def test_a_baseline_reads_its_forwards_from_the_same_stairs():
    controller = FixedController(["drafter"], "drafter", 2)
    controller.forwards_are_padded(PADDED)
    SimulatedDecoding(controller, lambda n: 0.05, {"drafter": sure(0.5)}).run(4, batch=3)  # forwards over 9 tokens
    assert controller.plain_forward_s(12, 1200) == pytest.approx(0.05, rel=0.1)
    assert controller.plain_forward_s(13, 1300) is None


@pytest.mark.parametrize("batch", [5, 33])
def test_padding_carries_drafts_where_there_are_any(batch):
    """No forward runs padding while a slot that was drafted is left out."""
    run = run_of(
        staircase(0.020, 0.001),
        as_sure_as(np.random.default_rng(2).uniform(0.1, 0.9, batch)),
        batch,
        told=True,
        seed=0,
        steps=120,
    )
    drafted = [sum(int(most.sum()) for most in asked.values()) for asked in run.asked]
    sizes = [batch + int(admission.lengths.sum()) for admission in run.admissions]
    late = list(zip(drafted, sizes, strict=True))[60:]
    assert sum(slots > 0 for slots, _ in late) > 40
    assert all(size in SIZES or size == batch + slots or size == batch for slots, size in late)
    assert any(size in SIZES and size < batch + slots for slots, size in late)
