"""Compiled counts against their numpy forms."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.counts import bounds


@pytest.mark.parametrize("number", [0, 1, 7])
def test_counts_are_those_of_numpy(number: int) -> None:
    rng = np.random.default_rng(number)
    numbers = rng.integers(-5, 6, number)
    assert bounds(numbers) == ((numbers.min(), numbers.max()) if number else (0, 0))
