"""Engines on policies whose layers are of another kind: what they give without speculation, and what plain forwards give."""

from __future__ import annotations

from functools import cache

import torch

from atlas_rl.controller.fixed import FixedController
from benchmarks.policies import VARIANTS
from benchmarks.tiny_policies import build
from tests.engines import engine_of, generate


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
