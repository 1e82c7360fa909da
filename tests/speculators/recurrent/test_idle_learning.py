"""Learning between two calls, in pieces: it helps, ends by itself, and ends when a call or a refresh begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.speculators.learning_budget import Agreement, SpareLesson
from atlas_rl.speculators.recurrent.rollout_buffer import RolloutBuffer
from tests.drafters import recurrent_drafter
from tests.recurrent import engine_of, policy, rollout


def studied(speculator, pieces=10_000):
    """Pieces of learning that a drafter did, `pieces` at most."""
    for done in range(pieces):
        if not speculator.study():
            return done + 1
    return pieces


def test_a_head_that_learned_in_idle_time_is_accepted_more():
    """Each refresh takes one step; what idle time taught comes on top."""
    lengths = {}
    for idle in (False, True):
        speculator = recurrent_drafter(budget_share=1e-9)
        engine = engine_of(policy(), speculator)
        for seed in range(2):
            rollout(engine, seed)
            assert not idle or 24 < studied(speculator) < 10_000, "it ends by itself"
            engine.policy_updated()
        lengths[idle] = rollout(engine, 9).report.accepted_length
    assert lengths[True] > lengths[False] + 0.3


def test_a_call_in_the_middle_of_it_draws_the_same_tokens():
    """A head that learned in some pieces drafts at once, before any update, and a text does not depend on drafts."""
    speculator = recurrent_drafter()
    engine = engine_of(policy(), speculator)
    wanted = [rollout(engine_of(policy(), recurrent_drafter()), seed).completion_ids for seed in (0, 1)]
    assert rollout(engine, 0).completion_ids == wanted[0]
    assert studied(speculator, pieces=60) == 60
    output = rollout(engine, 1)
    assert output.completion_ids == wanted[1]
    assert output.report.accepted["recurrent"] > 0
    assert speculator._lesson is None, "the next one is about this call"
    assert studied(speculator, pieces=2) == 2


def test_there_is_nothing_to_learn_after_a_refresh_or_before_a_call():
    """The rollouts are then an older policy's."""
    speculator = recurrent_drafter()
    assert not speculator.study(), "without a policy"
    engine = engine_of(policy(), speculator)
    rollout(engine, 0)
    assert speculator.study()
    engine.policy_updated()
    assert not speculator.study()


@pytest.mark.parametrize(
    ("agreements", "steps"),
    [
        ([0.5] * 9, 24),  # three checks, eight steps apart, that find nothing better
        ([0.5, 0.6, 0.6, 0.7, 0.6, 0.5, 0.7], 48),
        (np.linspace(0.1, 0.9, 99), 400),
    ],
)
def test_a_lesson_ends_when_the_agreement_no_longer_rises(agreements, steps):
    left, taken = list(agreements), []
    lesson = SpareLesson(lambda: taken.append(1), lambda: Agreement(np.array([left.pop(0)]), np.array([1])))
    pieces = 1
    while lesson.advance():
        pieces += 1
    assert lesson.num_steps == len(taken) == steps
    assert pieces == steps + len(agreements) - len(left), "a piece is a step or a check"
    assert not lesson.advance()
    assert len(taken) == steps


def test_held_out_rollouts_are_whole_ones_that_nothing_is_learned_from():
    buffer, rng, tokens = RolloutBuffer(max_tokens=200), np.random.default_rng(0), np.arange(60)
    for call in range(2):
        states = torch.zeros(60, 2).half()
        buffer.add(tokens // 4, tokens % 4, tokens + 100 * call, states, tokens < 0, call)
    held = buffer.hold_out(50, 2, rng)
    assert set(held.token_ids[:, 0]) == {152, 153, 154, 156, 157, 158}, "an eighth of the newest call's 15 rollouts"
    drawn = set(buffer.sample(5000, 2, version=1, rng=rng).token_ids[:, 0])
    assert drawn == {token for token in (*range(60), *range(100, 152)) if token % 4 < 3}
    buffer.release()
    assert 152 in buffer.sample(5000, 2, version=1, rng=rng).token_ids[:, 0]


def test_a_single_rollout_is_not_held_out():
    buffer, n = RolloutBuffer(max_tokens=100), np.arange(4)
    buffer.add(0 * n, n, n, torch.zeros(4, 2).half(), n < 0, 0)
    assert buffer.hold_out(50, 2, np.random.default_rng(0)) is None
