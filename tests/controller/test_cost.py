"""Cost models: forwards and drafts timed with noise and outliers, never a real clock."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.cost import CostModel, DraftCost
from tests.controller_simulator import affine, proportional


def observed(cost, sizes, samples=15, seed=0, noise=0.03, outliers=0.1):
    rng, model = np.random.default_rng(seed), CostModel()
    for size in np.repeat(sizes, samples):
        slow = 5.0 if rng.random() < outliers else 1.0
        model.observe(int(size), cost(int(size)) * slow * (1 + noise * rng.normal()))
    return model


def test_without_evidence_there_is_no_prediction():
    assert CostModel().predict(8) is None


def test_a_clock_that_stands_still_is_no_error():
    model, drafts = CostModel(), DraftCost()
    for tokens in (1, 8, 8, 1) * 8:
        model.observe(tokens, 0.0, context_tokens=100)
        drafts.observe(tokens, 2, 0.0)
    assert 0 < model.predict(8, 100)[8] < 1e-6
    assert 0 <= drafts.predict(8, 2) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_an_affine_cost_is_recovered_under_noise_and_outliers(seed):
    table = observed(affine, [4, 6, 8, 12, 16, 24, 40, 64], seed=seed).predict(80)
    for size in range(4, 81):
        assert table[size] == pytest.approx(affine(size), rel=0.1)


def test_a_step_in_the_cost_shows_where_it_was_seen():
    def stepped(tokens):
        return 0.02 if tokens <= 8 else 0.05

    sizes = [2, 4, 6, 8, 9, 10, 12, 16]
    table = observed(stepped, sizes, outliers=0).predict(16)
    for size in sizes:
        assert table[size] == pytest.approx(stepped(size), rel=0.3)
    assert table[9] > 1.7 * table[8]


def test_one_size_is_enough_to_start_with():
    model = observed(affine, [8], outliers=0)
    table = model.predict(64)
    assert table[8] == pytest.approx(affine(8), rel=0.05)
    assert table[8] < table[16] < table[64] < 8 * table[8]  # dearer, but not in proportion


@pytest.mark.parametrize("seed", range(8))
def test_more_tokens_are_never_predicted_to_be_cheaper(seed):
    rng, model = np.random.default_rng(seed), CostModel()
    for _ in range(60):
        model.observe(int(rng.integers(1, 200)), float(rng.exponential(0.05)))
    table = model.predict(400)
    assert table.shape == (401,)
    assert (table > 0).all()
    assert (np.diff(table) >= 0).all()


def test_a_machine_that_slows_down_is_followed():
    model = observed(affine, [4, 8, 16], outliers=0)
    for size in (4, 8, 16):
        for _ in range(15):
            model.observe(size, 2 * affine(size))
    assert model.predict(16)[8] == pytest.approx(2 * affine(8), rel=0.05)


def test_sizes_that_are_not_seen_slow_down_with_the_machine():
    model = observed(affine, [4, 8, 16, 32], outliers=0)
    for _ in range(15):
        model.observe(8, 2 * affine(8))
    table = model.predict(32)
    for size in (4, 8, 16, 32):
        assert table[size] == pytest.approx(2 * affine(size), rel=0.1)


def test_a_context_that_grows_while_the_machine_slows_down_leaves_the_sizes_as_they_were():
    """Both look alike; what matters to a decision is how sizes compare, and that neither may touch."""
    rng, model = np.random.default_rng(0), CostModel()
    for step in range(400):
        size = int(rng.choice([8, 16, 32, 64]))
        slow = 1 + step % 100 / 100
        model.observe(size, proportional(size) * slow * (1 + 0.03 * rng.normal()), 1000 + 20 * (step % 100))
    table = model.predict(64, 2000)
    assert table[64] / table[16] == pytest.approx(4, rel=0.2)
    assert table[32] / table[8] == pytest.approx(4, rel=0.2)


def test_what_interrupts_some_forwards_is_in_their_mean():
    """Predictions are medians: one forward in five takes half as long again, a rare one a hundred times as long."""
    cost = CostModel()
    assert cost.mean_over_median == 1.0
    for index in range(400):
        cost.observe((4, 8)[index % 2], (1.5 if index % 5 == 0 else 1.0) * affine((4, 8)[index % 2]))
    assert cost.seconds(4) == pytest.approx(affine(4), rel=0.02)
    assert cost.mean_over_median == pytest.approx(1.1, abs=0.03)
    cost.observe(4, 100 * affine(4))
    assert cost.mean_over_median < 1.13, "a single one counts as twice as long at most"


def test_every_size_is_predicted_as_it_was_seen():
    for size in range(1, 301):
        model = CostModel()
        for _ in range(15):
            model.observe(size, 0.04)
        assert model.predict(300)[size] == pytest.approx(0.04, rel=0.15), size


def test_a_flat_cost_is_flat_across_every_bucket_edge():
    model = CostModel()
    for size in range(1, 301):
        model.observe(size, 0.04)
    assert np.allclose(model.predict(300)[1:], 0.04, rtol=0.02)


def test_a_longer_table_begins_with_the_shorter_one():
    model = observed(lambda tokens: 0.02 if tokens <= 12 else 0.05, [1, 4, 12, 30], outliers=0)
    short = model.predict(10).copy()
    assert np.array_equal(model.predict(300)[:11], short)
    assert np.array_equal(model.predict(10), short)


def test_what_reading_the_context_costs_is_told_apart_from_the_tokens():
    rng, model = np.random.default_rng(0), CostModel()
    for _ in range(60):
        for size in (4, 8, 16):
            context = int(rng.integers(500, 20_000))
            model.observe(size, affine(size) + 2e-6 * context, context)
    for context in (1000, 15_000):
        assert model.predict(16, context)[8] == pytest.approx(affine(8) + 2e-6 * context, rel=0.1)


def test_contexts_that_cost_nothing_stay_free():
    rng, model = np.random.default_rng(0), CostModel()
    for _ in range(200):
        model.observe(8, affine(8) * (1 + 0.05 * rng.normal()), int(rng.integers(500, 20_000)))
    assert model.predict(8, 20_000)[8] == pytest.approx(model.predict(8, 500)[8], rel=0.05)


def drafted(seconds, calls, seed=0, outliers=0.05):
    rng, model = np.random.default_rng(seed), DraftCost()
    for rows, depth in calls:
        slow = 20.0 if rng.random() < outliers else 1.0
        model.observe(rows, depth, seconds(rows, depth) * slow * (1 + 0.03 * rng.normal()))
    return model


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_of_drafting_is_recovered_under_noise_and_outliers(seed):
    def seconds(rows, depth):
        return 0.002 + 0.001 * depth + 0.0002 * rows * depth

    rng = np.random.default_rng(seed)
    model = drafted(seconds, [(int(rng.integers(1, 17)), int(rng.integers(1, 9))) for _ in range(64)], seed)
    for rows, depth in ((1, 1), (4, 4), (16, 2), (16, 8)):
        assert model.predict(rows, depth) == pytest.approx(seconds(rows, depth), rel=0.35)


def test_one_draft_says_in_proportion_to_its_depth():
    model = drafted(lambda rows, depth: 0.01 * depth, [(8, 4)], outliers=0)
    assert model.predict(8, np.array([2, 4, 8])) == pytest.approx([0.02, 0.04, 0.08], rel=0.15)
    with pytest.raises(ValueError, match="no call"):
        DraftCost().predict(8, 4)


def test_no_draft_is_predicted_to_take_less_than_nothing():
    rng = np.random.default_rng(0)
    model = drafted(lambda rows, depth: float(rng.exponential(0.01)), [(i % 7 + 1, i % 5 + 1) for i in range(40)])
    assert (model.predict(1, np.arange(17)) >= 0).all()


def test_what_a_drafter_had_missed_is_told_apart_from_drafting():
    """Asked now and then, it runs long backlogs; asked in every step it would not."""
    rng, model = np.random.default_rng(0), DraftCost()
    for _ in range(20):
        rows, backlog = int(rng.integers(4, 9)), int(rng.integers(50, 500))
        model.observe(rows, 4, 0.01 + 1e-4 * backlog, backlog)
    assert model.predict(8, 4, 16) == pytest.approx(0.0116, rel=0.25)
    assert model.predict(8, 4, 500) == pytest.approx(0.06, rel=0.1)


def test_a_large_batch_says_nothing_of_a_small_one():
    model = drafted(lambda rows, depth: 0.001 * rows * depth, [(16, 4)] * 4, outliers=0)
    assert model.knows(16)
    assert model.knows(8)
    assert not model.knows(1)


def test_calls_of_another_size_that_took_less_do_not_make_these_look_cheap():
    """Calls for sixteen date from before the machine slowed down; those for four are the newest."""
    model = drafted(lambda rows, depth: 0.001 * depth, [(16, depth) for depth in (1, 2, 4, 8) * 3], outliers=0)
    for depth in (1, 2, 4, 8) * 3:
        model.observe(4, depth, 0.003 * depth)
    assert model.predict(4, 6) == pytest.approx(0.018, rel=0.15)
    assert model.predict(16, 6) == pytest.approx(0.006, rel=0.25)


def test_one_interrupted_call_does_not_make_its_octave_dear():
    model = drafted(lambda rows, depth: 0.001 * depth, [(16, depth) for depth in (1, 2, 4, 8) * 3], outliers=0)
    model.observe(2, 4, 0.4)
    assert model.predict(2, 4) < 0.008


def test_sizes_beyond_padding_may_be_cheaper_than_padded_ones() -> None:
    """They run in another way: neither kind is told from the other."""

    def seconds(tokens: int) -> float:
        return (5e-3 + 4e-5 * (32 if tokens <= 32 else 64)) if tokens <= 64 else 4e-3 + 1e-5 * tokens

    cost = CostModel((32, 64))
    for tokens in (20, 60, 80, 120) * 12:
        cost.observe(tokens, seconds(tokens))
    for tokens in (10, 50, 64, 80, 100, 120):
        assert cost.seconds(tokens) == pytest.approx(seconds(tokens), rel=0.03), tokens
    assert cost.seconds(80) < cost.seconds(64)


def test_sizes_on_the_other_side_of_the_end_of_padding_bound_nothing() -> None:
    """64 padded tokens cost more than 80 that are not: drafts for 80 are not compared with what 64 take."""
    dear, cheap = 9e-3, 4e-3
    cost = CostModel((32, 64))
    for _ in range(12):
        cost.observe(64, dear)
    assert not cost.knows(80)
    for _ in range(12):
        cost.observe(120, cheap)
    assert not cost.knows(80), "nothing smaller of its kind was measured"


def test_a_size_seen_once_follows_the_sizes_around_it() -> None:
    """A forward's cost is a curve. Far from its line, one sample does not outweigh it, but the neighbours agree."""

    def seconds(tokens: int) -> float:
        return 4e-3 + 2e-3 * (1 - np.exp(-tokens / 40))

    cost = CostModel()
    for tokens in (32, 128, 512) * 12:
        cost.observe(tokens, seconds(tokens))
    before = abs(cost.seconds(80) / seconds(80) - 1)
    cost.observe(80, seconds(80))
    assert abs(cost.seconds(80) / seconds(80) - 1) < before < 0.06
