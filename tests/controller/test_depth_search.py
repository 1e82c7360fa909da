"""The compiled search for draft lengths against a slow one."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.cost import DraftCost
from atlas_rl.controller.depth_search import decide, search
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD, DraftForecast
from tests.controller_simulator import affine


def slow_search(current, expected, better, table, draft_s, depths, discount):
    """The same by sorting every answer's slots: the goodput of each, and what it is without the factor."""

    def verified(survival, seconds):
        values = np.sort(survival[survival > 0])[::-1]
        tokens = np.append(len(current), discount * (len(current) + np.cumsum(values)))
        whole_s = table[len(current) : len(current) + 1 + len(values)] + seconds
        best = (tokens / whole_s).argmax()
        return tokens[best], whole_s[best], tokens[best] / (discount if best else 1.0)

    def goodput(survivals, seconds):
        tokens, whole_s, undiscounted = np.sum([verified(survival, seconds) for survival in survivals], axis=0)
        return tokens / whole_s, undiscounted / whole_s

    answers = {(0, 0): goodput([current], draft_s[0, 0])}
    for whom, rows in ((1, better), (2, np.ones(len(current), bool))):
        for index, depth in enumerate(depths):
            cut = np.where(np.arange(current.shape[1]) < depth, expected, 0)
            taken = rows & (cut.sum(axis=2) > current.sum(axis=1))
            answers[whom, index] = goodput(np.where(taken[..., None], cut, current), draft_s[whom, index])
    return answers


@pytest.mark.parametrize("seed", range(12))
def test_the_compiled_search_finds_what_sorting_finds(seed):
    rng = np.random.default_rng(seed)
    batch, depths = int(rng.integers(1, 20)), np.array([1, 2, 3, 4, 6, 8, 12, 16])
    draws = int(rng.integers(1, 6))
    current = np.cumprod(rng.uniform(rng.uniform(0, 0.9), 1, (batch, 16)), axis=1)
    expected = np.cumprod(rng.uniform(rng.uniform(0, 0.9), 1, (draws, batch, 16)), axis=2)
    current[rng.random(batch) < 0.3] = 0
    better = expected.mean(axis=0).sum(axis=1) > current.sum(axis=1)
    table = np.array([affine(n) for n in range(batch * 17 + 1)])
    draft_s = np.concatenate([np.zeros((1, 8)), np.outer([better.mean(), 1], depths) * rng.uniform(0, 0.01)])
    answers = slow_search(current, expected, better, table, draft_s, depths, 0.97)
    whom, index, goodput = search(current, expected, better, table / 1.25, 1.25, draft_s, depths, 0.97)
    found, undiscounted = answers[whom, index]
    assert found > 0.985 * max(best for best, _ in answers.values())  # survival is ranked in steps of 1/64
    assert goodput == pytest.approx(undiscounted, rel=0.02)


def by_levels(current, expected, better, table, draft_s, depths, discount):
    """`search` in plain numpy: every answer's slots counted by levels of survival, likeliest first."""

    def verified(survival, seconds):
        values = survival[survival > 0]
        level = np.minimum(((1 - values) * 64).astype(int), 63)
        counts = np.bincount(level, minlength=64)
        tokens = np.append(len(current), len(current) + np.cumsum(np.bincount(level, values, minlength=64)))
        whole_s = table[len(current) + np.append(0, np.cumsum(counts))] + seconds
        worth = np.append(1.0, np.full(64, discount))
        best = (worth * tokens / whole_s).argmax()
        return tokens[best], worth[best] * tokens[best], whole_s[best]

    answers = {(0, 0): np.array(verified(current, draft_s[0, 0]))}
    for whom, rows in ((1, better), (2, np.ones(len(current), bool))):
        for index, depth in enumerate(depths):
            cut = np.where(np.arange(current.shape[1]) < depth, expected, 0)
            taken = rows & (cut.sum(axis=2) > current.sum(axis=1))
            if not taken.any():
                continue  # it would cost, and bring nothing
            survivals = np.where(taken[..., None], cut, current)
            answers[whom, index] = np.sum([verified(one, draft_s[whom, index]) for one in survivals], axis=0)
    best = max(answers, key=lambda answer: answers[answer][1] / answers[answer][2])  # the first of equals
    return *best, answers[best][0] / answers[best][2]


def plain(current, room, forecast, table, cost, spent_s, backlog, depths, discount):
    """`decide` in plain numpy; without a `cost` drafts are free."""
    expected = forecast.predict(current[:, 0])
    expected = np.where(np.arange(MAX_LOOKAHEAD)[None] < room[:, None], expected, 0.0)
    better = expected.mean(axis=0).sum(axis=1) > current.sum(axis=1)
    draft_s = np.full((3, len(depths)), spent_s)
    if cost is not None:
        for whom, rows in ((1, int(better.sum())), (2, len(room))):
            draft_s[whom] += cost.predict(rows, depths, min(backlog, 2 * rows))
    whom, index, goodput = by_levels(current, expected, better, table, draft_s, depths, discount)
    asked = (np.zeros(len(room), bool), better, np.ones(len(room), bool))[whom]
    return np.where(asked, depths[index], 0), goodput


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_a_decision_in_one_call_is_the_plain_one(seed, is_known):
    rng = np.random.default_rng(seed)
    batch, depths = int(rng.integers(1, 40)), np.array([1, 2, 3, 4, 6, 8, 12, MAX_LOOKAHEAD])
    forecast, twin, cost = DraftForecast(), DraftForecast(), DraftCost()
    for _ in range(int(rng.integers(0, 5))):
        survival = np.cumprod(rng.uniform(0.4, 1, (batch, MAX_LOOKAHEAD)), axis=1)
        lengths = rng.integers(0, 9, batch)
        survival[np.arange(MAX_LOOKAHEAD)[None] >= lengths[:, None]] = 0
        beside = rng.choice([0.0, 0.2, 0.5, 0.9], batch)
        for one in (forecast, twin):
            one.observe(beside, survival, np.full(batch, 8), lengths)
    for _ in range(6):
        rows, depth, backlog = int(rng.integers(1, 50)), int(rng.integers(1, 9)), int(rng.integers(0, 40))
        cost.observe(rows, depth, 1e-4 * (3 + depth + 0.01 * rows * depth + 0.1 * backlog), backlog)
    current = np.cumprod(rng.uniform(rng.uniform(0, 0.9), 1, (batch, MAX_LOOKAHEAD)), axis=1)
    current[rng.random(batch) < 0.4] = 0
    room = rng.integers(0, MAX_LOOKAHEAD + 4, batch)
    table = 4e-3 + np.array([1e-4, 1e-5])[seed % 2] * np.arange(batch * (MAX_LOOKAHEAD + 1) + 1)
    spent_s, backlog = float(rng.uniform(0, 1e-3)), int(rng.integers(0, 100))
    shares, levels = cost.tables()
    for _ in range(3):  # the profiles' turn moves on
        found = decide(
            current, room, forecast.tables(), table / 1.25, 1.25, spent_s, shares if is_known else shares[:0], levels,
            backlog, depths, 0.97,
        )  # fmt: skip
        expected = plain(current, room, twin, table, cost if is_known else None, spent_s, backlog, depths, 0.97)
        assert np.array_equal(found[0], expected[0])
        assert found[1] == pytest.approx(expected[1])
        assert found[2] == expected[0].any()
