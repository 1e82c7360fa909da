"""The recurrent drafter on a server, which may be told of new weights at any moment: between requests, or amid them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.core import Hidden, Rollouts, SamplingParams, Verified
from atlas_rl.policy.view import InProcessView
from atlas_rl.rollout.requests import build_sequences
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram

NUM, PROMPT, NEW = 2, 4, 8
ALL = np.arange(NUM)


@pytest.fixture(scope="module")
def model():
    return tiny_bigram()


def bound(model):
    speculator = recurrent_drafter()
    speculator.bind(InProcessView(model), True)
    return speculator


def epoch(version=0):
    prompts = np.arange(NUM * PROMPT).reshape(NUM, PROMPT)
    return build_sequences(prompts.tolist(), 1, SamplingParams(max_new_tokens=NEW), 64, None, version)[0]


def decode(model, speculator, sequences, steps, *, finished=False):
    """Every request gets a token per step, which the drafter sees; in the last step requests may end."""
    one, none = np.ones(NUM, np.int64), np.zeros(NUM, np.int64)
    for step in range(steps):
        tokens = np.stack([(7 * sequences.lengths[r] + r) % 64 for r in ALL])[:, None]
        sequences.token_ids[ALL, sequences.lengths] = tokens[:, 0]
        sequences.lengths += 1
        hidden = Hidden(ALL, torch.randn(NUM, model.config.hidden_size), {})
        ends = np.full(NUM, finished and step == steps - 1)
        speculator.observe(sequences, Verified(ALL, tokens, one, none, none, ends, hidden))


def drafted(speculator, sequences):
    assert speculator.backlog(sequences, ALL) == 0
    return speculator.propose(sequences, ALL, np.full(NUM, 3))


STEPS_BEFORE = [0, 1, 3]


@pytest.mark.parametrize("steps", STEPS_BEFORE)
def test_a_refresh_may_come_before_any_request_has_ended(model, steps):
    speculator, sequences = bound(model), epoch()
    speculator.start(sequences, ALL)
    decode(model, speculator, sequences, steps)
    assert speculator.refresh(Rollouts(sequences, 1.0), 1) is None  # it knows no token's embedding yet
    moved = epoch(1)  # requests that run move into the next epoch
    speculator.start(moved, ALL)
    assert speculator.backlog(moved, ALL) is None
    assert speculator.propose(moved, ALL, np.full(NUM, 3)).lengths.tolist() == [0] * NUM


def test_a_refresh_may_come_before_the_first_request(model):
    speculator = bound(model)
    assert speculator.refresh(Rollouts(epoch(), 1.0), 1) is None
    sequences = epoch(1)
    speculator.start(sequences, ALL)
    assert speculator.backlog(sequences, ALL) is None


def test_what_was_seen_of_them_is_learned_at_the_next_refresh(model):
    """Their embeddings are read when the next call begins, when weights are whole."""
    speculator, sequences = bound(model), epoch()
    speculator.start(sequences, ALL)
    decode(model, speculator, sequences, 3)
    seen = np.unique(sequences.token_ids[:, PROMPT : PROMPT + 3])
    speculator.refresh(Rollouts(sequences, 1.0), 1)
    moved = epoch(1)
    speculator.start(moved, ALL)
    assert speculator.refresh(Rollouts(moved, 1.0), 2) is not None
    assert speculator.learner.ids.tolist() == seen.tolist()
    last = epoch(2)
    speculator.start(last, ALL)
    draft = drafted(speculator, last)
    assert set(draft.token_ids[np.arange(3)[None] < draft.lengths[:, None]]) <= set(seen.tolist())
    assert draft.lengths.tolist() == [3] * NUM


def test_what_is_learned_of_a_request_has_the_version_that_drew_each_token(model):
    speculator, sequences = bound(model), epoch()
    for version, steps in ((0, 3), (1, 2), (2, 1)):
        lengths, tokens = sequences.lengths.copy(), sequences.token_ids.copy()
        sequences = epoch(version)  # the same requests, which run on
        sequences.token_ids[:], sequences.lengths[:] = tokens, lengths
        speculator.start(sequences, ALL)
        decode(model, speculator, sequences, steps)
        speculator.refresh(Rollouts(sequences, 1.0), version + 1)
    assert speculator.learner._buffer._versions.tolist() == [0] * 3 * NUM + [1] * 2 * NUM + [2] * NUM


def test_one_that_has_learned_keeps_its_vocabulary_while_requests_run(model):
    speculator, sequences = bound(model), epoch()
    speculator.start(sequences, ALL)
    decode(model, speculator, sequences, NEW, finished=True)
    assert speculator.refresh(Rollouts(sequences, 1.0), 1) is not None
    known = speculator.learner.ids.tolist()
    for version in (1, 2, 3):
        sequences = epoch(version)
        speculator.start(sequences, ALL)
        decode(model, speculator, sequences, 2)
        assert speculator.refresh(Rollouts(sequences, 1.0), version + 1) is not None
        assert set(known) <= set(speculator.learner.ids.tolist())
    sequences = epoch(4)
    speculator.start(sequences, ALL)
    assert drafted(speculator, sequences).lengths.tolist() == [3] * NUM
