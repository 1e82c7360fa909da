"""Compiled decisions about slots against their numpy forms."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.acceptance import AcceptanceModel
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.slots import admitted, compare, lengths_of, num_admitted, positive, take_better, weigh, within


def _survival(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Rows that never rise, with many equal values among them, and zeros behind their drafts."""
    steps = rng.choice([1.0, 0.9, 0.5], (batch, MAX_LOOKAHEAD))
    survival = np.cumprod(steps, axis=1)
    survival[np.arange(MAX_LOOKAHEAD)[None] >= rng.integers(0, MAX_LOOKAHEAD + 1, batch)[:, None]] = 0.0
    return survival


@pytest.mark.parametrize("width", [0, 3, MAX_LOOKAHEAD, MAX_LOOKAHEAD + 4])
def test_survival_is_the_product_of_estimates(width: int) -> None:
    rng = np.random.default_rng(width)
    model = AcceptanceModel()
    for _ in range(5):
        tried = rng.integers(0, 5, 20)
        model.observe(rng.random((20, 6), np.float32), tried, np.maximum(tried - 1, 0))
    confidence, lengths = rng.random((7, width), np.float32), rng.integers(0, width + 1, 7)
    present = np.arange(width)[None] < lengths[:, None]
    expected = np.zeros((7, MAX_LOOKAHEAD))
    kept = min(width, MAX_LOOKAHEAD)
    estimate = model.estimate(confidence[:, :kept])
    expected[:, :kept] = np.cumprod(np.where(present[:, :kept], estimate, 0.0), axis=1)
    np.testing.assert_allclose(model.survival(confidence, lengths), expected, rtol=1e-12)


@pytest.mark.parametrize("columns", [1, MAX_LOOKAHEAD])
def test_a_request_takes_the_draft_that_gains_most(columns: int) -> None:
    rng = np.random.default_rng(columns)
    drafts = [_survival(rng, 9) for _ in range(3)]
    survival, gains, drafters = np.zeros((9, MAX_LOOKAHEAD)), np.zeros(9), np.zeros(9, np.int64)
    for index, own in enumerate(drafts):
        take_better(survival, gains, drafters, own, index, columns)
    each = np.stack([own[:, :columns].sum(axis=1) for own in drafts])
    assert np.array_equal(drafters, np.where(each.max(axis=0) > 0, each.argmax(axis=0), 0))
    np.testing.assert_array_equal(survival, np.stack(drafts)[drafters, np.arange(9)])


def test_a_new_draft_is_weighed_in_one_call() -> None:
    rng, model = np.random.default_rng(0), AcceptanceModel()
    survival, gains, drafters = np.zeros((9, MAX_LOOKAHEAD)), np.zeros(9), np.zeros(9, np.int64)
    copies = survival.copy(), gains.copy(), drafters.copy()
    for index in range(3):
        confidence, lengths = rng.random((9, 5), np.float32), rng.integers(0, 6, 9)
        own = weigh(confidence, lengths, *model.tables(), survival, gains, drafters, index, MAX_LOOKAHEAD)
        np.testing.assert_array_equal(own, model.survival(confidence, lengths))
        take_better(*copies, own, index, MAX_LOOKAHEAD)
    for array, copy in zip((survival, gains, drafters), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert set(drafters.tolist()) == {0, 1, 2}


def test_expected_drafts_are_cut_and_compared() -> None:
    rng = np.random.default_rng(1)
    expected, survival = np.stack([_survival(rng, 9) for _ in range(4)]), _survival(rng, 9)
    room = rng.integers(0, MAX_LOOKAHEAD + 1, 9)
    cut = np.where(np.arange(MAX_LOOKAHEAD)[None] < room[:, None], expected, 0.0)
    better = compare(expected, room, survival)
    np.testing.assert_array_equal(expected, cut)
    assert np.array_equal(better, cut.mean(axis=0).sum(axis=1) > survival.sum(axis=1))


def test_what_is_asked_for_is_cut_to_the_room() -> None:
    wanted, room = np.array([3, 0, 4, 2]), np.array([5, 5, 1, 0])
    asked, anybody = within(wanted, room)
    assert np.array_equal(asked, np.minimum(wanted, room))
    assert anybody
    assert not within(wanted, 0 * room)[1]


def test_values_of_slots_are_the_positive_ones() -> None:
    survival = _survival(np.random.default_rng(3), 9)
    survival[4] = 0.0
    np.testing.assert_array_equal(positive(survival), survival[survival > 0])


@pytest.mark.parametrize("one_by_one", [False, True])
def test_as_many_slots_are_admitted_as_pay(one_by_one: bool) -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        batch, values = 5, np.sort(rng.random(30))
        seconds = 1e-3 * (1 + np.cumsum(rng.random(batch + 31)) * rng.choice([0.01, 0.2, 1.0]))
        drafting_s, discount, factor = float(rng.random() * 1e-3), float(rng.uniform(0.5, 1.0)), 1.25
        gained = np.concatenate([[0.0], np.cumsum(values[::-1])])
        whole_s = factor * seconds[batch : batch + 31] + drafting_s
        if one_by_one:
            goodput = (batch + discount * gained) / whole_s
            stops = np.flatnonzero(np.diff(goodput) <= 0)
            best = int(stops[0]) if len(stops) else len(values)
        else:
            goodput = (batch + gained) / whole_s
            goodput[1:] *= discount
            best = int(goodput.argmax())
        count, tokens = num_admitted(values, batch, seconds, factor, drafting_s, discount, one_by_one)
        assert count == best
        assert tokens == pytest.approx(gained[best])


def test_the_likeliest_slots_are_admitted_in_order() -> None:
    for seed in range(20):
        survival = _survival(np.random.default_rng(seed), 8)
        values = np.sort(survival[survival > 0])
        rows, positions = np.nonzero(survival)
        order = np.lexsort((positions, -survival[rows, positions]))
        for count in range(len(values) + 1):
            expected = np.bincount(rows[order[:count]], minlength=8)
            assert np.array_equal(lengths_of(survival, values, count), expected)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_admission_in_one_call_is_its_parts(one_by_one: bool) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        survival = _survival(rng, 6) * rng.choice([0.0, 1.0], (6, 1))
        table = 1e-3 * (1 + np.cumsum(rng.random(6 * (MAX_LOOKAHEAD + 1) + 1)) * rng.choice([0.01, 0.2]))
        values = np.sort(survival[survival > 0])
        how = 1.25, float(rng.random() * 1e-3), 0.9, one_by_one
        count, gained = num_admitted(values, 6, table, *how)
        lengths, tokens, seconds = admitted(survival, values, table, *how)
        assert np.array_equal(lengths, lengths_of(survival, values, count))
        assert (tokens, seconds) == (gained, table[6 + count] * 1.25)
