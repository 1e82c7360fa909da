"""Learning between two calls, in pieces: it helps, ends by itself, and ends when a call or a refresh begins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from atlas_rl.speculators.learning_budget import Agreement, SpareLesson
from atlas_rl.speculators.recurrent import distill
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


def test_states_of_an_older_policy_are_not_matched_to_new_weights():
    """New weights came while the requests ran, and the trainer aborted these: no token is the new policy's."""
    speculator = recurrent_drafter()
    engine = engine_of(policy(), speculator)
    rollout(engine, 0)
    sequences = speculator.learner.sequences
    engine.policy_updated()
    speculator.start(replace(sequences, policy_version=1), np.arange(len(sequences.lengths)))
    assert speculator.learner._buffer.has_windows
    assert not speculator.study()


def test_what_it_learns_from_is_freed_at_its_end():
    speculator = recurrent_drafter()
    rollout(engine_of(policy(), speculator), 0)
    assert studied(speculator, pieces=5) == 5
    assert speculator._lesson is not None
    speculator.end_study()
    assert speculator._lesson is None
    assert not speculator.study(), "the call is known"


def test_a_head_whose_lesson_found_no_memory_drafts_on(monkeypatch):
    """The head's vocabulary was to be another one."""
    speculator = recurrent_drafter()
    engine = engine_of(policy(), speculator)
    rollout(engine, 0, num_generations=1, max_new_tokens=5)
    engine.policy_updated()
    rollout(engine, 1)
    before = len(speculator.learner.ids)

    def full(*tables):
        raise torch.OutOfMemoryError("the memory is full")

    with monkeypatch.context() as patched:
        patched.setattr(speculator.learner.head, "set_tables", full)
        assert not engine._speculators["recurrent"].study()
    assert len(speculator.learner.ids) == before
    report = rollout(engine, 2).report
    assert report.drafter_faults == {"recurrent": 1}
    assert report.drafted["recurrent"] > 0


@pytest.mark.parametrize(
    ("agreements", "steps", "best"),
    [
        ([0.5] + [0.4] * 9, 24, 0),  # three checks, eight steps apart, that find nothing better
        ([0.5] + [0.5004] + [0.5] * 9, 24, 8),
        ([0.5, 0.6, 0.6, 0.7, 0.6, 0.5, 0.6], 48, 24),
        ([0.5, 0.6, np.nan, np.nan, np.nan], 32, 8),
        (np.linspace(0.1, 0.9, 99), 400, 400),
    ],
)
def test_a_lesson_ends_when_the_agreement_no_longer_rises(agreements, steps, best):
    """With what was learned at its best check."""
    left, learned = list(agreements), [0]
    taken = []

    def step():
        learned[0] += 1
        taken.append(1)

    lesson = lesson_of(step, left, learned)
    pieces = 1
    while lesson.advance():
        pieces += 1
    assert lesson.num_steps == len(taken) == steps
    assert pieces == steps + len(agreements) - len(left), "a piece is a step or a check"
    assert learned == [best]
    assert not lesson.advance()
    assert not lesson.end()
    assert len(taken) == steps


def lesson_of(step, agreements, learned):
    """A lesson that finds these agreements, in turn, and learns a number."""

    def keep():
        kept = list(learned)
        return lambda: learned.__setitem__(0, kept[0])

    return SpareLesson(step, lambda: Agreement(np.array([agreements.pop(0)]), np.array([1])), keep)


@pytest.mark.parametrize(("agreements", "left"), [([0.5, 0.4], 0), ([0.5, 0.6], 13), ([0.5, 0.6, 0.5], 8)])
def test_a_lesson_that_is_broken_off_keeps_what_was_not_found_worse(agreements, left):
    """Most of its steps may come after its latest check."""
    learned = [0]
    lesson = lesson_of(lambda: learned.__setitem__(0, learned[0] + 1), list(agreements), learned)
    while lesson.num_steps < 8 * len(agreements) - 3:
        assert lesson.advance()
    assert lesson.end() == (agreements[-1] < max(agreements))
    assert learned == [left]


def test_a_step_that_fails_is_undone():
    learned = [0]

    def step():
        learned[0] = np.nan
        raise torch.OutOfMemoryError("the memory is full")

    lesson = lesson_of(step, [0.5], learned)
    lesson.advance()
    with pytest.raises(torch.OutOfMemoryError):
        lesson.advance()
    assert lesson.end()
    assert learned == [0]


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_head_goes_back_to_its_best_check(monkeypatch, spoiled):
    """The optimizer's moments stay if they are numbers."""
    speculator = recurrent_drafter()
    engine = engine_of(policy(), speculator)
    rollout(engine, 0)
    head, optimizer = speculator.learner.head, speculator.learner._optimizer
    left, seen = [0.5, 0.6, 0.5, 0.4, 0.3], []

    def agreement(*_):
        seen.append([weight.detach().clone() for weight in head.parameters()])
        return Agreement(np.array([left.pop(0)]), np.array([1]))

    monkeypatch.setattr(distill, "agreement", agreement)
    while speculator.study():
        if spoiled and len(left) == 1:
            optimizer.state[head.bias]["exp_avg"][0] = torch.nan
    assert not left
    assert all(torch.equal(*pair) for pair in zip(head.parameters(), seen[1], strict=True))
    assert not torch.equal(head.bias, seen[0][-1]) or not torch.equal(head.read.weight, seen[0][0])
    assert bool(optimizer.state) != spoiled
    assert rollout(engine, 1).report.drafter_faults == {}


USES = {
    "bind": lambda speculator, _: speculator.bind(speculator._policy, True),
    "saved": lambda speculator, _: speculator.state_dict(),
    "shared": lambda speculator, _: speculator.shared(),
    "another call": lambda speculator, before: speculator.start(replace(before), np.zeros(0, np.int64)),
}


@pytest.mark.parametrize("use", USES)
def test_who_uses_the_head_in_the_middle_of_a_lesson_gets_the_best_one(monkeypatch, use):
    speculator = recurrent_drafter()
    rollout(engine_of(policy(), speculator), 0)
    head, left, seen, sequences = speculator.learner.head, [0.5, 0.6, 0.4, 0.7], [], speculator.learner.sequences

    def agreement(*_):
        seen.append([weight.detach().clone() for weight in head.parameters()])
        return Agreement(np.array([left.pop(0)]), np.array([1]))

    monkeypatch.setattr(distill, "agreement", agreement)
    while len(left) > 1:
        assert speculator.study()
    assert not torch.equal(head.bias, seen[1][-1])
    revision = speculator.learner.revision
    USES[use](speculator, sequences)
    assert speculator._lesson is None
    assert all(torch.equal(*pair) for pair in zip(head.parameters(), seen[1], strict=True))
    assert speculator.learner.revision > revision, "a fold of the head that was worse is not used any more"


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


def test_a_call_that_finds_no_memory_is_not_added():
    buffer, n = RolloutBuffer(max_tokens=6), np.arange(4)
    buffer.add(0 * n, n, n, torch.zeros(4, 2).half(), n < 0, 0)

    class Full:
        device = torch.device("cpu")

        def __getitem__(self, index):
            raise torch.OutOfMemoryError("the memory is full")

    with pytest.raises(torch.OutOfMemoryError):
        buffer.add(0 * n, n, n + 10, Full(), n < 0, 1)
    assert set(buffer.newest(9, 2, np.random.default_rng(0)).token_ids[:, 0]) == {0, 1, 2}
    buffer.add(0 * n, n, n + 20, torch.zeros(4, 2).half(), n < 0, 1)
    assert len(buffer) == 4


def test_a_single_rollout_is_not_held_out():
    buffer, n = RolloutBuffer(max_tokens=100), np.arange(4)
    buffer.add(0 * n, n, n, torch.zeros(4, 2).half(), n < 0, 0)
    assert buffer.hold_out(50, 2, np.random.default_rng(0)) is None
