"""Norms and rotations in one pass stand in for a policy's own, where its code is known: the same logits, nothing stale."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from types import FunctionType

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from atlas_rl.policy import fused_layers, in_process
from atlas_rl.policy.base import Segments
from atlas_rl.policy.fused_layers import fused
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.layer_forms import activation_form, is_gated, norm_form, rotates_halves
from atlas_rl.policy.threads import generating
from tests.models import FACTORIES, tiny_llama
from tests.policy.changes import HOW, scale_weight

ROWS = np.array([3, 1, 6])
FAMILIES = sorted(set(FACTORIES) - {"gpt2"})


def steps(model, between=lambda: None):
    """Logits of prompts and of two ragged steps, with something done to the policy between them."""
    runner, rng, out = InProcessRunner(model), np.random.default_rng(3), []
    starts = np.zeros(3, np.int64)
    with runner.session(runner.new_cache(3, 64)):
        for lengths in (ROWS, np.array([1, 1, 1]), np.array([2, 1, 4])):
            tokens = rng.integers(64, size=int(lengths.sum()))
            out.append(runner.forward(Segments(tokens, 0, starts, lengths), np.arange(len(tokens))))
            starts = starts + lengths
            between()
    return torch.cat(out)


@pytest.fixture(autouse=True)
def by_modules(monkeypatch):
    """Layers run module by module: as one function each (`test_flat_layers.py`), they call the kernels themselves."""
    monkeypatch.setattr(in_process, "flat", lambda *_: nullcontext())


@pytest.fixture
def unfused(monkeypatch):
    """Logits as the policy's own code gives them."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(in_process, "fused", lambda model: nullcontext())
            return steps(*args)

    return run


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel was called."""
    seen = {"rms_norm": 0, "rotate": 0}

    def counting(name):
        own = getattr(fused_layers, name)

        def called(*args, **kwargs):
            seen[name] += 1
            return own(*args, **kwargs)

        return called

    for name in seen:
        monkeypatch.setattr(fused_layers, name, counting(name))
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_and_rotation_of_a_family_is_fused(name, calls, unfused):
    expected = unfused(FACTORIES[name](seed=3))
    assert calls == {"rms_norm": 0, "rotate": 0}
    model = FACTORIES[name](seed=3)
    logits = steps(model)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert calls["rms_norm"] % norms == 0
    assert calls["rms_norm"] >= 3 * norms  # three forwards, and those of the probe
    assert calls["rotate"] * norms == calls["rms_norm"] * model.config.num_hidden_layers
    assert (logits - expected).abs().max() < 1e-5


def test_lora_and_bfloat16_come_along(unfused):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(tiny_llama(seed=3), config)
    assert (steps(tuned) - unfused(tuned)).abs().max() < 1e-5
    half = tiny_llama(seed=3).bfloat16()
    assert torch.equal(steps(half), unfused(half))  # on a CPU it runs its own way


@pytest.mark.parametrize("how", HOW)
def test_a_weight_that_changes_within_a_call_is_seen(how, unfused):
    def change(model):
        norm = model.model.layers[1].input_layernorm
        scale_weight(norm, how)

    one, other = tiny_llama(seed=3), tiny_llama(seed=3)
    changed, expected = steps(one, lambda: change(one)), unfused(other, lambda: change(other))
    assert (changed - expected).abs().max() < 1e-5
    assert (changed - steps(tiny_llama(seed=3))).abs().max() > 1e-2


class OtherEpsilon(modeling_llama.LlamaRMSNorm):
    """A family of somebody's own that looks like Llama."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) * 0.5


def test_code_that_is_written_otherwise_has_no_form():
    assert norm_form(modeling_llama.LlamaRMSNorm) is not None
    assert norm_form(OtherEpsilon) is None
    assert norm_form(torch.nn.RMSNorm) is None
    own = modeling_llama.apply_rotary_pos_emb
    assert rotates_halves(own)
    assert not rotates_halves(torch.nn.Module())
    # The same instructions, but a name in them means something else.
    other = FunctionType(own.__code__, own.__globals__ | {"rotate_half": torch.neg}, own.__name__, own.__defaults__)
    assert not rotates_halves(other)


class Doubled(modeling_llama.LlamaMLP):
    """A gated layer of somebody's own."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def test_gates_are_known_by_their_code_and_activations_by_theirs():
    assert is_gated(modeling_llama.LlamaMLP.forward)
    assert not is_gated(Doubled.forward)
    known = {
        name: activation_form(ACT2FN[name])
        for name in ("silu", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu", "relu")
    }
    assert known == {
        "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": None, "gelu": None, "relu": None,
    }  # fmt: skip
    watched, changed = ACT2FN["silu"], ACT2FN["silu"]
    watched.register_forward_hook(lambda module, args, out: None)
    changed.forward = lambda x: x
    assert activation_form(watched) is activation_form(changed) is activation_form(torch.relu) is None


def test_code_of_ones_own_runs_as_it_is(calls, monkeypatch, unfused):
    def half(q, k, cos, sin, unsqueeze_dim=1):
        return q * 0.5, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", half)
    model = tiny_llama(seed=3)
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = OtherEpsilon
    own = model.model.norm.forward
    model.model.norm.forward = lambda hidden_states: own(hidden_states) * 2
    calls["rms_norm"] = 0
    assert (steps(model) - unfused(model)).abs().max() < 1e-5
    assert calls["rotate"] == 0
    assert calls["rms_norm"] > 0  # behind attention it is Llama's still


def test_other_threads_gradients_and_copies_see_the_policys_own_code(calls):
    model, tokens = tiny_llama(seed=3), torch.arange(5)[None]
    expected = model(tokens).logits

    @torch.no_grad()
    def without_gradients():
        model(tokens)

    with generating(), fused(model):
        calls["rms_norm"] = 0
        logits = model(tokens).logits  # gradients are on
        assert logits.requires_grad
        assert type(copy.deepcopy(model).model.norm) is modeling_llama.LlamaRMSNorm
        thread = threading.Thread(target=without_gradients)
        thread.start()
        thread.join(timeout=60)
        assert calls["rms_norm"] == 0
        without_gradients()
        assert calls["rms_norm"] == 2 * model.config.num_hidden_layers + 1
    assert torch.equal(logits, expected)


def test_kernels_that_are_wrong_here_are_not_used(monkeypatch, unfused, caplog):
    monkeypatch.setattr(fused_layers, "rms_norm", lambda x, weight, eps, **form: 1.1 * x)
    logits = steps(tiny_llama(seed=3))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "norms, rotary embeddings and gates unfused" in caplog.text
    assert torch.equal(logits, unfused(tiny_llama(seed=3)))
