"""The history index finds what to draft: in the request itself, its siblings, earlier calls and other prompts."""

from __future__ import annotations

import numpy as np
import pytest

from tests.histories import EOS, archive, call, commit, draft, one_hot, speculator


def test_continues_a_repetition_of_the_request_itself():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, 22, 23, 24, 25, 30, 20, 21, 22]})
    assert draft(spec, sequences, 0, 3) == [23, 24, 25]


def test_a_periodic_text_is_drafted_beyond_what_has_been_written():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [5, 6, 7, 5, 6, 7, 5, 6]})
    assert draft(spec, sequences, 0, 8) == [7, 5, 6, 7, 5, 6, 7, 5]


def test_copies_from_its_own_prompt():
    prompt = [40, 41, 42, 43, 44, 45, 46, 47]
    spec = one_hot()
    sequences = call([prompt, prompt])  # the second request's prompt is indexed through the first
    spec.start(sequences, np.array([0, 1]))
    commit(spec, sequences, {1: [90, 41, 42, 43]})
    assert draft(spec, sequences, 1, 4) == [44, 45, 46, 47]


def test_a_running_sibling_teaches_within_the_call():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 2)
    spec.start(sequences, np.array([0, 1]))
    assert draft(spec, sequences, 1, 4) == []
    commit(spec, sequences, {0: [20, 21, 22, 23]})
    assert draft(spec, sequences, 1, 4) == [20, 21, 22, 23]


def test_a_finished_sibling_teaches_within_the_call():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 2)
    spec.start(sequences, np.array([0, 1]))
    commit(spec, sequences, {0: [20, 21, 22, EOS]}, finished=True)
    assert draft(spec, sequences, 1, 8) == [20, 21, 22, EOS]


def test_recalls_an_earlier_call():
    spec = one_hot()
    archive(spec, [10, 11, 12], [[20, 21, 22, 23, EOS]])
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    assert draft(spec, sequences, 0, 8) == [20, 21, 22, 23, EOS]


def test_learns_from_other_prompts_by_longer_contexts():
    spec = one_hot()
    archive(spec, [10, 11, 12], [[20, 21, 22, 23, 24, 25, EOS]])
    sequences = call([[50, 51, 52]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, 22, 23]})
    assert draft(spec, sequences, 0, 2) == [24, 25]


@pytest.mark.parametrize("coupled", [True, False])
def test_prefers_the_longest_match(coupled):
    spec = speculator(coupled=coupled)
    long, short = [30, 31, 32, 33, 34, 35, 36, 37, 100, EOS], [90, 36, 37, 200, EOS]
    archive(spec, [10, 11, 12], [long, short, short])
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: long[:8]})
    assert draft(spec, sequences, 0, 1) == [100]


def test_no_match_runs_across_two_rollouts():
    spec = one_hot()
    archive(spec, [10, 11, 12, 13], [[20, 21, 22, 23]])
    archive(spec, [60, 61, 62, 63], [[70, 71]])
    sequences = call([[20, 21, 22, 23]])  # an archived rollout ends so; what lies behind it is another's
    spec.start(sequences, np.array([0]))
    assert draft(spec, sequences, 0, 4) == []


def test_a_draft_ends_with_the_token_that_ends_the_request():
    prompt = [30, 31, EOS, 32, 33, 34]
    spec = one_hot()
    sequences = call([prompt])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [30, 31]})
    assert draft(spec, sequences, 0, 6) == [EOS]


def test_searching_ahead_changes_no_cursor():
    """`learn` searches where requests without a draft end; without it, the next tokens make the index search there."""
    rng = np.random.default_rng(4)
    texts = [[10, 11, 12], [10, 11, 12], [13, 10, 11]]
    ahead, behind = one_hot(), one_hot()
    for spec in (ahead, behind):
        archive(spec, texts[0], [rng.permutation(np.tile([10, 11, 12, 13], 8)).tolist() for _ in range(2)])
    behind.load_state_dict(ahead.state_dict())  # the same archive
    calls = [call(texts) for _ in range(2)]
    for spec, sequences in zip((ahead, behind), calls, strict=True):
        spec.start(sequences, np.arange(3))
    for step in range(30):
        asked = int(rng.integers(3))
        for spec, sequences in zip((ahead, behind), calls, strict=True):
            if step % 2:
                draft(spec, sequences, asked, 3)
        rows = {int(request): rng.integers(10, 14, rng.integers(1, 4)).tolist() for request in rng.permutation(3)[:2]}
        for spec, sequences in zip((ahead, behind), calls, strict=True):
            commit(spec, sequences, rows)
        ahead.learn()
        assert ahead._counts.tolist() == behind._counts.tolist()
        for request, count in enumerate(ahead._counts):
            assert np.array_equal(ahead._cursors[request, :count], behind._cursors[request, :count])
    assert ahead._counts.max() > 3
