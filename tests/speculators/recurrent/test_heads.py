"""The recurrent drafter learns whatever distribution the policy's LM head makes, with a bias or adapters."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.recurrent.head import FoldedHead
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram
from tests.recurrent import random_head


class Offset(type(tiny_bigram())):
    """Adds to every logit something of its own behind the head: no scale or softcap says how."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(64) / 32
        return output


PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4]]


def plain():
    return tiny_bigram()


def with_bias():
    model = tiny_bigram()
    model.lm_head.bias = nn.Parameter(2 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    return model


def with_adapter():
    """LoRA on the head, as large as the head's own weight."""
    model = get_peft_model(tiny_bigram(), LoraConfig(r=8, target_modules=["lm_head"]))
    lora = model.get_base_model().lm_head.lora_B["default"].weight
    with torch.no_grad():
        lora.copy_(2 * torch.randn(lora.shape, generator=torch.Generator().manual_seed(0)))
    return model


def engine_of(model, speculator):
    controller = FixedController([speculator.name], speculator.name, 3)
    return AtlasRolloutEngine(model=model, speculators=[speculator], controller=controller, console=False)


def rollout(engine, seed):
    return engine.generate(PROMPTS, num_generations=8, max_new_tokens=24, seed=seed, eos_token_ids=[17])


def learned(model):
    """What it accepts after five updates: the share that the head expects, and the measured one of first drafts."""
    speculator = recurrent_drafter()
    engine = engine_of(model, speculator)
    for seed in range(5):
        rollout(engine, seed)
        engine.policy_updated()
    return speculator.refreshes[-1].by_position[0], rollout(engine, 99).report.acceptance_by_position[0]


@pytest.mark.parametrize("head", [with_bias, with_adapter])
def test_it_learns_as_well_as_with_a_plain_head(head):
    expected, accepted = learned(head())
    plain_expected, plain_accepted = learned(plain())
    assert expected > plain_expected - 0.1
    assert accepted > plain_accepted - 0.1
    assert accepted > expected - 0.15  # what it learned towards is what decides


def test_where_the_logits_cannot_be_learned_it_says_so_and_drafts_nothing(caplog):
    model = Offset(plain().config).eval()
    with caplog.at_level(logging.WARNING):
        engine = engine_of(model, recurrent_drafter())
    assert "cannot learn them and drafts nothing" in caplog.text
    for seed in range(2):
        assert rollout(engine, seed).report.drafted == {"recurrent": 0}
        engine.policy_updated()
    off = AtlasRolloutEngine(model=model, speculation=False, console=False)
    assert rollout(off, 1).completion_ids == rollout(engine, 1).completion_ids


def test_drafts_are_computed_in_the_heads_own_type_within_a_callers_autocast():
    """A trainer may generate in a region of its own."""

    def computed():
        head = FoldedHead(random_head(0, 40))
        begun = head.begin(torch.randn(3, 24, generator=torch.Generator().manual_seed(1)))
        absorbed = head.absorb(begun, torch.tensor([0, 40, 7]))
        return begun, absorbed, head.logits(absorbed)

    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        found = computed()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
