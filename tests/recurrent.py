"""Engines that draft with a recurrent head for a tiny policy, heads with random weights, and what they draft from."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from atlas_kernels.noise import request_keys
from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.recurrent.head import RecurrentHead
from tests.models import tiny_bigram

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4]]
EOS = [17]


@cache
def policy():
    return tiny_bigram()


def engine_of(model, speculator, k=3, **options):
    controller = FixedController([speculator.name], speculator.name, k)
    return AtlasRolloutEngine(model=model, speculators=[speculator], controller=controller, console=False, **options)


def rollout(engine, seed, num_generations=8, max_new_tokens=24, **options):
    options = {"eos_token_ids": EOS, **options}
    return engine.generate(
        PROMPTS, num_generations=num_generations, max_new_tokens=max_new_tokens, seed=seed, **options
    )


def trained(model, speculator, updates=3, **options):
    engine = engine_of(model, speculator, **options)
    for seed in range(updates):
        rollout(engine, seed)
        engine.policy_updated()
    return engine


def random_head(seed, tokens, *, hidden=24, state=16):
    """A head over `tokens` tokens of a policy with random tables."""
    generator = torch.Generator().manual_seed(seed)
    head = RecurrentHead(hidden, state, seed)
    head.bias.data = torch.randn(tokens, generator=generator)
    inputs, outputs = torch.randn(2, tokens, hidden, generator=generator)
    head.set_tables(inputs, outputs, torch.zeros(tokens))
    return head


def draft_inputs(batch, seed, *, requests, tokens):
    """Inputs of `DraftGraphs.run` for a head over `tokens` tokens."""
    rng = np.random.default_rng(seed)
    keys, ints = request_keys(seed, batch).view(np.int64), rng.integers
    return np.stack([ints(requests, size=batch), keys, ints(5, 90, size=batch), ints(tokens + 1, size=batch)])
