"""Acceptance estimates: calibrated on what was committed, and forgetful in the right measure."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller import acceptance
from atlas_rl.controller.acceptance import AcceptanceModel
from atlas_rl.core import Draft, Verified


def test_boasting_at_far_positions_is_found_out_there():
    rng, model = np.random.default_rng(0), AcceptanceModel()
    confidence = np.full((8, 6), 0.8, np.float32)
    truth = np.array([0.8, 0.8, 0.3, 0.3, 0.3, 0.3])
    for _ in range(400):
        model.observe(confidence, *verify(confidence, truth, rng))
    assert model.estimate(confidence)[0] == pytest.approx(truth, abs=0.08)


def test_the_calibration_error_is_that_of_estimates_made_before_the_outcome():
    rng, model = np.random.default_rng(0), AcceptanceModel()
    assert model.take_calibration() == (0, 0.0)
    confidence = np.full((500, 1), 0.9, np.float32)
    model.observe(confidence, *verify(confidence, 0.4, rng))
    scored, error = model.take_calibration()
    assert scored == 500
    assert error == pytest.approx(0.5, abs=0.05)
    model.observe(confidence, *verify(confidence, 0.4, rng))
    assert model.take_calibration()[1] < 0.1
    assert model.take_calibration() == (0, 0.0)


def test_the_committed_tokens_judge_every_draft():
    verified = Verified(np.arange(4), np.array([[5, 6, 7], [5, 6, 7], [5, 0, 0], [5, 6, 0]]), np.array([3, 3, 1, 2]),
                        np.array([2, 2, 0, 1]), np.array([2, 2, 0, 1]), np.zeros(4, bool))  # fmt: skip
    draft = Draft(
        np.array([[5, 6, 7, 8], [5, 9, 7, 8], [5, 6, 7, 8], [9, 0, 0, 0]]), np.array([4, 4, 4, 1]),
        np.full((4, 4), 0.5, np.float32),
    )  # fmt: skip
    tried, accepted = verified.outcome_of(draft)
    assert tried.tolist() == [3, 2, 1, 1]
    assert accepted.tolist() == [3, 1, 1, 0]


def verify(confidence, truth, rng):
    """(num_drafted, num_accepted) of drafts that are verified whole."""
    right = rng.random(confidence.shape) < truth
    accepted = np.where(right.all(axis=1), confidence.shape[1], right.argmin(axis=1))
    return np.full(len(confidence), confidence.shape[1]), accepted


def calibration_error(model, truth):
    grid = np.linspace(0.05, 0.95, 40, dtype=np.float32)
    return float(np.abs(model.estimate(grid[None])[0] - truth(grid)).mean())


def test_without_data_the_speculators_own_confidence_stands():
    confidence = np.array([[0.1, 0.5, 0.9]], np.float32)
    assert np.allclose(AcceptanceModel().estimate(confidence), confidence, atol=1e-6)


@pytest.mark.parametrize(
    "truth", [lambda c: c**3, lambda c: np.sqrt(c), lambda c: 0.1 + 0 * c], ids=["boaster", "modest", "constant"]
)
def test_calibration_error_falls_with_data(truth):
    rng, model, errors = np.random.default_rng(0), AcceptanceModel(), []
    errors.append(calibration_error(model, truth))
    for rounds in (10, 100, 1000):
        for _ in range(rounds):
            confidence = rng.uniform(0.02, 0.98, size=(8, 4)).astype(np.float32)
            model.observe(confidence, *verify(confidence, truth(confidence), rng))
        errors.append(calibration_error(model, truth))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.04
    assert errors[-1] < 0.4 * errors[0]


def test_what_lies_behind_a_rejection_says_nothing():
    """The second position is right 9 times of 10, but seen half the time; its acceptance is not 0.45."""
    rng, model = np.random.default_rng(1), AcceptanceModel()
    confidence = np.tile(np.array([0.2, 0.7], np.float32), (4000, 1))
    model.observe(confidence, *verify(confidence, np.array([0.5, 0.9]), rng))
    first, second = model.estimate(confidence[:1])[0]
    assert first == pytest.approx(0.5, abs=0.03)
    assert second == pytest.approx(0.9, abs=0.03)


def test_only_verified_positions_count():
    """Drafts that were trimmed, or stand behind an accepted ending token, are neither accepted nor rejected."""
    model = AcceptanceModel()
    confidence = np.full((500, 3), 0.6, np.float32)
    confidence[:, 2] = 0.1  # a bin of its own
    model.observe(confidence, np.full(500, 2), np.full(500, 2))
    accepted, untouched = model.estimate(np.array([[0.6, 0.1]], np.float32))[0]
    assert accepted > 0.98
    assert untouched == pytest.approx(0.1, abs=1e-6)
    model.observe(np.zeros((4, 0), np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64))


def test_certain_confidences_stay_finite():
    model, extremes = AcceptanceModel(), np.array([[0.0, 1.0]], np.float32)
    model.observe(extremes, np.array([2]), np.array([1]))
    estimate = model.estimate(extremes)
    assert np.isfinite(estimate).all()
    assert (estimate >= 0).all()
    assert (estimate <= 1).all()


def test_new_evidence_outweighs_old_in_time():
    rng, model = np.random.default_rng(2), AcceptanceModel()
    confidence = np.full((8, 2), 0.5, np.float32)
    for truth, rounds in ((0.1, 1500), (0.9, 1500)):
        for _ in range(rounds):
            model.observe(confidence, *verify(confidence, truth, rng))
        assert model.estimate(confidence)[0, 0] == pytest.approx(truth, abs=0.1)


def test_a_policy_update_discounts_what_was_learned():
    model = AcceptanceModel()
    confidence = np.full((40, 1), 0.5, np.float32)
    model.observe(confidence, np.ones(40, np.int64), np.zeros(40, np.int64))
    estimates = [model.estimate(confidence)[0, 0]]
    for _ in range(8):
        model.policy_updated()
        estimates.append(model.estimate(confidence)[0, 0])
    assert estimates == sorted(estimates)
    assert estimates[0] < 0.12
    assert 0.25 < estimates[-1] < 0.5


def test_another_way_of_drawing_is_learned_anew_and_the_first_is_not_forgotten():
    """What was learned at temperature 1 is a guess at temperature 0, which a few outcomes correct."""
    model, confidence = AcceptanceModel(), np.full((400, 1), 0.5, np.float32)
    model.switch_to(1.0)
    model.observe(confidence, np.ones(400, np.int64), np.arange(400) % 4 == 0)
    assert model.estimate(confidence[:1]).item() == pytest.approx(0.25, abs=0.03)
    model.switch_to(0.0)
    assert model.estimate(confidence[:1]).item() == pytest.approx(0.25, abs=0.15)  # the guess
    model.observe(confidence[:40], np.ones(40, np.int64), np.ones(40, np.int64))
    assert model.estimate(confidence[:1]).item() > 0.75
    model.switch_to(1.0)
    assert model.estimate(confidence[:1]).item() == pytest.approx(0.25, abs=0.03)


def test_no_more_ways_of_drawing_are_kept_than_a_run_has():
    model = AcceptanceModel()
    for temperature in range(100):
        model.switch_to(temperature)
        model.observe(np.full((4, 2), 0.5, np.float32), np.full(4, 2), np.full(4, 1))
    assert len(model._evidence) <= 8


def test_the_compiled_count_is_the_plain_one():
    rng = np.random.default_rng(0)
    model, plain = AcceptanceModel(), AcceptanceModel()
    for _ in range(20):
        confidence = rng.random((30, 12), np.float32)
        tried, accepted = rng.integers(0, 13, 30), rng.integers(0, 13, 30)
        model.observe(confidence, tried, accepted)
        position = np.arange(12)[None]
        known = position < np.minimum(tried, accepted + 1)[:, None]
        stands = (position < accepted[:, None])[known]
        own, cell = acceptance._bins(confidence[known])
        kind = np.broadcast_to(acceptance._classes(12), known.shape)[known]
        bins = np.minimum((plain._estimate(own, cell, kind) * 10).astype(np.int64), 9)
        np.add.at(plain._scores, (1, bins), plain._estimate(own, cell, kind))
        np.add.at(plain._scores, (0, bins), 1.0)
        np.add.at(plain._scores, (2, bins), stands)
        np.add.at(plain._tried, (kind, cell), 1.0)
        np.add.at(plain._accepted, (kind, cell), stands)
        excess = np.maximum(1.0, plain._tried / acceptance._MEMORY)
        plain._tried /= excess
        plain._accepted /= excess
        plain._lines = None
    np.testing.assert_allclose(model._tried, plain._tried)
    np.testing.assert_allclose(model._accepted, plain._accepted)
    np.testing.assert_allclose(model._scores, plain._scores)
