"""Compiled rows of drafts against their numpy forms."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.speculators.drawn_rows import (
    CONFIDENCE,
    committed_places,
    cut,
    newest_indices,
    newest_places,
    positions_alike,
)


@pytest.mark.parametrize("seed", range(4))
def test_positions_of_a_draft_are_laid_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys, lengths, requests = rng.integers(0, 2**64, 5, np.uint64), rng.integers(1, 30, 9), rng.permutation(9)[:5]
    depth = int(rng.integers(1, 6))
    expected = [np.arange(5), keys.view(np.int64), *(lengths[requests] + np.arange(depth)[:, None])]
    assert np.array_equal(positions_alike(keys, lengths, requests, depth), np.concatenate(expected))


@pytest.mark.parametrize("stops", [(), (3,), (3, 5)])
@pytest.mark.parametrize("excludes", [False, True])
def test_rows_end_behind_their_first_ending_token(stops: tuple[int, ...], excludes: bool) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch, depth = int(rng.integers(1, 8)), int(rng.integers(1, 7))
        drawn, sure = rng.integers(0, 9, (batch, depth)), rng.random((batch, depth), np.float32)
        most = rng.integers(0, depth + 2, batch)
        unrunnable = rng.random(9) < 0.2 if excludes else np.zeros(0, np.bool_)
        last = np.isin(drawn, stops) | (unrunnable[drawn] if excludes else False)
        lengths = np.where(last.any(axis=1), last.argmax(axis=1) + 1, depth)
        tokens, confidence, own, finite = cut(drawn.copy(), sure.copy(), most, np.array(stops, np.int64), unrunnable)
        assert finite
        assert np.array_equal(tokens, drawn)
        assert np.array_equal(confidence, sure.clip(*CONFIDENCE))
        assert np.array_equal(own, np.minimum(lengths, most))


def test_a_probability_that_is_no_number_is_told() -> None:
    drawn, most, no_stops = np.zeros((2, 2), np.int64), np.full(2, 2), np.zeros(0, np.int64)
    sure = np.array([[0.5, 0.5], [0.5, np.nan]], np.float32)
    assert not cut(drawn, sure, most, no_stops, np.zeros(0, np.bool_))[3]


def test_places_of_states() -> None:
    rng = np.random.default_rng(0)
    texts, lengths = rng.integers(0, 20, (9, 12)).astype(np.int32), rng.integers(4, 13, 9)
    requests, counts = rng.permutation(9)[:5], rng.integers(1, 4, 5)
    starts = np.cumsum(counts + 2) - (counts + 2)
    index_of = rng.permutation(20)
    newest = index_of[texts[requests, lengths[requests] - 1]]
    assert np.array_equal(newest_indices(requests, lengths, texts, index_of), newest)
    places, begins = newest_places(starts, counts, requests, lengths)
    assert np.array_equal(places, [starts + counts - 1, requests])
    assert np.array_equal(begins, lengths[requests] - counts)
    row, offset = np.nonzero(np.arange(3)[None] < counts[:, None])
    for own, expected in zip(committed_places(starts, counts), (row, offset, starts[row] + offset), strict=True):
        assert np.array_equal(own, expected)
