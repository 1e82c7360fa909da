"""A plan over all drafters in one compiled call, against the same drafter by drafter in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.arms import NOT_ASKED, Arms, ask_next
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.promises import DrafterModel, Kept
from tests.decisions import ask_in_numpy

UNPADDED = np.zeros(0, np.int64)
DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, MAX_LOOKAHEAD])


def kept(rng: np.random.Generator) -> Kept:
    """A drafter's record over some steps, mostly a little worse than promised."""
    record = Kept()
    for _ in range(int(rng.integers(0, 20))):
        record.observe(float(rng.uniform(0.85, 1.05)), 1.0)
    return record


def drafter(seed: int) -> DrafterModel:
    """Some drafter: some were called for many requests only, some too rarely for their cost to be known."""
    rng = np.random.default_rng(seed)
    model = DrafterModel(kept=kept(rng))
    most, price_s = int(rng.choice([4, 60])), 10 ** rng.uniform(-5, -3)
    for _ in range(int(rng.choice([0, 2, 3, 6], p=[0.1, 0.2, 0.2, 0.5]))):
        rows, depth, backlog = int(rng.integers(most // 2, most)), int(rng.integers(1, 9)), int(rng.integers(0, 40))
        model.cost.observe(rows, depth, price_s * (3 + depth + 0.01 * rows * depth + 0.1 * backlog), backlog)
    batch, least = 30, rng.uniform(0.0, 0.9)
    for _ in range(int(rng.integers(0, 4))):
        survival, lengths = np.cumprod(rng.uniform(least, 1, (batch, MAX_LOOKAHEAD)), axis=1), rng.integers(0, 9, batch)
        survival[np.arange(MAX_LOOKAHEAD)[None] >= lengths[:, None]] = 0
        model.forecast.observe(rng.choice([0.0, 0.2, 0.5, 0.9], batch), survival, np.full(batch, 8), lengths)
    return model


def test_a_plan_in_one_call_is_the_plain_one() -> None:
    answers: list[tuple[bool, bool, bool]] = []
    for seed in range(80):
        rng, for_all = np.random.default_rng(seed), seed % 4 == 0
        models, twins = ([drafter(3 * seed + own) for own in range(3)] for _ in range(2))
        plain, arms, batch = kept(rng), Arms(3), int(rng.integers(1, 40))
        for own, model in enumerate(models):
            arms.note(own, model, plain)
        arms.purses_s[:] = rng.choice([0.0, 1e-4, 1e-2], 3)
        purses_s = arms.purses_s.copy()
        table = 4e-3 + rng.choice([1e-3, 1e-4, 1e-5]) * np.arange(batch * (MAX_LOOKAHEAD + 1) + 1)
        for _ in range(4):  # forecasts show other profiles every time
            current = np.cumprod(rng.uniform(rng.uniform(0, 0.9), 1, (batch, MAX_LOOKAHEAD)), axis=1)
            current[rng.random(batch) < 0.5] = 0
            room = rng.integers(0, MAX_LOOKAHEAD + 4, batch)
            arms.backlogs[:] = np.where(rng.random(3) < 0.3, NOT_ASKED, rng.integers(0, 60, 3))
            spent_s, first_s = float(rng.uniform(0, 1e-3)), float(rng.choice([0.0, 5e-4]))
            chosen, wanted, beside, goodput, is_trial = ask_next(
                current, room, arms.backlogs, table / 1.25, 1.25, spent_s, first_s, DEPTHS, UNPADDED, for_all, *arms.arrays
            )  # fmt: skip
            expected = ask_in_numpy(
                twins, purses_s, plain, current, room, arms.backlogs, table, spent_s, first_s, DEPTHS, for_all
            )
            assert (chosen, is_trial) == (expected[0], expected[3])
            assert np.array_equal(wanted, expected[1])
            assert np.array_equal(beside, current[:, 0])
            assert goodput == pytest.approx(expected[2])
            np.testing.assert_allclose(arms.purses_s, purses_s, rtol=1e-12, atol=1e-12)
            answers.append((chosen >= 0, goodput > 0, is_trial))
    # All kinds of answers occur: nobody, calls that pay, trials of calls of unknown cost, calls that were saved up for.
    assert {(False, False, False), (True, True, False), (True, False, True), (True, False, False)} <= set(answers)


def test_what_a_model_learns_counts_from_the_next_note_on() -> None:
    model, arms = drafter(1), Arms(1)
    arms.note(0, model, Kept())
    before = [array.copy() for array in arms.arrays]
    model.forecast.observe(np.zeros(4), np.full((4, MAX_LOOKAHEAD), 0.5), np.full(4, 8), np.full(4, 8))
    assert all(np.array_equal(array, known) for array, known in zip(arms.arrays, before, strict=True))
    arms.note(0, model, Kept())
    assert not all(np.array_equal(array, known) for array, known in zip(arms.arrays, before, strict=True))
