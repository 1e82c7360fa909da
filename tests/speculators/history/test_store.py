"""The archive of the history index stays within its bounds, and a ring that wraps gives no wrong link."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.core import Rollouts
from atlas_rl.speculators.history.match import NEXT
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.history.store import MAX_MATCH, Archive
from tests.speculators.history.calls import EOS, archive, call, decode, one_hot


def rollout(rng, length=50):
    return rng.integers(10, 30_000, length).astype(np.int32)


def test_the_ring_forgets_the_oldest_and_keeps_the_newest():
    rng = np.random.default_rng(0)
    spec = one_hot(max_tokens=1_000)
    prompts = [rollout(rng, 6).tolist() for _ in range(60)]
    completions = [[*rollout(rng, 40).tolist(), EOS] for _ in range(60)]
    for prompt, completion in zip(prompts, completions, strict=True):
        archive(spec, prompt, [completion])
    assert spec.num_archived_tokens == 1_000
    sequences = call(prompts)
    spec.start(sequences, np.arange(60))
    known = spec.propose(sequences, np.arange(60), np.full(60, 41)).lengths == 41
    fits = 1_000 // (6 + 41 + 1)
    assert known[-fits:].all()
    assert not known[: -fits - 1].any()


def test_a_ring_that_wraps_never_links_out_of_order_or_out_of_bounds():
    rng = np.random.default_rng(1)
    ring = Archive(300)
    for i in range(200):
        # Few different tokens: chains are long, and heads and links to overwritten nodes abound.
        tokens = rng.integers(0, 3, rng.integers(1, 90)).astype(np.int32)
        ring.append(tokens, min(4, len(tokens)), i % 3, index_prompt=bool(i % 2), policy_version=i)
        nodes, heads, (write, stored) = ring.view.nodes, ring.view.heads, ring.view.cursor.tolist()
        assert 0 <= write < 300
        assert stored <= 300
        assert nodes[:, 1:3].min() >= 0
        assert max(nodes[:, 1:3].max(), heads.max()) <= 300
    tokens, infos = ring.oldest_first()
    assert tokens[-1] == -1
    assert infos[-1] == 199
    assert infos[tokens == -1].min() > 150, "the oldest rollout that is kept"


def test_decoding_against_a_wrapping_ring_of_few_tokens():
    """Every kind of stale link is met; drafts must stay tokens that were really written."""
    rng = np.random.default_rng(2)
    spec = HistorySpeculator(max_tokens=200)
    for seed in range(12):
        completions = [[*rng.integers(10, 14, 60).tolist(), EOS] for _ in range(3)]
        sequences = call([[10, 11]] * 3, seed=seed)
        decode(spec, sequences, completions)
        ids = spec._cursors[0, : spec._counts[0], NEXT]
        assert np.isin(ids, [10, 11, 12, 13, EOS]).all()
        spec.refresh(Rollouts(sequences), seed)
    assert spec.num_archived_tokens == 200


def test_a_rollout_longer_than_the_ring_keeps_its_end():
    ring = Archive(2 * MAX_MATCH)
    ring.append(np.arange(500, dtype=np.int32), 3, 1, index_prompt=True, policy_version=0)
    assert ring.oldest_first()[0].tolist() == [*range(500 - 2 * MAX_MATCH + 1, 500), -1]


@pytest.mark.parametrize("num_tokens", [10_000, 1_000_000])
def test_bytes_per_token_stay_under_the_bar(num_tokens):
    rng = np.random.default_rng(0)
    ring = Archive(4_000_000)
    worst = 0.0
    while len(ring) < num_tokens:
        ring.append(rollout(rng, 400), 40, 1, index_prompt=True, policy_version=0)
        if len(ring) > 9_000:
            worst = max(worst, ring.nbytes / len(ring))
    assert worst <= 40


def test_a_bound_too_small_is_refused():
    with pytest.raises(ValueError, match="max_tokens"):
        HistorySpeculator(max_tokens=10)
