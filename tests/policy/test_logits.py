"""Logits that are no distribution, and masked ones: what sampling refuses, and how two forwards are compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from atlas_rl.policy.logits import NonFiniteLogits, require_distributions, rows_that_differ

LEAST = torch.finfo(torch.float32).min
INF = math.inf


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("row", "says"),
    [([0.0, math.nan, 1.0], "NaN"), ([0.0, INF, -INF], r"\+inf"), ([-INF, -INF, -INF], "-inf for every token")],
)
def test_what_is_no_distribution_is_named_with_its_causes(row: list[float], says: str) -> None:
    logits = rows([1.0, -INF, 0.0], row, [0.0, 1.0, 2.0])
    max_probs = logits.softmax(dim=-1).amax(dim=-1).numpy()
    with pytest.raises(NonFiniteLogits, match=rf"policy's logits.*{says} at 1 of 3 positions.*Likely causes: "):
        require_distributions(max_probs, logits)
    with pytest.raises(ValueError, match=rf"{says} at 1 of 1 positions"):
        require_distributions(max_probs[1:2], logits, np.array([1]))
    require_distributions(max_probs[::2], logits, np.array([0, 2]))


@pytest.mark.parametrize("row", [[0.0, -INF, -INF], [LEAST, LEAST, LEAST], [3e38, LEAST, 0.0], [-INF, LEAST, -INF]])
def test_masked_tokens_and_wide_rows_are_distributions(row: list[float]) -> None:
    logits = rows(row)
    require_distributions(logits.softmax(dim=-1).amax(dim=-1).numpy(), logits)


@pytest.mark.parametrize("masked", [-INF, LEAST, -65504.0, -1e4])
@pytest.mark.parametrize("expected", [-INF, LEAST])
def test_masked_tokens_are_equal_and_do_not_count_in_the_spread(masked: float, expected: float) -> None:
    ours, theirs = rows([1.0, 2.5, masked], [0.0, masked, 4.0]), rows([1.0, 2.0, expected], [0.0, expected, 4.0])
    assert rows_that_differ(ours, theirs, 0.1).tolist() == [True, False]  # off by 0.5 of a spread of 1
    assert rows_that_differ(ours, theirs, 0.6).tolist() == [False, False]


def test_rows_without_masked_tokens_are_compared_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, 64, generator=generator)
    error = (ours - theirs).abs().amax(dim=-1) / (theirs.amax(dim=-1) - theirs.amin(dim=-1))
    middle = float(error.median())
    assert rows_that_differ(ours, theirs, middle).tolist() == (error > middle).tolist()


def test_the_rounding_of_a_large_logit_is_no_difference() -> None:
    """All others are so unlikely that they count as masked: there is no spread to compare with."""
    expected = [146.85676, -2.2595, 1.5317]
    for off, differs in ((1.6e-5, False), (0.1, True)):
        assert rows_that_differ(rows([expected[0] + off, *expected[1:]]), rows(expected), 2e-3).tolist() == [differs]


def test_rows_that_are_no_distribution_say_nothing() -> None:
    broken = rows([math.nan, 0.0], [INF, 0.0], [-INF, -INF])
    assert not rows_that_differ(broken, broken, 0.1).any()
    found = rows_that_differ(rows([math.nan, 0.0], [1.0, 2.0]), rows([math.nan, 0.0], [1.0, 3.0]), 0.1)
    assert found.tolist() == [False, True]


@pytest.mark.parametrize("wrong", [[math.nan, 0.0], [INF, 0.0], [-INF, -INF], [-INF, 0.0]])
def test_a_forward_that_alone_is_broken_is_told(wrong: list[float]) -> None:
    assert rows_that_differ(rows(wrong), rows([1.0, 0.0]), 1.0).all()
