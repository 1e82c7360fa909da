"""The compiled commit against the same in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.decode.settling import Drawn, Fates, Texts, reached, settle
from tests.settling import settle_in_numpy


def _case(seed: int, *, says: bool, wants: bool) -> tuple[Drawn, Texts]:
    rng = np.random.default_rng(seed)
    num_requests, batch, width = 12, int(rng.integers(0, 10)), int(rng.integers(1, 6))
    prompts = rng.integers(1, 5, num_requests)
    lengths = prompts + rng.integers(0, 4, num_requests)
    token_ids = rng.integers(0, 9, (num_requests, 20)).astype(np.int32)
    max_lengths = lengths + rng.integers(1, 7, num_requests)  # some rows reach their limit, some do not
    num_tokens = rng.integers(1, width + 1, batch)
    figures = rng.random((3, batch, width + 1), np.float32)
    tokens = rng.integers(0, 9, (batch, width))
    drawn = Drawn(
        rng.permutation(num_requests)[:batch],
        tokens,
        num_tokens,
        num_tokens - 1 + rng.integers(0, 3, batch),
        figures[0],
        figures[1],
        figures[2] if wants else np.zeros((0, 0), np.float32),
        rng.random((batch, width)) < 0.2 if says else np.zeros((0, 0), np.bool_),
        np.array([3, 7], np.int64),
    )
    logprobs = np.zeros((num_requests, 20 if wants else 0), np.float32)
    return drawn, Texts(token_ids, lengths, max_lengths, prompts, logprobs)


@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("wants", [False, True])
def test_the_compiled_commit_is_the_plain_one(says: bool, wants: bool) -> None:
    for seed in range(40):
        drawn, texts = _case(seed, says=says, wants=wants)
        copies = Texts(*(array.copy() for array in texts))
        batch = len(drawn.requests)
        fates, expected = Fates.of(batch), Fates.of(batch)
        ends = np.minimum(texts.lengths[drawn.requests] + drawn.num_tokens, texts.max_lengths[drawn.requests])
        longest = ends.max(initial=0), (ends - texts.prompt_lengths[drawn.requests]).max(initial=0)
        assert longest == reached(drawn.requests, drawn.num_tokens, *texts[1:4])
        sums = settle(*drawn, *texts, *fates)
        assert sums == pytest.approx(settle_in_numpy(drawn, copies, expected))
        for name, own in (*texts._asdict().items(), *fates._asdict().items()):
            other = getattr(copies, name, None) if name in Texts._fields else getattr(expected, name)
            assert np.array_equal(own, other), name


def test_a_draft_behind_an_ending_token_counts_neither_way() -> None:
    tokens = np.array([[1, 3, 5, 6]])
    figures = np.zeros((1, 4), np.float32)
    none, four = np.zeros((0, 0), np.float32), np.array([4])
    drawn = Drawn(
        np.array([0]), tokens, four, four, figures, figures, none, np.zeros((0, 0), np.bool_), np.array([3], np.int64)
    )
    texts = Texts(np.zeros((1, 9), np.int32), np.array([2]), np.array([9]), np.array([2]), none)
    fates = Fates.of(1)
    settle(*drawn, *texts, *fates)
    assert [int(fate[0]) for fate in fates] == [2, 2, 2, 1]
    assert texts.token_ids[0, :5].tolist() == [0, 0, 1, 3, 0]
