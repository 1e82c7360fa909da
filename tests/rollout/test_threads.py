"""Threads generate at once: the tokens that each gives alone, and a policy that its trainer may go on running."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from atlas_rl.core import SamplingParams
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import RandomDrafter
from tests.engines import PROMPTS, VOCAB, draft_model, engine_of, fixed, generate, state_of
from tests.families import drafting
from tests.models import tiny_gpt2, tiny_llama

ROUNDS = 3
TEXT = torch.arange(1, 40)[None]


def plain(model):
    with torch.no_grad():
        return model(TEXT).logits


def both_at_once(first, second, calls=ROUNDS):
    """Completions of `calls` calls each, by two threads that begin together."""
    together = threading.Barrier(2)

    def work(engine, seeds):
        together.wait(30)
        return [generate(engine, seed=seed).completion_ids for seed in seeds]

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(work, engine, range(k, k + calls)) for k, engine in ((0, first), (100, second))]
        return [result.result(timeout=300) for result in results]


def alone(model, first_seed, calls=ROUNDS):
    engine = engine_of(model, speculation=False)
    return [generate(engine, seed=seed).completion_ids for seed in range(first_seed, first_seed + calls)]


@pytest.mark.parametrize("speculation", [False, True])
def test_two_engines_on_two_policies(speculation):
    models = [tiny_llama(seed=21), tiny_gpt2(seed=22)]
    before = [state_of(model) for model in models]
    engines = [engine_of(model, speculation=speculation) for model in models]
    assert both_at_once(*engines) == [alone(models[0], 0), alone(models[1], 100)]
    assert [state_of(model) for model in models] == before


@pytest.mark.slow
def test_two_engines_on_one_policy_and_each_others_drafters():
    model, drafter = tiny_llama(seed=21), draft_model()
    before = state_of(model), state_of(drafter)
    engines = [fixed(DraftLM(drafter, VOCAB), 3), fixed(HistorySpeculator(), 4)]
    for engine in engines:
        engine.model, engine._backend = model, None
    # The draft LM of one engine is the policy of a third call, and its own policy the draft LM of that.
    crossed = engine_of(drafter, draft_model=model)
    assert both_at_once(*engines) == [alone(model, 0), alone(model, 100)]
    assert both_at_once(engines[0], crossed) == [alone(model, 0), alone(drafter, 100)]
    assert (state_of(model), state_of(drafter)) == before


def test_one_engine():
    model = tiny_llama(seed=21)
    engine = engine_of(model)
    assert both_at_once(engine, engine) == [alone(model, 0), alone(model, 100)]
    assert len(engine.reports) == 2 * ROUNDS
    assert all(report.num_requests == 2 * len(PROMPTS) for report in engine.reports)


@pytest.mark.parametrize("train", [False, True])
def test_a_trainer_runs_its_policy_meanwhile(train):
    model = tiny_llama(seed=21).train(train)
    expected, wanted = plain(model), alone(model, 0, calls=4)
    engine, over, wrong, count = engine_of(model), threading.Event(), 0, 0

    def rollouts():
        try:
            return [generate(engine, seed=seed).completion_ids for seed in range(4)]
        finally:
            over.set()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(rollouts)
        while not over.is_set():
            count += 1
            wrong += not torch.equal(plain(model), expected)
        assert result.result(timeout=300) == wanted
    assert wrong == 0
    assert count > 10
    assert model.training == train


def test_policy_updates_of_another_thread_wait_for_the_call():
    model = tiny_llama(seed=21)
    engine, over = engine_of(model), threading.Event()

    def updates():
        while not over.is_set():
            engine.policy_updated()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(updates)
        outputs = [generate(engine, seed=seed).completion_ids for seed in range(ROUNDS)]
        over.set()
        result.result(timeout=60)
    assert outputs == alone(model, 0)


class Interrupting(RandomDrafter):
    """Lets another thread work during its first draft, for a second at most. Keeps the policies that it is bound to."""

    def __init__(self, work):
        super().__init__()
        self.work, self.bound, self.seen = threading.Thread(target=work), [], []

    def bind(self, policy, couples_noise):
        super().bind(policy, couples_noise)
        self.bound.append(policy.model)

    def propose(self, sequences, requests, max_draft_tokens):
        if not self.seen:
            self.work.start()
            self.work.join(1.0)
            self.seen = list(self.bound)
        return super().propose(sequences, requests, max_draft_tokens)


@pytest.mark.parametrize("other", ["meets its policy", "generates"])
def test_a_running_call_keeps_its_policy_whatever_another_thread_does_with_the_engine(other):
    own, running = tiny_llama(seed=21), tiny_gpt2(seed=22)
    others = []

    def work():
        others.append(engine.meet(own) if other == "meets its policy" else engine.generate(**options).completion_ids)

    drafter = Interrupting(work)
    options = {"prompts": PROMPTS, "max_new_tokens": 8, "eos_token_ids": None, "seed": 2}
    own.generation_config.eos_token_id = [1, 2]
    engine = drafting(own, drafter, 3)
    output = engine.rollout(running, PROMPTS, SamplingParams(max_new_tokens=8, seed=2))
    drafter.work.join(60)
    assert drafter.seen == [own, running]
    assert drafter.bound == [own, running, own]
    plain = engine_of(running, speculation=False).rollout(running, PROMPTS, SamplingParams(max_new_tokens=8, seed=2))
    assert output.completion_ids == plain.completion_ids
    assert others == [
        None if other == "meets its policy" else engine_of(own, speculation=False).generate(**options).completion_ids
    ]


class Refusing(RandomDrafter):
    """Cannot be bound to one policy."""

    name = "refusing"

    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def bind(self, policy, couples_noise):
        if policy.model is self.refused:
            raise ValueError("not to this one")
        super().bind(policy, couples_noise)


def test_drafters_that_could_not_be_bound_are_bound_again_by_the_next_call():
    first, second = tiny_llama(seed=21), tiny_gpt2(seed=22)
    drafter = Interrupting(lambda: None)
    engine = engine_of(first, speculators=[drafter, Refusing(second)])
    for _ in range(2):
        with pytest.raises(ValueError, match="not to this one"):
            engine.rollout(second, PROMPTS, SamplingParams(max_new_tokens=2, seed=2))
    generate(engine)
    assert drafter.bound == [first, second, second, first]
