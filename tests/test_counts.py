"""Compiled counts against their numpy forms."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.counts import asked_of, bounds, tokens_of


@pytest.mark.parametrize("number", [0, 1, 7])
def test_counts_are_those_of_numpy(number: int) -> None:
    rng = np.random.default_rng(number)
    numbers = rng.integers(-5, 6, number)
    assert bounds(numbers) == ((numbers.min(), numbers.max()) if number else (0, 0))
    assert asked_of(numbers) == (np.count_nonzero(numbers > 0), numbers.sum())
    lengths, requests = rng.integers(1, 40, 9), rng.permutation(9)[:number]
    assert tokens_of(requests, lengths) == lengths[requests].sum()
