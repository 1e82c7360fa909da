"""What drafters take for the policy's logits are the policy's logits, whatever stands between its last layer and them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from atlas_rl.policy.in_process import unwrap_policy
from atlas_rl.policy.logit_form import LogitForm, after_head, fit_form, probe_products
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.reduced_vocab import TokenRows
from tests.models import FACTORIES, SHAPE, build, tiny_llama


def with_bias():
    model = tiny_llama(seed=3)
    model.lm_head.bias = nn.Parameter(2 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    return model


def adapted(**options):
    """An adapter on the head whose weights are far from where they start."""
    model = get_peft_model(tiny_llama(seed=3), LoraConfig(r=4, lora_dropout=0.1, **options)).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    return unwrap_policy(model)


def granite_moe():
    config = GraniteMoeConfig(**SHAPE, logits_scaling=3.0, num_local_experts=2, num_experts_per_tok=1)
    return build(GraniteMoeForCausalLM, config)


POLICIES = FACTORIES | {
    "cohere2": lambda: build(Cohere2ForCausalLM, Cohere2Config(**SHAPE, logit_scale=0.3, head_dim=8)),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig(**SHAPE, logits_scaling=5.0)),
    "granite_moe": granite_moe,
    "hyperclovax": lambda: build(HyperCLOVAXForCausalLM, HyperCLOVAXConfig(**SHAPE, logits_scaling=3.0)),
    "nanochat": lambda: build(NanoChatForCausalLM, NanoChatConfig(**SHAPE, final_logit_softcapping=4.0)),
    "mixtral": lambda: build(MixtralForCausalLM, MixtralConfig(**SHAPE, num_local_experts=2)),
    "phi": lambda: build(PhiForCausalLM, PhiConfig(**SHAPE, partial_rotary_factor=0.5)),
    "bias": with_bias,
    "lora": lambda: adapted(target_modules=["lm_head", "q_proj"]),
    "lora_bias": lambda: adapted(target_modules=["lm_head"], lora_bias=True),
    "dora": lambda: adapted(target_modules=["lm_head"], use_dora=True),
    "trained_head": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("family", POLICIES)
def test_logits_are_the_policys(family):
    model = POLICIES[family]().eval()
    caught = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        wanted = model(torch.arange(1, 25).view(2, 12)).logits
    handle.remove()
    view, states = InProcessView(model), caught[0]
    model.train()  # drafters learn while the trainer trains; dropout of an adapter is none of the policy's distribution
    ids = torch.tensor([63, 0, 7, 8])
    assert view.form is not None
    assert torch.allclose(view.logits(states), wanted, atol=1e-4)
    assert torch.allclose(view.logits(states, ids), wanted[..., ids], atol=1e-4)
    overlap = torch.minimum(view.logits(states).softmax(dim=-1), wanted.softmax(dim=-1)).sum(dim=-1)
    assert float(overlap.min()) > 1 - 1e-4
    # So are they from the copied rows, which is all that is left when the weights are sharded away.
    rows = TokenRows.empty(view.vocab_size, view.hidden_size, view.device)
    rows.add(np.array([5, 9]), view)
    rows.add(ids.numpy(), view)
    slots = torch.from_numpy(rows.slots[ids.numpy()])
    copied = view.form(functional.linear(states, rows.outputs[slots], rows.biases[slots]))
    assert torch.allclose(copied, wanted[..., ids], atol=1e-4)
    assert model.training
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_scale_is_exact_where_the_configuration_names_it():
    assert InProcessView(POLICIES["granite"]()).form == LogitForm(1 / 5.0)
    assert InProcessView(POLICIES["gemma2"]()).form == LogitForm(softcap=30.0)
    assert InProcessView(POLICIES["hyperclovax"]()).form.scale == pytest.approx(3.0)


class Odd(type(tiny_llama())):
    """A policy that does to its logits what no scale or softcap describes, or hides some of them."""

    way = "cubed"

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.way == "cubed":
            output.logits = output.logits**3 + torch.arange(64)
        elif self.way == "cut":
            output.logits = 2 * output.logits[..., :60]
        else:
            output.logits[..., 60:] = torch.finfo(output.logits.dtype).min if self.way == "least" else -float("inf")
        return output


@pytest.mark.parametrize("way", ["cubed", "cut", "least", "inf"])
def test_where_no_form_is_known_the_policys_own_forward_runs(way):
    model = Odd(tiny_llama().config).eval()
    model.way = way
    view = InProcessView(model)
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = after_head(model, model.lm_head(states).view(15, 64)).view(3, 5, -1)
    assert torch.equal(view.logits(states), wanted)
    ids = torch.tensor([7, 50])
    assert torch.allclose(view.logits(states, ids), wanted[..., ids], atol=1e-4)
    assert (view.form is None) == (way == "cubed")
    assert way == "cubed" or view.form.scale == pytest.approx(2.0 if way == "cut" else 1.0)


def test_a_policy_whose_forward_cannot_be_run_behind_the_head_is_named(caplog):
    model = tiny_llama()
    model.base_model_prefix = ""
    with caplog.at_level(logging.WARNING):
        assert InProcessView(model).form == LogitForm()
    assert "cannot determine what LlamaForCausalLM makes of its LM head's output" in caplog.text


@pytest.mark.parametrize("form", [LogitForm(0.0625), LogitForm(7.0), LogitForm(0.5, 30.0), LogitForm(3.0, 5.0)])
def test_a_form_is_found_from_what_it_makes(form):
    products = probe_products(256)
    found, everywhere = fit_form(products, form(products), LogitForm())
    assert everywhere
    assert found.scale == pytest.approx(form.scale, rel=1e-3)
    assert (found.softcap is None) == (form.softcap is None)
    assert form.softcap is None or found.softcap == pytest.approx(form.softcap, rel=1e-3)


@pytest.mark.parametrize("shape", [lambda logits: logits[0], lambda logits: logits[:, :1], lambda logits: logits[None]])
def test_logits_of_another_shape_are_no_form_and_no_crash(shape, caplog):
    """ProphetNet answers with several streams of logits."""
    model = tiny_llama(seed=1)
    own = type(model).forward

    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = shape(output.logits)
        return output

    model.__class__ = type("Streams", (type(model),), {"forward": forward})
    assert InProcessView(model).form == LogitForm()
    assert "its logits have the shape" in caplog.text
