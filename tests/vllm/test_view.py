"""What drafters inside vLLM take for the policy's logits are the logits of vLLM's model, and those of transformers' one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, PhiConfig, PhiForCausalLM

from atlas_rl.policy.view import InProcessView
from tests import models
from tests.models import build, tiny_gemma2
from tests.vllm_engines import engine

SHAPE = models.SHAPE | {"hidden_size": 128}


def phi():
    # vLLM before 0.32 reads no `intermediate_size` of this family: it is four times the hidden size.
    model = build(PhiForCausalLM, PhiConfig(**SHAPE | {"num_key_value_heads": 4, "intermediate_size": 4 * 128}))
    model.lm_head.bias = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    return model


POLICIES = {
    "cohere": lambda: build(CohereForCausalLM, CohereConfig(**SHAPE, logit_scale=0.3)),
    "gemma2": lambda: tiny_gemma2(hidden=128),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig(**SHAPE, logits_scaling=5.0)),
    "phi": phi,
}


@pytest.mark.parametrize("family", POLICIES)
def test_logits_are_those_of_the_engine(family, tmp_path):
    own = POLICIES[family]()
    own.save_pretrained(tmp_path)
    from atlas_rl.vllm.internals import VllmView, runner_of

    llm = engine(tmp_path)
    model = runner_of(llm).get_model()
    view = VllmView(model, llm.llm_engine.vllm_config.model_config.hf_text_config)
    states = 3 * torch.randn(5, own.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model.compute_logits(states).float()
    ids = torch.tensor([3, 60])
    assert torch.allclose(view.logits(states), wanted, atol=1e-4)
    assert torch.allclose(view.logits(states, ids), wanted[:, ids], atol=1e-4)
    assert torch.allclose(view.logits(states), InProcessView(own).logits(states), atol=1e-3)
    assert view.form == InProcessView(own).form
