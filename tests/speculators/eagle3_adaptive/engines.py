"""Engines that draft with an adaptive EAGLE-3 head for a tiny policy."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.eagle3_adaptive.learner import RefineSettings
from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
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


def weights(head):
    return {name: weight.detach().clone() for name, weight in head.named_parameters()}


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())
