"""How long the recurrent drafter learns: within its budget, and only while that is worth its seconds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from atlas_rl.core import Rollouts
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.learning_budget import Distilled, LearningBudget, divide_budget
from tests.drafters import recurrent_drafter, ticking
from tests.recurrent import engine_of, policy, rollout, trained


def test_a_budget_is_kept():
    """The first refresh takes a step whatever it costs; what that overdrew is taken off the next ones."""
    speculator = recurrent_drafter(budget_share=1e-9)
    trained(policy(), speculator, updates=2)
    assert [done.num_steps for done in speculator.refreshes] == [1]


def test_the_share_holds_over_the_run():
    """Every reading of the clock takes a second: a refresh takes three at least, and a training step earns half of that."""
    clock = ticking(1.0)
    speculator = recurrent_drafter(clock=clock, budget_share=0.05)
    engine, began = engine_of(policy(), speculator), clock()
    for seed in range(16):
        rollout(engine, seed, num_generations=2, max_new_tokens=6)
        for _ in range(30):  # what else a training step takes
            clock()
        engine.policy_updated()
    spent = [done.seconds for done in speculator.refreshes]
    assert 2 <= len(spent) < 8
    assert sum(spent) <= 0.05 * (clock() - began) + max(spent)


def test_heads_that_learn_beside_each_other_divide_one_share():
    """Whoever adds a second head gets no longer refreshes."""
    rollouts = Rollouts(None, 1.0)
    budgets = []
    for heads in (1, 2):
        drafters = [recurrent_drafter(clock=ticking(1.0), budget_share=0.05) for _ in range(heads)]
        divide_budget([HistorySpeculator(), *drafters])
        for drafter in drafters:
            drafter.budget._closed_s = drafter.budget._clock() - 99.0
            assert drafter.budget.open(rollouts, "recurrent")
            budgets.append(drafter.budget.limit_s(0.0))
    assert budgets == pytest.approx([5.0, 2.5, 2.5])


def test_time_without_anything_to_learn_from_is_kept():
    budget = LearningBudget(0.05, ticking(1.0))
    rollouts = Rollouts(None, 1.0)
    budget._closed_s -= 100.0
    assert budget.open(rollouts, "a")
    first = budget.limit_s(0.0)
    budget.close()
    assert budget.open(rollouts, "a")
    assert budget.limit_s(0.0) > first - 2


class Head:
    """A head whose shortest refresh takes 0.15 s, in a run with 6 s between updates and 2 s of generation in each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.budget = LearningBudget(0.05, lambda: self.now)
        self.learned: list[bool] = []

    def update(self, share: float, *, gain: float = 0.0, agreement: float = 0.5, first_step_s: float = 0.05) -> None:
        """A policy update, after a call in which the head drafted this share of what was accepted."""
        self.now += 6.0
        accepted = {"a": round(100 * share), "b": 100 - round(100 * share)}
        with self.budget.refreshing(Rollouts(None, 2.0, accepted), "a") as in_time:
            self.learned.append(in_time)
            if not in_time:
                return
            self.budget.begin_learning()
            left_s = self.budget.limit_s(agreement) - 0.1 - first_step_s
            steps = 1 + max(0, int(left_s / 0.05))
            seconds = 0.1 + first_step_s + 0.05 * (steps - 1)
            self.now += seconds
            self.budget.learned(Distilled(steps, agreement, agreement + gain, np.full(1, 0.5), seconds))


def test_a_head_that_is_hardly_used_is_refreshed_seldom_and_at_once_where_it_is_used_again():
    head = Head()
    for _ in range(48):
        head.update(0.05)
    assert all(head.learned[:2])
    assert 6 <= sum(head.learned[-30:]) <= 7, "every fifth time"
    for _ in range(5):
        head.update(1.0, gain=0.1)
    assert all(head.learned[-5:])


def test_a_head_that_drafts_everything_and_learns_is_refreshed_at_every_update():
    head = Head()
    for _ in range(16):
        head.update(1.0, gain=0.05)
    assert all(head.learned)


def test_a_jump_is_found_though_refreshes_are_skipped():
    head = Head()
    for _ in range(40):
        head.update(1.0)
    for _ in range(5):
        head.update(1.0, agreement=0.1, gain=0.1)
    assert any(head.learned[-5:])
    assert head.budget._cut == 1.0


def test_a_first_step_that_compiles_is_paid_and_forgotten():
    head = Head()
    head.update(1.0, gain=0.1, first_step_s=3.0)
    for _ in range(40):
        head.update(1.0, gain=0.05)
    assert all(head.learned[-24:])


def test_an_error_closes_the_budget_and_earns_no_credit():
    clock = ticking(1.0)
    budget, rollouts = LearningBudget(0.05, clock), Rollouts(None, 1.0)
    budget._closed_s -= 100.0
    with pytest.raises(KeyboardInterrupt), budget.refreshing(rollouts, "a"):
        raise KeyboardInterrupt
    assert budget.open(rollouts, "a")
    assert budget.limit_s(0.0) == pytest.approx(0.05)  # of the one second since


def test_learning_that_fails_earns_no_credit():
    """Undone learning, which records no result, is no time without anything to learn from."""
    budget, rollouts = LearningBudget(0.05, ticking(1.0)), Rollouts(None, 1.0)
    budget._closed_s -= 100.0
    with budget.refreshing(rollouts, "a"):
        budget.begin_learning()
    assert budget.open(rollouts, "a")
    assert budget.limit_s(0.0) == pytest.approx(0.05)


def test_an_untrained_head_that_fails_keeps_its_budget(monkeypatch):
    """Its first refresh takes a step whatever it costs; the next ones wait until that is paid for."""
    speculator, tries = recurrent_drafter(budget_share=1e-9), []

    def fails(*arguments, **options):
        tries.append(speculator.budget.opened_s)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("atlas_rl.speculators.recurrent.learner.distill", fails)
    trained(policy(), speculator, updates=3)
    assert len(tries) == 1
    assert speculator.budget._closed_s > speculator.budget.opened_s


@pytest.mark.slow
@pytest.mark.parametrize(("measuring_s", "learns"), [(0.0, True), (5.0, False)])
def test_time_that_only_measures_earns_no_time_to_learn(measuring_s, learns):
    speculator = recurrent_drafter(budget_share=1.0, clock=ticking(0.01))
    rollout(engine_of(policy(), speculator), 0)
    speculator.budget._closed_s = speculator._clock() - 5.0
    speculator.refresh(Rollouts(speculator.learner.sequences, 1.0, measuring_s=measuring_s), 1)
    assert (speculator.refreshes[-1].num_steps > 20) == learns
    assert learns or speculator.refreshes[-1].num_steps == 1


def learning(generate_s, accepted=(), updates=6, budget_s=1.0):
    """Optimizer steps of each refresh of a head that has some time for it, while the policy moves."""
    model, speculator = copy.deepcopy(policy()), recurrent_drafter(budget_share=1.0, clock=ticking(0.01))
    engine, steps, generator = engine_of(model, speculator), [], torch.Generator().manual_seed(0)
    for seed in range(updates):
        rollout(engine, seed)
        with torch.no_grad():  # so that there is always something to learn
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
        speculator.budget._closed_s = speculator._clock() - budget_s
        counts = accepted[seed] if seed < len(accepted) else {}
        speculator.refresh(Rollouts(speculator.learner.sequences, generate_s, counts), seed)
        steps.append(speculator.refreshes[-1].num_steps)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(("generate_s", "pays"), [(1e9, True), (0.0, False)])
def test_training_is_cut_when_it_costs_more_than_it_gains(generate_s, pays):
    """Seconds of generation are what there is to gain from: of a billion any training is worth it, of none no training."""
    steps = learning(generate_s)
    assert steps[0] > 20
    assert (steps[-1] > 20) == pays
    assert pays or steps[-1] <= steps[0] / 8


@pytest.mark.slow
def test_training_is_worth_the_heads_share_of_the_accepted_drafts():
    """Calls of 20 s pay for learning, but not for a head whose drafts hardly count beside another's."""
    alone, beside = {"recurrent": 50, "history": 0}, {"recurrent": 1, "history": 999}
    steps = learning(20.0, [beside] * 6 + [alone], updates=7, budget_s=0.4)
    assert steps[0] > 20
    assert steps[5] <= steps[0] / 3
    assert steps[6] > 20  # asked again, it learns again at once


@pytest.mark.parametrize(
    ("accepted", "share"), [({}, None), ({"a": 0, "b": 0}, None), ({"a": 1, "b": 3}, 0.25), ({"b": 3}, 0.0)]
)
def test_the_share_of_a_drafter(accepted, share):
    assert Rollouts(None, accepted=accepted).share_of("a") == share


@pytest.mark.slow
def test_a_jump_of_the_policy_gives_the_whole_budget_back():
    model, speculator = copy.deepcopy(policy()), recurrent_drafter(budget_share=1.0, clock=ticking(0.01))
    engine = engine_of(model, speculator)

    def refreshed(seed, generate_s):
        rollout(engine, seed)
        speculator.budget._closed_s = speculator._clock() - 1.0
        speculator.refresh(Rollouts(speculator.learner.sequences, generate_s), seed)
        return speculator.refreshes[-1].num_steps

    first = [refreshed(seed, 1.0) for seed in range(12)]
    assert first[-1] < first[0] / 4  # an unchanged policy has nothing left to teach
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.roll(3, dims=0))
    assert refreshed(12, 1.0) > first[0] / 2
