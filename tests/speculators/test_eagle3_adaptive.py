"""The adaptive EAGLE-3 head: it follows the policy, never changes a token, and a refresh that goes wrong is undone."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Rollouts
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3.unrolling import unrolled
from atlas_rl.speculators.eagle3_adaptive.learner import RefineSettings
from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
from atlas_rl.speculators.eagle3_adaptive.texts import batch_of, num_positions
from atlas_rl.training.eagle3 import TrainSettings, new_head
from tests.drafters import ticking
from tests.models import tiny_bigram

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4]]
LAYERS = (1, 2, 3)


@cache
def policy():
    return tiny_bigram(layers=4, seed=11)


@cache
def static_head():
    """Random but for its output layer: all that it comes to know it learns in the run."""
    return new_head(InProcessView(policy()), TrainSettings(layers=LAYERS), np.arange(60)).eval()


def adaptive(**options):
    """Learns for about 12 steps after every update."""
    settings = options.pop("settings", RefineSettings(learning_rate=4e-3))
    return AdaptiveEagle3Speculator(
        static_head(), settings=settings, **{"clock": ticking(), "budget_share": 12.0} | options
    )


def engine_of(speculator, model=None, **options):
    controller = FixedController([speculator.name], speculator.name, 3)
    options = {"speculators": [speculator], "controller": controller, "console": False} | options
    return AtlasRolloutEngine(model=model or policy(), **options)


def rollout(engine, seed, **options):
    return engine.generate(
        PROMPTS, **{"num_generations": 4, "max_new_tokens": 24, "eos_token_ids": [17], "seed": seed} | options
    )


def trained(speculator, updates, **options):
    engine = engine_of(speculator, **options)
    for seed in range(updates):
        rollout(engine, seed)
        engine.policy_updated()
    return engine


@pytest.fixture(scope="module")
def learned():
    """A speculator after some updates, and its engine."""
    speculator = adaptive()
    return speculator, trained(speculator, 5)


def weights(head):
    return {name: weight.detach().clone() for name, weight in head.named_parameters()}


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


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


def test_an_error_in_a_refresh_costs_drafts_only(monkeypatch):
    """Halfway through a refresh the drafting head is whole: what is trained is another one."""
    speculator = adaptive()
    engine = trained(speculator, 1)
    before = weights(speculator.head)
    rollout(engine, 1)
    step = speculator.learner._step

    def fails(*arguments):
        step(*arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speculator.learner, "_step", fails)
    engine.policy_updated()
    assert same(weights(speculator.head), before)
    assert same(weights(speculator.learner.trainee), before)  # else it would be what the next refresh is measured by
    assert all(weight.grad is None for weight in speculator.learner.trainee.parameters())
    assert "out of memory" in " ".join(rollout(engine, 2).report.warnings)
    monkeypatch.undo()
    engine.policy_updated()
    assert rollout(engine, 3).report.drafted["eagle3_adaptive"] > 0


@pytest.mark.parametrize("where", ["_step", "_agreement", "_is_good"])
def test_an_interrupt_in_a_refresh_undoes_it_and_is_raised_again(monkeypatch, where):
    speculator = adaptive()
    engine = trained(speculator, 1)
    before = weights(speculator.head)
    rollout(engine, 1)
    learner, calls = speculator.learner, []
    real = getattr(learner, where)

    def interrupted(*arguments):
        result = real(*arguments)
        calls.append(where)
        if where != "_agreement" or len(calls) == 2:  # after some steps
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(learner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.policy_updated()
    assert same(weights(learner.trainee), before)
    assert same(weights(speculator.head), before)


def test_a_refresh_that_raises_is_paid_for(monkeypatch):
    clock = ticking(1.0)
    speculator = adaptive(clock=clock, budget_share=0.5)
    engine = engine_of(speculator)
    for _ in range(200):
        clock()

    def fails(*arguments):
        raise RuntimeError("out of memory")

    rollout(engine, 1)
    monkeypatch.setattr(speculator.learner, "_step", fails)
    engine.policy_updated()
    assert speculator.budget._closed_s > speculator.budget.opened_s
    assert speculator.budget._owed_s == 0.0  # no credit for the time that it did not come to use


@pytest.mark.parametrize("raises", [False, True])
def test_an_untrained_head_that_fails_keeps_its_budget(monkeypatch, caplog, raises):
    """Its first refresh takes a step whatever it costs; the next ones wait until that is paid for."""
    speculator = adaptive(budget_share=1e-9, settings=RefineSettings(learning_rate=1e36))
    engine, steps = engine_of(speculator), []
    rollout(engine, 0)
    step = speculator.learner._step

    def counted(*arguments):
        steps.append(step(*arguments))
        if raises:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(speculator.learner, "_step", counted)
    for seed in range(1, 4):
        engine.policy_updated()
        rollout(engine, seed)
    assert len(steps) == 1
    assert ("undone" in caplog.text) != raises
    assert not speculator.learner.trained


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


def test_a_call_larger_than_the_buffer_is_sampled():
    speculator = adaptive(settings=RefineSettings(max_tokens=60))
    engine = engine_of(speculator)
    output = rollout(engine, 3)
    texts = speculator.learner.log.texts()
    assert 0 < sum(map(len, texts)) <= 60
    assert sum(map(len, output.completion_ids)) > 120
    assert len({id(text.prompt) for text in texts}) > 1  # of several prompts
    assert all(text.features[LAYERS[0]].shape[0] == len(text) - 1 for text in texts)
    engine.policy_updated()
    assert speculator.refreshes


LONG = [[7 * n % 61 + k for n in range(40)] for k in range(3)]


def logged(max_tokens=16_384):
    """A speculator that has logged a call of long prompts."""
    speculator = adaptive(settings=RefineSettings(max_tokens=max_tokens))
    engine = engine_of(speculator)
    engine.generate(LONG, num_generations=2, max_new_tokens=12, eos_token_ids=[], seed=1)
    return speculator, engine


def test_only_what_is_read_of_a_prompt_is_kept(monkeypatch):
    texts_module = "atlas_rl.speculators.eagle3_adaptive.texts"
    monkeypatch.setattr(f"{texts_module}._BEFORE", 8)
    batches = []
    for rows in (40, 9):
        monkeypatch.setattr(f"{texts_module}._PROMPT_ROWS", rows)
        texts = logged()[0].learner.log.texts()
        assert [len(text.prompt) for text in texts] == [40] * 6
        assert {len(states) for text in texts for states in text.prompt.features.values()} == {rows}
        monkeypatch.setattr(f"{texts_module}._ROWS", 4)  # so that stretches begin anywhere in the drawn tokens
        drawn = [batch_of(texts, LAYERS, np.random.default_rng(seed)) for seed in range(5)]
        monkeypatch.setattr(f"{texts_module}._ROWS", 64)
        batches.append([*drawn, batch_of(texts, LAYERS, np.random.default_rng(0))])
    for whole, cut in zip(*batches, strict=True):
        assert torch.equal(whole.known, cut.known)
        assert torch.equal(whole.drawn_from, cut.drawn_from)
        for one, other in ((whole.rows, cut.rows), (whole.before, cut.before)):
            assert torch.equal(one.starts, other.starts)
            assert torch.equal(one.embeddings, other.embeddings)
            assert all(torch.equal(one.features[layer], other.features[layer]) for layer in LAYERS)


def test_prompts_count_towards_the_buffer_once():
    texts = logged()[0].learner.log.texts()
    assert num_positions(texts) == 3 * 40 + 6 * 12
    texts = logged(max_tokens=110)[0].learner.log.texts()  # 72 tokens are drawn in all
    assert texts
    assert num_positions(texts) <= 110
    speculator, engine = logged(max_tokens=300)
    engine.generate(LONG, num_generations=2, max_new_tokens=12, eos_token_ids=[], seed=2)
    speculator.learner.end_call()
    assert len(speculator.learner._buffer._calls) == 1


def test_a_log_that_one_prompt_fills_takes_no_more():
    log = logged(max_tokens=30)[0].learner.log
    assert len({id(states) for states in log._prompts.values()}) <= 1


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


def test_a_head_whose_single_step_is_dear_skips_refreshes():
    """Every reading of the clock takes a second, a training step forty: 5% of it are two, and a refresh takes four."""
    clock = ticking(1.0)
    speculator = adaptive(clock=clock, budget_share=0.05)
    engine = engine_of(speculator)
    began = clock()
    for seed in range(12):
        rollout(engine, seed, num_generations=1, max_new_tokens=4)
        for _ in range(40):
            clock()
        engine.policy_updated()
    spent = [done.seconds for done in speculator.refreshes]
    assert 2 <= len(spent) <= 8
    assert [done.num_steps for done in speculator.refreshes] == [1] * len(spent)
    assert sum(spent) <= 0.05 * (clock() - began) + max(spent)


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
