"""The compiled search for draft lengths against a slow one."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.cost import DraftCost
from atlas_rl.controller.depth_search import decide, search
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD, DraftForecast
from tests.controller_simulator import affine
from tests.decisions import decide_in_numpy

UNPADDED = np.zeros(0, np.int64)


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


def test_slots_that_padding_makes_free_are_asked_for():
    """All slots of a draft are alike, so that they are one level, and only some of them are free."""
    edges = np.array([24, 40, 80])
    table = 0.1 + 0.01 * edges[np.searchsorted(edges, np.arange(33 * 2 + 1))]
    none, slots = np.zeros((33, 1)), np.full((1, 33, 1), 0.2)
    draft_s, depths = np.zeros((3, 1)), np.array([1])
    answers = [search(none, slots, np.ones(33, bool), table, 1.0, draft_s, depths, 1.0, e) for e in (UNPADDED, edges)]
    assert [answer[0] for answer in answers] == [0, 1]
    assert answers[1][2] == pytest.approx((33 + 7 * 0.2) / table[40])


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
    whom, index, goodput = search(current, expected, better, table / 1.25, 1.25, draft_s, depths, 0.97, UNPADDED)
    found, undiscounted = answers[whom, index]
    assert found > 0.985 * max(best for best, _ in answers.values())  # survival is ranked in steps of 1/64
    assert goodput == pytest.approx(undiscounted, rel=0.02)


@pytest.mark.parametrize("for_all", [False, True])
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_a_decision_in_one_call_is_the_plain_one(seed, is_known, for_all):
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
    first_s = float(rng.choice([0.0, 5e-4]))
    shares, levels = cost.tables()
    profiles, counts, unknown = forecast.tables()
    for turn in range(1, 4):
        found = decide(
            current, room, profiles, counts, turn, unknown, table / 1.25, 1.25, spent_s, first_s, shares, levels, is_known,
            backlog, depths, 0.97, UNPADDED, for_all,
        )  # fmt: skip
        expected = decide_in_numpy(
            current, room, twin, table, cost if is_known else None, spent_s, first_s, backlog, depths, 0.97,
            for_all=for_all,
        )  # fmt: skip
        assert np.array_equal(found[0], expected[0])
        assert found[1] == pytest.approx(expected[1])
        assert found[2] == expected[0].any()
        if for_all:
            assert len(set(found[0].tolist())) == 1
