"""The compiled search for draft lengths against a slow one."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.depth_search import search
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
    whom, index, goodput = search(current, expected, better, table, draft_s, depths, 0.97)
    found, undiscounted = answers[whom, index]
    assert found > 0.985 * max(best for best, _ in answers.values())  # survival is ranked in steps of 1/64
    assert goodput == pytest.approx(undiscounted, rel=0.02)
