"""The recurrent drafter: it learns from the rollouts, follows the policy, and never touches it."""

from __future__ import annotations

import copy
import itertools
import logging
from functools import cache

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import Hidden, Verified
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.recurrent.head import FoldedHead, RecurrentHead
from atlas_rl.speculators.recurrent.rollout_buffer import RolloutBuffer
from atlas_rl.speculators.reduced_vocab import TokenCounts, TokenRows
from atlas_rl.sync.checkpoint import load_state, save_state
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram, tiny_gemma2, tiny_llama
from tests.recurrent import engine_of, policy, rollout, trained


def can_draft(speculator):
    return speculator.backlog(None, np.arange(1)) is not None


@cache
def learned():
    """The state of an engine whose drafter has learned from three calls of `policy()`."""
    return trained(policy(), recurrent_drafter()).state_dict()


def experienced(speculator=None, **options):
    """A new engine that goes on from `learned`."""
    engine = engine_of(policy(), speculator or recurrent_drafter(), **options)
    engine.load_state_dict(copy.deepcopy(learned()))
    return engine


def test_nothing_is_drafted_before_the_first_refresh():
    speculator = recurrent_drafter()
    engine = engine_of(policy(), speculator)
    report = rollout(engine, seed=0).report
    assert report.drafted == {"recurrent": 0}
    assert not report.warnings
    assert not can_draft(speculator)


def test_refreshes_raise_acceptance_on_rollouts_not_seen():
    """Acceptance of a draft's first token rises by 0.35 from the first refresh to the fifth.

    Over eight seeds that figure spread by 0.03. A drafter that learns nothing after its first refresh would show 0 with a
    spread of 0.035, since a call verifies 300 to 500 such tokens. The bar of 0.15 lies more than four spreads from either:
    this test errs, in either direction, with a probability below 1e-4.
    """
    speculator = recurrent_drafter()
    engine = trained(policy(), speculator, updates=1)
    rates = []
    for seed in range(1, 6):
        output = rollout(engine, seed)
        rates.append(output.report.acceptance_by_position[0])
        engine.policy_updated()
    assert rates[-1] > rates[0] + 0.15
    tokens = np.concatenate(output.completion_ids)
    assert rates[-1] > 3 * np.bincount(tokens).max() / len(tokens)  # more than knowing the commonest token would give
    first = speculator.refreshes[0]
    assert first.agreement_after > first.agreement_before + 0.1


@pytest.mark.parametrize("loss", ["kl", "tv"])
def test_both_losses_raise_the_agreement(loss):
    speculator = recurrent_drafter(loss=loss)
    trained(policy(), speculator, updates=2)
    assert speculator.refreshes[-1].agreement_after > speculator.refreshes[0].agreement_before + 0.1


@pytest.mark.slow
def test_it_follows_a_policy_that_jumps():
    speculator = recurrent_drafter()
    model = tiny_bigram()
    engine = trained(model, speculator)
    before = rollout(engine, 50).report.acceptance_rate
    model.load_state_dict(tiny_bigram(seed=12).state_dict())
    engine.policy_updated()
    jumped = rollout(engine, 51).report.acceptance_rate
    for seed in range(4):
        engine.policy_updated()
        recovered = rollout(engine, 60 + seed).report.acceptance_rate
    assert jumped < 0.7 * before
    assert recovered > jumped + 0.5 * (before - jumped)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"repetition_penalty": 1.3}])
def test_tokens_do_not_depend_on_it(verification, options):
    drafted = rollout(experienced(verification=verification), seed=99, **options)
    assert drafted.report.drafted["recurrent"] > 0
    if verification == "invariant":
        plain = AtlasRolloutEngine(model=policy(), speculation=False, console=False)
        assert rollout(plain, seed=99, **options).completion_ids == drafted.completion_ids


def test_greedy_drafts_are_verified_too():
    plain = AtlasRolloutEngine(model=policy(), speculation=False, console=False)
    drafted = rollout(experienced(), seed=1, temperature=0.0)
    assert drafted.completion_ids == rollout(plain, seed=1, temperature=0.0).completion_ids
    assert drafted.report.acceptance_rate > 0.3


@pytest.mark.slow
def test_coupled_draws_beat_argmax_and_independent_draws():
    rates = {}
    for name, options, verification in (
        ("coupled", {}, "invariant"),
        ("argmax", {"argmax": True}, "invariant"),
        ("independent", {}, "rejection"),
    ):
        engine = trained(tiny_bigram(logit_std=2.0), recurrent_drafter(**options), verification=verification)
        rates[name] = np.mean([rollout(engine, seed=70 + n).report.acceptance_by_position[0] for n in range(3)])
    assert rates["coupled"] > rates["argmax"] + 0.02
    assert rates["independent"] > rates["argmax"]


def test_the_policy_and_the_random_state_are_left_alone():
    model = tiny_bigram().train()
    speculator = recurrent_drafter()
    engine = engine_of(model, speculator)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rollout(engine, seed=0)
    before = torch.random.get_rng_state()
    engine.policy_updated()
    assert can_draft(speculator)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_learns_inside_no_grad_and_inference_mode():
    for mode in (torch.no_grad, torch.inference_mode):
        speculator = recurrent_drafter()
        with mode():
            trained(policy(), speculator, updates=2)
        assert speculator.refreshes[-1].agreement_after > speculator.refreshes[0].agreement_before


def test_a_resumed_run_drafts_as_well_as_before(tmp_path):
    old = recurrent_drafter()
    engine = trained(policy(), old)
    save_state(tmp_path / "state.safetensors", engine.state_dict())
    fresh = engine_of(policy(), recurrent_drafter())
    fresh.load_state_dict(load_state(tmp_path / "state.safetensors"))
    a, b = rollout(engine, seed=31), rollout(fresh, seed=31)
    assert a.report.drafted == b.report.drafted
    assert a.report.acceptance_rate == pytest.approx(b.report.acceptance_rate)
    fresh.policy_updated()  # the optimizer's moments fit as well
    assert rollout(fresh, seed=32).report.acceptance_rate > 0.3


def test_a_state_of_another_policy_is_named_and_left(caplog):
    other = engine_of(tiny_llama(hidden=48, seed=1), recurrent_drafter())
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(copy.deepcopy(learned()))
    assert "hidden size" in caplog.text
    assert rollout(other, seed=1).report.drafted == {"recurrent": 0}


def test_states_of_other_kinds_are_refused():
    speculator = recurrent_drafter()
    speculator.bind(InProcessView(policy()), couples_noise=True)
    with pytest.raises(ValueError, match="not a state of the recurrent drafter"):
        speculator.load_state_dict({"kind": "atlas_rl.history"})
    with pytest.raises(ValueError, match="format"):
        speculator.load_state_dict({"kind": "atlas_rl.recurrent", "version": 99})


def test_a_policy_of_another_size_starts_it_from_nothing(caplog):
    speculator = recurrent_drafter()
    experienced(speculator)
    assert can_draft(speculator)
    with caplog.at_level(logging.WARNING):
        speculator.bind(InProcessView(tiny_llama(hidden=48, seed=1)), couples_noise=True)
    assert "starts from nothing" in caplog.text
    assert not can_draft(speculator)


def test_a_reduced_vocabulary_never_hides_a_token():
    """The policy samples tokens that the head cannot propose, and they are committed."""
    model = tiny_bigram(logit_std=1.0)
    speculator = recurrent_drafter(max_vocab=6)
    engine = trained(model, speculator)
    drafted = rollout(engine, seed=5)
    plain = AtlasRolloutEngine(model=model, speculation=False, console=False)
    assert drafted.completion_ids == rollout(plain, seed=5).completion_ids
    assert len(speculator.learner.ids) == 6
    assert len(set(itertools.chain(*drafted.completion_ids))) > 20


def test_a_call_larger_than_the_buffer_is_sampled():
    """Whole rollouts of every n-th request are kept, and no more than the bound."""
    speculator = recurrent_drafter(max_tokens=200)
    engine = engine_of(policy(), speculator)
    output = rollout(engine, seed=0)
    engine.policy_updated()
    kept = [len(row) for row in output.completion_ids[::4]]  # 32 requests of at most 24 tokens against 200
    assert len(speculator.learner._buffer) == sum(kept) <= 200
    assert can_draft(speculator)


def test_a_log_that_overflows_keeps_requests_that_are_logged():
    """Some requests of a call may never be logged, here those of even numbers."""
    model, speculator = policy(), recurrent_drafter(max_tokens=20)
    engine = engine_of(model, speculator)
    rollout(engine, seed=0)
    learner, view, requests = speculator.learner, InProcessView(model), np.array([1, 3])
    sequences = learner.sequences
    learner.begin_call(sequences, view)
    verified = Verified(
        requests=requests,
        token_ids=np.ones((2, 12), np.int64),
        num_committed=np.full(2, 12),
        num_accepted=np.full(2, 11),
        num_drafted=np.full(2, 11),
        finished=np.ones(2, bool),
        hidden=Hidden(12 * np.arange(2), torch.zeros(24, view.hidden_size), {}),
    )
    learner.observe(verified, sequences.prompt_lengths[requests], np.full(2, -1), view)
    assert learner._num_logged == 12


@pytest.mark.slow
def test_softcapped_logits_are_matched():
    speculator = recurrent_drafter()
    engine = trained(tiny_gemma2(seed=3), speculator)
    assert speculator.refreshes[-1].agreement_after > speculator.refreshes[0].agreement_before
    assert rollout(engine, seed=8).report.drafted["recurrent"] > 0


@pytest.mark.parametrize("rows", [1, 3, 9, 70])
def test_a_folded_head_is_the_same_function(rows):
    generator = torch.Generator().manual_seed(0)
    head = RecurrentHead(hidden_size=24, state_size=16)
    head.bias.data = torch.randn(11, generator=generator)
    head.set_tables(torch.randn(11, 24, generator=generator), torch.randn(11, 24, generator=generator), torch.randn(11))
    folded = FoldedHead(head)
    hidden, tokens = torch.randn(rows, 24, generator=generator), torch.arange(rows) % 12
    with torch.no_grad():
        state = head.absorb(head.begin(hidden), tokens)
        own = folded.absorb(folded.begin(hidden), tokens)
        assert torch.allclose(own, state, atol=1e-5)
        assert torch.allclose(folded.logits(own), head.logits(state), atol=1e-4)
        after = head.absorb(state, tokens.flip(0))
        unrolled = head.unroll(hidden, torch.stack([tokens, tokens.flip(0)], dim=1))
        assert torch.allclose(unrolled, torch.stack([state, after], dim=1), atol=1e-5)


def test_the_vocabulary_is_what_the_rollouts_use():
    counts = TokenCounts(10)
    counts.add(np.repeat([3, 7, 1], [5000, 100, 1]))
    assert counts.most_used(8).tolist() == [3, 7]  # 0.02% for token 1: not covered
    assert counts.most_used(1).tolist() == [3]
    assert TokenCounts(10).most_used(8).tolist() == []
    for _ in range(80):
        counts.fade()
    counts.add(np.repeat([1], 1000))
    assert counts.most_used(8).tolist() == [1, 3]  # 5 of 1005 left of token 3; 0.1 of token 7


def test_rows_follow_the_policy():
    model = tiny_llama(seed=2)
    rows = TokenRows.empty(64, 32, torch.device("cpu"))
    view = InProcessView(model)
    rows.add(np.array([5, 9, 5]), view)
    rows.add(np.array([9, 2]), view)
    assert rows.token_ids.tolist() == [5, 9, 2]
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    rows.reread(view)
    assert torch.equal(rows.inputs[rows.slots[2]], model.get_input_embeddings().weight[2])
    assert torch.equal(rows.outputs[rows.slots[9]], model.get_output_embeddings().weight[9])


def test_windows_stay_within_a_rollout():
    buffer = RolloutBuffer(max_tokens=100)
    # Two rollouts, of 3 and 2 tokens, arriving shuffled; the hidden state of a token is its id.
    requests, positions = np.array([1, 0, 0, 1, 0]), np.array([4, 7, 5, 5, 6])
    tokens = np.array([10, 3, 1, 11, 2])
    none = np.zeros(5, bool)
    buffer.add(requests, positions, tokens, torch.from_numpy(tokens)[:, None].half(), none, version=0)
    windows = buffer.newest(50, unroll=3, rng=np.random.default_rng(0))
    found = {tuple(row[: 1 + int(valid.sum())]) for row, valid in zip(windows.token_ids, windows.valid, strict=True)}
    assert found == {(1, 2, 3), (2, 3), (10, 11)}
    for states, row, valid in zip(windows.hidden, windows.token_ids, windows.valid, strict=True):
        count = 1 + int(valid.sum())
        assert states[:count, 0].tolist() == row[:count].tolist()


def test_the_buffer_is_bounded_and_prefers_new_policies():
    buffer = RolloutBuffer(max_tokens=40)
    for version in range(5):
        n = np.arange(16)
        tokens = np.full(16, version)
        buffer.add(np.zeros(16, np.int64), n, tokens, torch.zeros(16, 2).half(), np.zeros(16, bool), version)
    assert len(buffer) == 32
    drawn = buffer.sample(4000, 1, version=4, rng=np.random.default_rng(0)).token_ids[:, 0]
    assert set(drawn) == {3, 4}
    assert (drawn == 4).mean() == pytest.approx(1 / (1 + 0.5**0.25), abs=0.03)


def test_versions_may_jump_by_any_number():
    buffer, n = RolloutBuffer(max_tokens=100), np.arange(16)
    for call, version in enumerate((0, 20_000)):
        buffer.add(0 * n, n, np.full(16, call), torch.zeros(16, 2).half(), n < 0, version)
        drawn = buffer.sample(100, 1, version=20_000 * (call + 1), rng=np.random.default_rng(0)).token_ids[:, 0]
        assert set(drawn) == {call}, "the newest, however old"


def test_it_learns_more_often_where_its_drafts_were_rejected():
    buffer = RolloutBuffer(max_tokens=40, missed_weight=3.0)
    # Two rollouts of 8 tokens, shuffled; a token is its number, and the sixth of the second rollout was missed.
    order = np.random.default_rng(0).permutation(16)
    tokens, missed = np.arange(16), np.arange(16) == 13
    buffer.add((tokens // 8)[order], (tokens % 8)[order], tokens[order], torch.zeros(16, 2).half(), missed[order], 0)
    drawn = buffer.sample(8000, 2, version=0, rng=np.random.default_rng(0)).token_ids[:, 0]
    assert (drawn == 12).mean() == pytest.approx(3 / 16, abs=0.02)  # 14 tokens have a successor; one counts thrice
    assert (drawn == 13).mean() == pytest.approx(1 / 16, abs=0.02)


def test_it_knows_which_of_its_drafts_were_rejected():
    speculator = recurrent_drafter()
    engine = trained(policy(), speculator, updates=1)
    report = rollout(engine, 7, eos_token_ids=[]).report
    missed = sum(int(entry.missed.sum()) for entry in speculator.learner._log)
    rejected = report.drafted["recurrent"] - report.accepted["recurrent"]
    # A rejection ends a draft of three tokens: one to three of them are rejected with it.
    assert rejected / 3 <= missed <= rejected
    assert missed > 0
