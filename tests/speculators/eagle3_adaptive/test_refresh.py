"""Refreshes of the adaptive EAGLE-3 head that fail or are dear: they are undone, and stay within the learning budget."""

from __future__ import annotations

import copy

import pytest
import torch

from atlas_rl.speculators.eagle3_adaptive.learner import RefineSettings
from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
from tests.drafters import ticking
from tests.speculators.eagle3_adaptive.engines import (
    adaptive,
    engine_of,
    policy,
    rollout,
    same,
    static_head,
    trained,
    weights,
)


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


def test_a_head_of_sixteen_bits_gets_its_unrounded_weights_back(monkeypatch):
    head = copy.deepcopy(static_head()).to(torch.bfloat16)
    speculator = AdaptiveEagle3Speculator(
        head, settings=RefineSettings(learning_rate=4e-3), clock=ticking(), budget_share=12.0
    )
    engine = trained(speculator, 1, model=copy.deepcopy(policy()).to(torch.bfloat16))
    before = weights(speculator.learner.trainee)
    assert not same(before, weights(speculator.head)), "the drafting head is rounded"
    rollout(engine, 1)
    monkeypatch.setattr(speculator.learner, "_is_good", lambda done: False)
    engine.policy_updated()
    assert same(weights(speculator.learner.trainee), before)


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
