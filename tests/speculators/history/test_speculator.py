"""The history index as a speculator: what it hands to the loop, calls that end or break off, and its saved state."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from atlas_rl.core import Rollouts
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.speculators.history.calls import EOS, Branching, archive, call, commit, decode, draft, one_hot, run_epochs

# -------------------------------------------------------------------------------------------------------- the interface


def test_at_most_the_wanted_number_per_row():
    spec = one_hot()
    archive(spec, [10, 11, 12], [list(range(20, 60))])
    sequences = call([[10, 11, 12]] * 4)
    spec.start(sequences, np.arange(4))
    result = spec.propose(sequences, np.arange(4), np.array([3, 0, 40, 1]))
    assert result.lengths.tolist() == [3, 0, 40, 1]
    assert result.token_ids.shape == result.confidence.shape == (4, 40)
    assert result.token_ids[2].tolist() == list(range(20, 60))
    assert spec.propose(sequences, np.arange(4), np.zeros(4, np.int64)).lengths.tolist() == [0] * 4
    assert spec.propose(sequences, np.arange(0), np.zeros(0, np.int64)).lengths.tolist() == []


def test_rows_follow_the_order_of_requests():
    spec = one_hot()
    prompts = [[10, 11, 12], [40, 41, 42], [70, 71, 72]]
    for prompt in prompts:
        archive(spec, prompt, [[prompt[0] + 5, prompt[0] + 6, EOS]])
    sequences = call(prompts)
    spec.start(sequences, np.array([2, 0]))
    spec.start(sequences, np.array([1]))  # joins the batch later
    result = spec.propose(sequences, np.array([1, 2, 0]), np.array([1, 1, 1]))
    assert result.token_ids[:, 0].tolist() == [45, 75, 15]


def test_proposing_twice_changes_nothing():
    spec, _ = run_epochs([Branching(2)], 2)
    sequences = call([Branching(2).prompt] * 3, seed=4)
    spec.start(sequences, np.arange(3))
    first, second = (spec.propose(sequences, np.arange(3), np.array([8, 5, 2])) for _ in range(2))
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    assert (sequences.token_ids[:, len(Branching(2).prompt) :] == 77_777).all()  # speculators read, never write


def test_being_asked_changes_nothing_that_is_found_or_learned_later():
    """A draft's search is used again when the cursors move on, unless the history has grown since."""
    asked, silent, rng = one_hot(), one_hot(), np.random.default_rng(0)
    for spec in (asked, silent):
        archive(spec, [9, 8], [np.random.default_rng(7).integers(5, 8, 60).tolist()])
    late = np.random.default_rng(8).integers(5, 8, 60).tolist()
    calls = [call([[9, 8], [9, 8], [7, 6], late], seed=3) for _ in range(2)]
    both = list(zip((asked, silent), calls, strict=True))
    for spec, sequences in both:
        spec.start(sequences, np.arange(3))
        commit(spec, sequences, {2: late[::-1]}, finished=True)
    for step in range(40):
        rows = {request: rng.integers(5, 8, rng.integers(1, 4)).tolist() for request in range(2) if rng.random() < 0.7}
        asked.propose(calls[0], np.arange(2), rng.integers(0, 5, 2))
        if step == 20:
            for spec, sequences in both:
                spec.start(sequences, np.array([3]))
        if step % 10 == 4:  # archives in the middle of a call
            np.testing.assert_equal(asked.state_dict(), silent.state_dict())
        if rows:
            for spec, sequences in both:
                commit(spec, sequences, rows)
    np.testing.assert_equal(asked.state_dict(), silent.state_dict())
    drafts = [spec.propose(sequences, np.array([0, 1, 3]), np.full(3, 6)) for spec, sequences in both]
    assert drafts[0].lengths.any()
    for name in ("token_ids", "lengths", "confidence"):
        np.testing.assert_array_equal(getattr(drafts[0], name), getattr(drafts[1], name))


@pytest.mark.parametrize("prompt", [[5], [5, 6]])
def test_prompts_shorter_than_a_context(prompt):
    spec = one_hot()
    for _ in range(2):
        sequences = call([prompt])
        spec.start(sequences, np.array([0]))
        assert len(draft(spec, sequences, 0, 4)) <= 4
        commit(spec, sequences, {0: [7, 8, 9, EOS]}, finished=True)
        spec.refresh(Rollouts(sequences), 1)


def test_a_sibling_that_fills_its_row_does_not_run_into_the_next():
    spec = one_hot()
    prompt = [10, 11, 12]
    sequences = call([prompt] * 3, capacity=7)
    spec.start(sequences, np.arange(3))
    commit(spec, sequences, {0: [20, 21, 22, 23]}, finished=True)
    assert draft(spec, sequences, 2, 4) == [20, 21, 22, 23]
    assert draft(spec, sequences, 1, 8)[:4] == [20, 21, 22, 23]


def test_sequences_that_were_not_started_are_refused():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    with pytest.raises(RuntimeError, match="not started"):
        draft(spec, sequences, 0, 1)


def test_a_request_that_moves_into_another_call_is_followed_from_where_it_stands():
    """As on a server whose rows are used up: what it has generated is found at once, and not learned a second time."""
    spec, prompt, text = one_hot(), [2, 3], [5, 6, 7, 8, 9, 10, 5, 6, 7, 8]
    sequences = call([prompt])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: text})
    learned = spec.state_dict()["model"]
    moved = call([prompt])
    moved.token_ids[0, : len(prompt + text)] = prompt + text
    moved.lengths[0] = len(prompt + text)
    spec.start(moved, np.array([0]))
    assert spec.propose(moved, np.array([0]), np.array([1])).token_ids.tolist() == [[9]]
    commit(spec, moved, {0: []})
    for name, values in spec.state_dict()["model"].items():
        assert np.array_equal(values, learned[name]), name


def test_an_abandoned_call_leaves_no_trace_but_its_finished_requests():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 3)
    spec.start(sequences, np.arange(3))
    commit(spec, sequences, {0: [20, 21, 22, EOS]}, finished=True)
    commit(spec, sequences, {1: [30, 31, 32, 33]})
    sequences.token_ids[2, 3:9] = 31  # half appended, never observed
    sequences.lengths[2] = 9
    after = call([[10, 11, 12], [30, 31, 32, 33]])
    spec.start(after, np.arange(2))
    assert draft(spec, after, 0, 8) == [20, 21, 22, EOS]
    assert draft(spec, after, 1, 8) == []
    assert spec.num_archived_tokens == 3 + 4 + 1  # prompt, completion, separator


def test_a_call_is_archived_once():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, EOS]}, finished=True)
    spec.state_dict()
    stored = spec.num_archived_tokens
    for version in (1, 2):
        spec.refresh(Rollouts(sequences), version)
    assert stored == spec.num_archived_tokens == 7
    assert spec.policy_version == 2


def test_rollouts_made_elsewhere_are_adopted():
    spec = one_hot()
    foreign = call([[10, 11, 12, 20, 21, 22, EOS]])
    foreign.prompt_lengths[:] = 3
    foreign.prompt_keys[:] = hash((10, 11, 12))
    spec.refresh(Rollouts(foreign), 5)
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    assert draft(spec, sequences, 0, 8) == [20, 21, 22, EOS]


def test_rollouts_of_other_ranks_are_archived_beside_ones_own():
    spec = one_hot()
    own, elsewhere = call([[10, 11, 12]]), call([[30, 31, 32, 40, 41, EOS]])
    elsewhere.prompt_lengths[:] = 3
    elsewhere.prompt_keys[:] = hash((30, 31, 32))
    spec.start(own, np.array([0]))
    commit(spec, own, {0: [20, 21, EOS]}, finished=True)
    spec.refresh(Rollouts(own, elsewhere=(elsewhere.trimmed(),)), 1)
    sequences = call([[10, 11, 12], [30, 31, 32]])
    spec.start(sequences, np.arange(2))
    assert draft(spec, sequences, 0, 8) == [20, 21, EOS]
    assert draft(spec, sequences, 1, 8) == [40, 41, EOS]
    assert spec.num_archived_tokens == 2 * (3 + 3 + 1)


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("max_tokens", [600, 100_000])  # a ring that has wrapped, and one that has not
def test_a_restored_speculator_drafts_identically(max_tokens):
    source = Branching(11)
    spec = HistorySpeculator(max_tokens=max_tokens)
    for epoch in range(3):
        sequences = call([source.prompt] * 6, seed=epoch)
        decode(spec, sequences, [source.complete(key) for key in sequences.noise_keys])
    restored = HistorySpeculator(max_tokens=max_tokens)
    restored.load_state_dict(spec.state_dict())
    assert restored.num_archived_tokens == spec.num_archived_tokens
    results = []
    for each in (spec, restored):
        sequences = call([source.prompt] * 6, seed=50)
        results.append(decode(each, sequences, [source.complete(key) for key in sequences.noise_keys]))
    assert results[0][0] > 2
    assert results[0] == results[1]


def test_a_state_may_be_taken_while_a_call_runs():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 2)
    spec.start(sequences, np.arange(2))
    commit(spec, sequences, {0: [20, 21, 22, EOS]}, finished=True)
    spec.state_dict()
    assert draft(spec, sequences, 1, 8) == [20, 21, 22, EOS]


@pytest.mark.parametrize("change", [{"kind": "draft_lm"}, {"version": 999}, {"model": {}}])
def test_a_state_of_another_kind_is_refused(change):
    spec = one_hot()
    with pytest.raises(ValueError, match="history index"):
        spec.load_state_dict({**spec.state_dict(), **change})


def test_a_policy_with_fewer_tokens_is_never_offered_one_that_it_lacks(caplog):
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, 300, EOS]}, finished=True)
    state = spec.state_dict()
    spec.bind(SimpleNamespace(vocab_size=301, device=torch.device("cpu")), couples_noise=False)
    assert spec.num_archived_tokens > 0
    with caplog.at_level(logging.WARNING):
        spec.bind(SimpleNamespace(vocab_size=300, device=torch.device("cpu")), couples_noise=False)
    assert "starts from nothing" in caplog.text
    assert spec.num_archived_tokens == 0
    with pytest.raises(ValueError, match="tokens has values"):
        spec.load_state_dict(state)
