"""The adaptive EAGLE-3 head: it follows the policy, never changes a token, and a refresh that goes wrong is undone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import Rollouts
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3.unrolling import unrolled
from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
from atlas_rl.speculators.eagle3_adaptive.texts import batch_of
from atlas_rl.training.eagle3 import TrainSettings, new_head
from tests.drafters import ticking
from tests.speculators.eagle3_adaptive.engines import (
    LAYERS,
    adaptive,
    engine_of,
    policy,
    rollout,
    same,
    static_head,
    trained,
    weights,
)


@pytest.fixture(scope="module")
def learned():
    """A speculator after some updates, and its engine."""
    speculator = adaptive()
    return speculator, trained(speculator, 5)


def test_it_follows_and_the_static_head_stays(learned):
    before = weights(static_head())
    speculator, engine = learned
    static = rollout(engine_of(Eagle3Speculator(copy.deepcopy(static_head()))), 99).report.accepted_length
    assert rollout(engine, 99).report.accepted_length > static + 0.1
    assert speculator.refreshes[-1].agreement_after > speculator.refreshes[0].agreement_before + 0.1
    assert same(weights(static_head()), before)
    assert not same(weights(speculator.head), before)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5, "temperature": 0.8}])
def test_tokens_do_not_depend_on_it(learned, options):
    plain = AtlasRolloutEngine(model=policy(), speculation=False, console=False)
    drafted = rollout(learned[1], 7, **options)
    assert drafted.report.drafted["eagle3_adaptive"] > 0
    assert drafted.completion_ids == rollout(plain, 7, **options).completion_ids


def test_it_drafts_under_rejection_verification():
    engine = trained(adaptive(), 1, verification="rejection")
    report = rollout(engine, 5).report
    assert report.drafted["eagle3_adaptive"] > 0
    assert not report.drafter_faults


def test_what_it_learns_from_is_what_it_drafts_from():
    """The logged states, cut into stretches with what comes before, against the confidences of its own drafts."""
    speculator, checked = adaptive(), []

    class Watched(AdaptiveEagle3Speculator):
        def propose(self, sequences, requests, max_draft_tokens):
            draft = super().propose(sequences, requests, max_draft_tokens)
            for row, request in enumerate(requests.tolist()):
                checked.append((request, int(sequences.lengths[request]), float(draft.confidence[row, 0])))
            return draft

    speculator = Watched(static_head(), clock=ticking(), budget_share=12.0)
    engine = engine_of(speculator)
    output = rollout(engine, 3)
    lengths = [len(ids) for ids in output.completion_ids]
    texts = speculator.learner.log.texts()
    assert [len(text) for text in texts] == lengths
    expected = {}
    for request, text in enumerate(texts):
        batch = batch_of([text], LAYERS, np.random.default_rng(0))
        with torch.no_grad():
            step = next(unrolled(speculator.head, batch, 1))
            sure = speculator.head.logits(step.features).softmax(dim=-1).amax(dim=-1).clamp(0.01, 0.99)
        places = step.valid[0].nonzero().flatten() + len(text.prompt) - 1
        expected |= {(request, int(place) + 2): float(value) for place, value in zip(places, sure, strict=True)}
    compared = [
        (value, expected[request, length]) for request, length, value in checked if (request, length) in expected
    ]
    assert len(compared) > 50
    assert all(own == pytest.approx(other, abs=3e-3) for own, other in compared)


@pytest.mark.parametrize("learning_rate", [1e38, 3.0])
def test_a_refresh_that_goes_wrong_is_undone(learned, learning_rate, caplog):
    """Weights that are no numbers, and weights that are numbers and draft worse."""
    speculator, engine = learned
    rollout(engine, 20)
    before = weights(speculator.head)
    speculator.learner._optimizer.param_groups[0]["lr"] = learning_rate
    engine.policy_updated()
    speculator.learner._optimizer.param_groups[0]["lr"] = 4e-3
    assert "undone" in caplog.text
    assert same(weights(speculator.head), before)
    assert same(weights(speculator.learner.trainee), before)
    report = rollout(engine, 21).report
    assert report.drafted["eagle3_adaptive"] > 0
    assert not report.drafter_faults
    engine.policy_updated()  # and it goes on learning
    assert not same(weights(speculator.head), before)


def test_a_resumed_run_drafts_as_well_as_before(learned, tmp_path):
    speculator, engine = learned
    engine.save_drafters(tmp_path / "drafters.safetensors")
    fresh = adaptive()
    resumed = engine_of(fresh)
    resumed.load_drafters(tmp_path / "drafters.safetensors")
    one, other = rollout(engine, 30), rollout(resumed, 30)
    assert other.report.accepted == one.report.accepted
    assert same(weights(fresh.head), weights(speculator.head))
    assert fresh.policy_version == speculator.policy_version


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "atlas_rl.recurrent"}, "not a state of the adaptive EAGLE-3 head"),
        ({"version": 2}, "format 2"),
        ({"weights": {}}, "the weights are"),
        ({"trained": 2}, "trained is 2"),
    ],
)
def test_damaged_states_are_refused(learned, change, match):
    speculator, _ = learned
    before = weights(speculator.head)
    with pytest.raises(ValueError, match=match):
        speculator.load_state_dict(speculator.state_dict() | change)
    bad = speculator.state_dict()
    bad["weights"]["fc.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        speculator.load_state_dict(bad)
    assert same(weights(speculator.head), before)


def test_a_state_of_another_head_is_named_and_left(learned, caplog):
    head = new_head(InProcessView(policy()), TrainSettings(layers=LAYERS), np.arange(1, 61)).eval()
    other = AdaptiveEagle3Speculator(head, clock=ticking())
    other.bind(InProcessView(policy()), couples_noise=True)
    before = weights(other.head)
    other.load_state_dict(learned[0].state_dict())
    assert "other tokens" in caplog.text
    assert same(weights(other.head), before)


def test_ranks_draft_with_the_mean_of_those_that_learned(learned):
    one, (other, _), idle = adaptive(), learned, adaptive()
    trained(one, 1)
    idle.bind(InProcessView(policy()), couples_noise=True)
    assert not idle.shared().any()
    other.learner._learned_alone = True
    mean = {name: (weight + weights(other.head)[name]) / 2 for name, weight in weights(one.head).items()}
    kept = other.state_dict()
    total = sum(each.shared() for each in (one, other, idle))
    for each in (one, other, idle):
        each.take_shared(total)
        assert all(torch.allclose(weight, mean[name], atol=1e-6) for name, weight in weights(each.head).items())
    other.load_state_dict(kept)


def test_a_text_is_learned_from_in_stretches(learned, monkeypatch):
    """Long texts give a stretch and what comes before: the head says of it what it says of the whole text."""
    speculator, engine = learned
    rollout(engine, 40, eos_token_ids=[])
    text, head = speculator.learner.log.texts()[0], speculator.head
    monkeypatch.setattr("atlas_rl.speculators.eagle3_adaptive.texts._ROWS", 8)
    part = batch_of([text], LAYERS, np.random.default_rng(1))
    monkeypatch.undo()
    whole = batch_of([text], LAYERS, np.random.default_rng(1))
    at = int(part.rows.starts[0] - whole.rows.starts[0])
    assert at > 0
    with torch.no_grad():
        for short, long in zip(unrolled(head, part, 3), unrolled(head, whole, 3), strict=True):
            rows = short.valid[0].nonzero().flatten()
            places = torch.cumsum(long.valid[0].long(), 0)[rows + at] - 1
            assert torch.allclose(head.logits(short.features), head.logits(long.features[places]), atol=1e-4)


def test_a_rebound_policy_keeps_what_was_learned(learned):
    speculator, _ = learned
    before = weights(speculator.head)
    speculator.bind(InProcessView(policy()), couples_noise=True)
    assert same(weights(speculator.head), before)
    assert speculator.learner.trained


def test_nothing_is_learned_of_a_call_without_texts():
    speculator = adaptive()
    engine = engine_of(speculator)
    rollout(engine, 1, max_new_tokens=1)
    sequences = speculator.learner.log.sequences
    assert speculator.refresh(Rollouts(sequences), 1) is None
    assert not speculator.refreshes
