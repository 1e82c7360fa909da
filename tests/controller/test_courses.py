"""The gains of requests change as those of earlier calls did from the same place of their texts."""

from __future__ import annotations

import numpy as np

from atlas_rl.controller.base import Rest
from atlas_rl.controller.courses import Courses, _course

BATCH, LENGTH = 16, 128


def after_call(gains: np.ndarray, *, whole: bool = True, anew: bool = False, batch: int = 0) -> Courses:
    """After a call of `batch` requests, or `BATCH`, of which `BATCH` requests of `LENGTH` tokens had drafts.

    `gains`: int64 `[BATCH, LENGTH]`, tokens gained at each token.
    """
    courses, generated, everyone = Courses(), np.ones(BATCH, np.int64), np.arange(BATCH)
    courses.call_begins(batch or BATCH, whole=False, anew=False)
    while (generated < LENGTH).any():
        left = generated < LENGTH
        rest = Rest(everyone[left], generated[left], LENGTH - generated[left])
        gained = gains[everyone[left], generated[left]]
        courses.observe(rest, np.full(len(gained), 4), gained)
        generated[left] += 1 + gained
    courses.call_begins(BATCH, whole=whole, anew=anew)
    return courses


def changes(courses: Courses, generated: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Changes of the gains, and slots, of a batch whose requests have all generated as many tokens."""
    rest = Rest(np.arange(BATCH), np.full(BATCH, generated), np.full(BATCH, LENGTH - generated))
    remaining = np.full((16, BATCH), LENGTH - generated, np.float64)
    return courses.changes(rest, remaining, 0.05, np.random.default_rng(0))


def foreseen(courses: Courses, generated: int) -> tuple[np.ndarray, np.ndarray]:
    """`changes` where there is evidence."""
    drawn = changes(courses, generated)
    assert drawn is not None
    return drawn


def late(who: np.ndarray) -> np.ndarray:
    """Those of `who`, bool `[BATCH]`, gain three tokens per step in the second half of their texts."""
    return np.where(who[:, None] & (np.arange(LENGTH) >= LENGTH // 2), 3, 0)


def test_a_gain_that_comes_late_is_foreseen():
    """64 steps of one token, then 16 of four."""
    gains, slots = foreseen(after_call(late(np.full(BATCH, True))), 1)
    np.testing.assert_allclose(gains, 127 / 79 - 1, atol=0.02)
    np.testing.assert_allclose(slots, 4)
    gains, _ = foreseen(after_call(late(np.full(BATCH, True))), 64)
    np.testing.assert_allclose(gains, 0, atol=1e-9)


def test_a_batch_that_had_no_drafts_before_it_shrank_tells_nothing():
    """Drafts are longer in it than in a whole call of that size."""
    gains = late(np.full(BATCH, True))
    assert [changes(after_call(gains, batch=batch), 1) is None for batch in (BATCH, 2 * BATCH)] == [False, True]


def test_a_request_that_never_gains_stays_one():
    """Half of the requests gain late. Before, nobody can tell who: in each scenario some never do."""
    gains, _ = foreseen(after_call(late(np.arange(BATCH) < BATCH // 2)), 1)
    assert (gains.min(axis=1) < 0.05).all()
    assert (gains.max(axis=1) > 0.5).all()


def test_gains_at_the_same_place_tell_requests_apart():
    """Those that gain a token per step in the first half gain three in the second."""
    who = np.arange(BATCH) < BATCH // 2
    courses = after_call(np.maximum(late(who), who[:, None]))
    for generated in range(32, 64, 2):
        rest = Rest(np.arange(BATCH), np.full(BATCH, generated), np.full(BATCH, LENGTH - generated))
        courses.observe(rest, np.full(BATCH, 4), np.where(who, 1, 0))
    gains, _ = foreseen(courses, 63)
    np.testing.assert_allclose(gains, np.where(who, 2, 0)[None].repeat(16, axis=0), atol=0.1)


def test_calls_that_were_held_back_are_not_remembered():
    gains = late(np.full(BATCH, True))
    assert changes(after_call(gains, whole=False), 1) is None
    assert changes(after_call(gains, anew=True), 1) is None


def test_calls_of_another_batch_tell_nothing():
    rest = Rest(np.arange(4 * BATCH), np.ones(4 * BATCH, np.int64), np.full(4 * BATCH, LENGTH - 1))
    courses = after_call(late(np.full(BATCH, True)))
    assert courses.changes(rest, np.full((16, 4 * BATCH), 127.0), 1.0, np.random.default_rng(0)) is None


def test_places_without_enough_steps_take_the_rates_beside_them():
    own = np.zeros((1, 20, 3))
    own[0, 1] = 2, 2, 8  # too few: pooled with the next steps
    own[0, 3] = 2, 4, 0
    own[0, 5] = 4, 8, 4
    course = _course(own)[0]
    assert course[:, 0].tolist() == own[0, :, 0].tolist()
    assert course[:5, 1:].tolist() == [[1.5, 2.0]] * 5
    assert course[5:, 1:].tolist() == [[2.0, 1.0]] * 15
