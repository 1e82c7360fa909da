"""Drawing for a step of vLLM's, without vLLM: rows that are no distribution, and whose fault they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from atlas_kernels.noise import request_keys
from atlas_rl.vllm.draw import NO_TOKEN, DrawnTokens, draw, scores

VOCAB = 50
NAN, INF = math.nan, math.inf


def logits_of_step() -> torch.Tensor:
    """Request 0 has two drafts, request 1 none, request 2 one: six rows."""
    return 3 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))


def drawn_from(logits: torch.Tensor, greedy: bool = False) -> DrawnTokens:
    drafts = np.array([int(logits_of_step()[0].argmin()), 3, 7])
    arguments: list[Any] = [np.array([2, 0, 1]), request_keys(1, 3), np.array([5, 9, 2]), np.full(3, greedy)]
    return draw(logits, drafts, *arguments, truncated=True)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("row", "request_index"), [(0, 0), (3, 1), (4, 2)])
def test_tokens_of_rows_that_are_no_distribution_are_marked(
    row: int, request_index: int, value: float, greedy: bool
) -> None:
    """The engine refuses the call, a server goes on: neither draws from NaN."""
    logits = logits_of_step()
    logits[row] = value
    drawn = drawn_from(logits, greedy=greedy)
    assert drawn.undefined is not None
    assert np.argwhere(drawn.undefined).tolist() == [[request_index, 0]]
    assert all(np.isfinite(values).all() for values in (drawn.logprobs, drawn.entropies, drawn.max_probs))
    assert drawn_from(logits_of_step(), greedy=greedy).undefined is None


def test_rows_behind_a_miss_are_nobodys_business() -> None:
    """Speculation off never computes them, so they must not end a call."""
    logits = logits_of_step()
    logits[2] = NAN
    drawn, expected = drawn_from(logits), drawn_from(logits_of_step())
    assert drawn.undefined is not None
    assert not drawn.undefined.any()
    assert np.array_equal(drawn.token_ids, expected.token_ids)
    np.testing.assert_allclose(drawn.entropies, expected.entropies, atol=1e-5)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_request_that_excludes_every_token_itself_ends_nobody_elses(greedy: bool) -> None:
    """As allowed tokens that are bad words, too. Plain vLLM goes on with token 0."""
    logits = logits_of_step()
    logits[3] = -INF
    drawn, expected = drawn_from(logits, greedy=greedy), drawn_from(logits_of_step(), greedy=greedy)
    assert drawn.token_ids[1, 0] == 0
    for name in ("token_ids", "logprobs", "entropies", "max_probs"):
        ours, theirs = getattr(drawn, name), getattr(expected, name)
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(np.delete(ours, 1, 0), np.delete(theirs, 1, 0), atol=1e-5)
    _, values, ranks = scores(logits, drawn, drawn.logprobs, 3, as_logits=False)
    assert not values.isnan().any()
    assert (ranks[drawn.token_ids.ravel() != NO_TOKEN] > 0).all()


STEP = np.array([2, 0, 1, 3])  # drafts of each request
FORMS = {
    "drawn": np.zeros(4, bool),
    "greedy": np.ones(4, bool),
    "mixed": np.array([True, False, False, True]),
}


def both_ways(
    logits: torch.Tensor, drafts: np.ndarray, greedy: np.ndarray, seed: int
) -> tuple[DrawnTokens, DrawnTokens]:
    """One step by torch and numba, and by the kernel in Triton's interpreter, ranks counted."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    arguments: list[Any] = [STEP, request_keys(seed, 4), np.array([5, 9, 2, 700]), greedy, True]
    by_torch = draw(logits.float().clone(), drafts, *arguments, implementation="reference")
    on_device = torch.from_numpy(drafts).to(torch.int32)  # as vLLM has them
    return by_torch, draw(logits.clone(), on_device, *arguments, ranked=True, implementation="triton")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_the_same_step(form: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for seed in range(2):
        logits = (3 * torch.randn(10, 300, generator=torch.Generator().manual_seed(seed))).to(dtype)
        arguments: list[Any] = [STEP, request_keys(seed, 4), np.array([5, 9, 2, 700]), FORMS[form], True]
        alone = draw(logits.float().clone(), np.full(6, NO_TOKEN), *arguments, implementation="reference")
        # Half of the drafts are what is drawn after no draft at all; a few are -1, which nothing accepts.
        drafts = np.where(rng.random(6) < 0.5, np.repeat(alone.token_ids[:, 0], STEP), rng.integers(-1, 300, 6))
        expected, found = both_ways(logits, drafts, FORMS[form], seed)
        for name in ("token_ids", "index"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
        for name in ("logprobs", "entropies", "max_probs"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
        for num_logprobs in (0, 3):
            theirs = scores(logits, expected, expected.logprobs, num_logprobs, as_logits=False)
            for ours, its in zip(
                scores(logits, found, found.logprobs, num_logprobs, as_logits=False), theirs, strict=True
            ):
                torch.testing.assert_close(ours, its, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("row", "value"), [(0, NAN), (3, INF), (9, -INF)])
def test_the_kernel_goes_on_where_a_row_is_no_distribution(row: int, value: float, form: str) -> None:
    logits = 3 * torch.randn(10, 300, generator=torch.Generator().manual_seed(1))
    logits[row] = value
    expected, found = both_ways(logits, np.zeros(6, np.int64), FORMS[form], 0)
    assert found.undefined is not None
    assert expected.undefined is not None
    assert np.array_equal(found.undefined, expected.undefined)
    was_drawn = expected.token_ids != NO_TOKEN
    assert expected.undefined.sum() == (row in expected.index[was_drawn])
    assert np.array_equal(found.token_ids, expected.token_ids)
    for name in ("logprobs", "entropies", "max_probs"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert found.ranks is not None
    assert (found.ranks[found.token_ids != NO_TOKEN] >= 1).all()


@pytest.mark.parametrize("least", [-INF, torch.finfo(torch.float32).min])
def test_entropies_of_a_policy_that_masks(least: float) -> None:
    logits = logits_of_step()
    logits[:, 10:] = least
    drawn = drawn_from(logits / 0.5)
    assert np.isfinite(drawn.entropies).all()
    assert (drawn.entropies[drawn.token_ids != NO_TOKEN] < math.log(10) + 1e-4).all()
