"""Engines on policies whose layers are of another kind: what they give without speculation, what plain forwards give, and
what has to be true of every kind.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import SamplingParams
from benchmarks.policies import VARIANTS
from benchmarks.tiny_policies import build
from tests.drafters import Parrot, RandomDrafter
from tests.engines import engine_of, generate
from tests.exact import FALSE_ALARM, p_value, sequence_probabilities


def made(name, seed=2, **options):
    """A tiny policy of a model type, or of a variant of one."""
    model_type, own = VARIANTS.get(name, (name, {}))
    model = build(model_type, seed=seed, **own | options)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_(std=2.0)  # some take most of a softmax, some little
    return model


@cache
def policy(name):
    return made(name)


@cache
def reference(name):
    return generate(engine_of(policy(name), speculation=False))


def drafting(model, speculator, k=4, **options):
    """An engine whose only speculator drafts `k` tokens on every step."""
    controller = FixedController([speculator.name], speculator.name, k)
    return engine_of(model, speculators=[speculator], controller=controller, **options)


@torch.no_grad()
def logprobs_of(model, prompt, completion):
    """Of a completion's tokens, by one plain forward over the text."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].numpy()


def assert_drafts_change_nothing(model, wanted):
    """Rows for four of ten requests: the others wait, and rows move when some end."""
    output = generate(drafting(model, Parrot(wanted.completion_ids, error_rate=0.3), max_batch_size=4))
    assert output.completion_ids == wanted.completion_ids
    assert 0 < output.report.acceptance_rate < 1
    for prompt, completion, logprobs in zip(wanted.prompt_ids, wanted.completion_ids, output.logprobs, strict=True):
        assert np.allclose(logprobs, logprobs_of(model, prompt, completion), atol=1e-3)


def assert_greedy_tokens_are_transformers_own(model):
    prompt = [5, 9, 4, 11, 30]
    own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        model.model.rope_deltas = torch.tensor([[7]])  # `generate` keeps it for the next call: as after an image
    options = {"temperature": 0.0, "max_new_tokens": 14, "eos_token_ids": [], "num_generations": 1}
    output = generate(drafting(model, RandomDrafter()), [prompt], **options)
    assert output.completion_ids == [own[0, len(prompt) :].tolist()]


def assert_drafters_of_the_policy_work(family, make):
    """`make` gives a drafter that reads or runs the policy."""
    engine = drafting(policy(family), make(policy(family)))
    generate(engine, max_new_tokens=6)
    engine.policy_updated()
    output = generate(engine)
    assert output.completion_ids == reference(family).completion_ids
    assert sum(output.report.drafted.values()) > 0
    assert not output.report.warnings


def assert_samples_have_the_policys_distribution(model, verification):
    """By chi-square against enumeration, for a policy of four tokens."""
    prompt, new = [1, 3, 2], 4
    engine = drafting(model, RandomDrafter(with_probs=True), 2, verification=verification)
    output = engine.generate([prompt], num_generations=2500, max_new_tokens=new, eos_token_ids=[0], seed=11)
    assert output.report.accepted["random"] > 0
    expected = sequence_probabilities(model, prompt, SamplingParams(max_new_tokens=new, eos_token_ids=(0,)))
    assert p_value(output.completion_ids, expected) > FALSE_ALARM
