"""Engines that draft with a recurrent head for a tiny policy."""

from __future__ import annotations

from functools import cache

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
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
