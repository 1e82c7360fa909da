"""What is expected of a speculator before it drafts."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD, Expectation

NOTHING_THERE = np.zeros(8)


def drafts(depth: int, seed: int, num_calls: int = 60) -> Expectation:
    """After drafts to this depth whose positions are easy or hard, whatever the position before was."""
    rng, expectation = np.random.default_rng(seed), Expectation()
    for _ in range(num_calls):
        survival = np.zeros((8, MAX_LOOKAHEAD))
        survival[:, :depth] = np.cumprod(rng.choice([0.95, 0.3], size=(8, depth)), axis=1)
        expectation.observe(NOTHING_THERE, survival, np.full(8, depth), np.full(8, depth))
    return expectation


@pytest.mark.parametrize("seed", range(3))
def test_a_sure_last_token_does_not_promise_a_long_draft(seed):
    """Half of the drafts of three end on a sure token; hardly any would have gone on for eight more."""
    short, long = (drafts(depth, seed).survival(NOTHING_THERE).mean(axis=(0, 1)) for depth in (3, MAX_LOOKAHEAD))
    assert long[10] < 0.03
    assert short[10] < 0.03
    assert short[3] == pytest.approx(long[3], abs=0.08)


def test_a_draft_that_ends_by_itself_has_nothing_beyond():
    expectation = Expectation()
    survival = np.zeros((8, MAX_LOOKAHEAD))
    survival[:, :2] = 0.9
    expectation.observe(NOTHING_THERE, survival, np.full(8, 6), np.full(8, 2))
    assert (expectation.survival(NOTHING_THERE)[:, :, 2:] == 0).all()


def test_survival_never_rises_along_a_profile():
    expectation = drafts(2, 0)
    assert (np.diff(expectation.survival(NOTHING_THERE), axis=-1) <= 1e-12).all()
