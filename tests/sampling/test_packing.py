"""Compiled packing against its numpy form."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.core import Draft, Verified
from atlas_rl.sampling.packing import packed_positions, packed_tokens, padded_positions, unpacked


@pytest.mark.parametrize("seed", range(8))
def test_packed_is_what_rows_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, width = int(rng.integers(1, 7)), int(rng.integers(0, 5))
    requests, lengths = rng.permutation(9)[:batch], rng.integers(1, 12, 9)
    texts, keys = rng.integers(0, 50, (9, 12)).astype(np.int32), rng.integers(0, 2**64, 9, np.uint64)
    drafts, counts = rng.integers(0, 50, (batch, width)), rng.integers(0, width + 1, batch)
    rows = np.repeat(np.arange(batch), counts + 1)
    begins = np.append(0, np.cumsum(counts + 1))
    depths = np.arange(len(rows)) - begins[rows]
    padded = np.pad(drafts, ((0, 0), (0, 1)))
    ran = np.where(
        depths == 0, texts[requests[rows], lengths[requests[rows]] - 1], padded[rows, np.maximum(depths - 1, 0)]
    )
    for own, expected in zip(
        packed_tokens(requests, texts, lengths, drafts, counts),
        (ran, begins[:-1], lengths[requests] - 1, counts + 1),
        strict=True,
    ):
        np.testing.assert_array_equal(own, expected)
    decided = np.where(depths < counts[rows], padded[rows, depths], -1)
    positions = lengths[requests[rows]] + depths
    for own, expected in zip(
        packed_positions(requests, lengths, keys, drafts, counts),
        (decided, begins, keys[requests[rows]].view(np.int64), positions, rows, depths),
        strict=True,
    ):
        np.testing.assert_array_equal(own, expected)
    size, keys_of = len(rows) + seed % 4, keys[requests[rows]].view(np.int64)
    fill = size - len(rows)
    starts = np.minimum(np.append(begins, len(rows) + 1 + np.arange(size - batch)), size)
    np.testing.assert_array_equal(
        padded_positions(size, requests, lengths, keys, drafts, counts),
        [*decided, *[-1] * fill, *keys_of, *[0] * fill, *positions, *[-1] * fill, *starts],
    )


def test_results_end_at_the_last_accepted_or_ending_token() -> None:
    tokens, figures = np.array([4, 5, 6, 4, 9, 8, 7]), np.arange(7, dtype=np.float32)
    begins, accepted = np.array([0, 3, 6, 7]), np.array([1, 2, 0])
    told, logprobs, entropies, max_probs, counts, numbers = unpacked(
        begins, accepted, tokens, figures, figures + 10, figures + 20, np.array([9])
    )
    assert told.tolist() == [[4, 5, 0], [4, 9, 0], [7, 0, 0]]
    assert logprobs.tolist() == [[0, 1, 0], [3, 4, 0], [6, 0, 0]]
    assert entropies[1].tolist() == [13, 14, 0]
    assert max_probs[2].tolist() == [26, 0, 0]
    assert counts.tolist() == [True, True, False, True, True, False, True]
    assert numbers


@pytest.mark.parametrize(("place", "counts"), [(1, True), (2, False)])  # the last one lies behind a rejected draft
def test_probabilities_that_are_no_numbers_are_told_where_they_count(place: int, counts: bool) -> None:
    tokens, figures = np.array([4, 5, 6]), np.zeros(3, np.float32)
    figures[place] = np.nan
    told = unpacked(np.array([0, 3]), np.array([1]), tokens, figures, figures, figures, np.zeros(0, np.int64))
    assert told[-1] != counts


def test_outcomes_of_drafts_are_what_committed_tokens_say() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        batch, width, longest = int(rng.integers(1, 7)), int(rng.integers(0, 5)), int(rng.integers(1, 6))
        draft = Draft(
            rng.integers(0, 3, (batch, width)), rng.integers(0, width + 1, batch), np.zeros((batch, width), np.float32)
        )
        tokens, counts = rng.integers(0, 3, (batch + 2, longest)), rng.integers(1, longest + 1, batch + 2)
        nothing = np.zeros(batch + 2, np.int64)
        verified = Verified(np.arange(batch + 2), tokens, counts, nothing, nothing, nothing > 0)
        rows = rng.permutation(batch + 2)[:batch]
        both = min(width, longest)
        reach = np.minimum(draft.lengths, counts[rows])
        equal = (draft.token_ids[:, :both] == tokens[rows, :both]) & (np.arange(both) < reach[:, None])
        right = np.cumprod(equal, axis=1).sum(axis=1)
        known, own = verified.outcome_of(draft, rows)
        assert np.array_equal(own, right)
        assert np.array_equal(known, np.minimum(right + 1, reach))
