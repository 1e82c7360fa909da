"""Forecasts of drafts: how far they are believed to go on, and where they end."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD, DraftForecast

NO_DRAFT = np.zeros(8)


def drafts(depth: int, seed: int, num_calls: int = 60) -> DraftForecast:
    """After drafts to this depth whose positions are easy or hard, whatever the position before was."""
    rng, forecast = np.random.default_rng(seed), DraftForecast()
    for _ in range(num_calls):
        survival = np.zeros((8, MAX_LOOKAHEAD))
        survival[:, :depth] = np.cumprod(rng.choice([0.95, 0.3], size=(8, depth)), axis=1)
        forecast.observe(NO_DRAFT, survival, np.full(8, depth), np.full(8, depth))
    return forecast


@pytest.mark.parametrize("seed", range(3))
def test_a_sure_last_token_does_not_promise_a_long_draft(seed):
    """Half of the drafts of three end on a sure token; hardly any would have gone on for eight more."""
    short, long = (drafts(depth, seed).predict(NO_DRAFT).mean(axis=(0, 1)) for depth in (3, MAX_LOOKAHEAD))
    assert long[10] < 0.03
    assert short[10] < 0.03
    assert short[3] == pytest.approx(long[3], abs=0.08)


def test_a_draft_that_ends_by_itself_has_nothing_beyond():
    forecast = DraftForecast()
    survival = np.zeros((8, MAX_LOOKAHEAD))
    survival[:, :2] = 0.9
    forecast.observe(NO_DRAFT, survival, np.full(8, 6), np.full(8, 2))
    assert (forecast.predict(NO_DRAFT)[:, :, 2:] == 0).all()


def test_survival_never_rises_along_a_profile():
    forecast = drafts(2, 0)
    assert (np.diff(forecast.predict(NO_DRAFT), axis=-1) <= 1e-12).all()
