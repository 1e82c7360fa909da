"""Decoder layers of known code run as one function each: the same logits, hooks and patches kept, nothing stale."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from atlas_rl.policy import cpu_linear, flat_layers, in_process
from atlas_rl.policy.base import Taps
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.decoder_forms import AttentionForm, attention_form, is_decoder_layer
from atlas_rl.policy.flat_layers import flat
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.linear_routes import PACKED, STREAMED, TURNED, packed_type
from atlas_rl.policy.threads import generating, replaced_forwards
from tests.models import FACTORIES, SHAPE, build, tiny_llama
from tests.policy.changes import ANOTHER, HOW, IN_PLACE, scale_weight
from tests.policy.layer_steps import LENGTHS, same, steps, with_hook
from tests.routes import table_where

KNOWN = ("llama", "qwen2", "qwen3", "mistral")


def experts(seed=0):
    """Layers of Llama's code around experts, which are called as a module."""
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8)
    return build(Qwen3MoeForCausalLM, config, seed=seed)


MAKERS = {**FACTORIES, "qwen3_moe": experts}


@pytest.fixture
def by_modules(monkeypatch):
    """Logits with layers that run module by module."""

    def run(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(in_process, "flat", lambda *_: nullcontext())
            return steps(*args, **kwargs)

    return run


@pytest.fixture
def flat_calls(monkeypatch):
    """How many layers ran as one function."""
    seen, own = [0], flat_layers._Layer.forward

    def counted(self, *args):
        seen[0] += 1
        return own(self, *args)

    monkeypatch.setattr(flat_layers._Layer, "forward", counted)
    return seen


@pytest.mark.parametrize("name", MAKERS)
def test_layers_of_known_code_give_the_same_logits(name, by_modules, flat_calls):
    """To the bit, for prompts, for one token per row and for several, with windows that have passed the first tokens."""
    model = MAKERS[name](seed=3)
    expected = by_modules(model)
    assert flat_calls == [0]
    ours = steps(model)
    assert same(ours, expected)
    layers = model.config.num_hidden_layers
    assert (flat_calls[0] >= len(LENGTHS) * layers) == (name in (*KNOWN, "qwen3_moe"))
    assert flat_calls[0] % layers == 0


def test_forms_are_known_by_their_code():
    assert is_decoder_layer(modeling_llama.LlamaDecoderLayer)
    assert attention_form(modeling_llama.LlamaAttention) == AttentionForm()
    assert attention_form(modeling_qwen3.Qwen3Attention) == AttentionForm(norms_heads=True, window="layer")
    assert not is_decoder_layer(modeling_llama.LlamaMLP)
    assert attention_form(modeling_llama.LlamaMLP) is None


def test_inputs_of_layers_that_drafters_look_at_are_not_overwritten(by_modules):
    def taps():
        return Taps(wants_layers=(0, 1, 2))

    model = tiny_llama(seed=3)
    expected = by_modules(model, taps=taps)
    assert len(expected) == 4 * len(LENGTHS)
    assert same(steps(model, taps=taps), expected)


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]])
def test_adapters_come_along(modules, by_modules, flat_calls):
    torch.manual_seed(0)
    tuned = get_peft_model(tiny_llama(seed=3), LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    expected = by_modules(tuned)
    assert same(steps(tuned), expected)
    assert flat_calls[0] >= 2 * len(LENGTHS)
    assert not same(expected, by_modules(tiny_llama(seed=3)))


@pytest.mark.parametrize("part", ["input_layernorm", "mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("how", HOW)
def test_a_weight_that_changes_within_a_call_is_seen(part, how, by_modules):
    def change(model):
        module = model.model.layers[1].get_submodule(part)
        scale_weight(module, how)

    one, other = tiny_llama(seed=3), tiny_llama(seed=3)
    changed, expected = steps(one, lambda: change(one)), by_modules(other, lambda: change(other))
    assert same(changed, expected)
    assert not same(changed, steps(tiny_llama(seed=3)))


PARTS = ("", "input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp",
         "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_hooks_of_every_part_run(part, by_modules):
    """A hook may replace what a module returns."""

    (one, ours), (other, theirs) = (with_hook(tiny_llama(seed=3), part) for _ in range(2))
    changed = steps(one)
    assert same(changed, by_modules(other))
    assert len(ours) == len(theirs) > 0
    assert not same(changed, steps(tiny_llama(seed=3)))


@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.up_proj"])
def test_a_hook_may_return_another_type(part, by_modules):
    """The compiled gate reads float32."""

    def hooked():
        model = tiny_llama(seed=3)
        model.model.layers[1].get_submodule(part).register_forward_hook(lambda module, args, out: out.double())
        model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        return model

    assert same(steps(hooked()), by_modules(hooked()))


def test_what_a_hook_keeps_is_not_overwritten():
    model, kept = tiny_llama(seed=3), []
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "o_proj"):
        attention.get_submodule(name).register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    steps(model)
    assert kept
    assert all(torch.equal(out, was) for out, was in kept)


@pytest.mark.parametrize("part", PARTS)
def test_a_patched_forward_runs(part, by_modules):
    def patched():
        model = tiny_llama(seed=3)
        module = model.model.layers[1].get_submodule(part)
        own = module.forward

        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            return (1.25 * out[0], *out[1:]) if isinstance(out, tuple) else 1.25 * out

        module.forward = forward
        return model

    changed = steps(patched())
    assert same(changed, by_modules(patched()))
    assert not same(changed, steps(tiny_llama(seed=3)))


@pytest.mark.parametrize("part", [part for part in PARTS if part])
def test_a_part_that_runs_as_something_else_does(part, by_modules, flat_calls):
    """As a copy in four bits does while it drafts, within a session."""

    def replaced():
        model = tiny_llama(seed=3)
        module = model.model.layers[1].get_submodule(part)

        def forward(module, *args, **kwargs):
            out = type(module).forward(module, *args, **kwargs)
            return (1.25 * out[0], *out[1:]) if isinstance(out, tuple) else 1.25 * out

        within, stack = [replaced_forwards({module: forward})], ExitStack()

        def between():  # in one forward, not in the next one
            if within:
                stack.enter_context(within.pop())
            else:
                stack.close()

        return model, between

    own, usual = steps(tiny_llama(seed=3)), flat_calls[0]
    changed = steps(*replaced())
    assert flat_calls[0] == 2 * usual - 1
    assert same(changed, by_modules(*replaced()))
    assert not same(changed, own)


def test_hooks_that_transformers_leaves_behind_change_nothing(flat_calls):
    model = tiny_llama(seed=3)
    expected = steps(model)
    with torch.no_grad():
        model(torch.arange(5)[None], output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    flat_calls[0] = 0
    assert same(steps(model), expected)
    assert flat_calls[0] >= 2 * len(LENGTHS)


def test_hooks_of_all_modules_run(by_modules, flat_calls):
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 1.01 * out if isinstance(module, torch.nn.Linear) else None
    )
    try:
        model = tiny_llama(seed=3)
        assert same(steps(model), by_modules(model))
    finally:
        handle.remove()
    assert flat_calls == [0]


def test_other_types_and_arguments_run_the_layers_own_code(by_modules, flat_calls):
    half = tiny_llama(seed=3).bfloat16()
    assert same(steps(half), by_modules(half))
    double = tiny_llama(seed=3).double()
    assert same(steps(double), by_modules(double))
    assert flat_calls == [0]
    model, options = tiny_llama(seed=3), {"context": lambda: torch.autocast("cpu", torch.bfloat16)}
    expected = by_modules(model, **options)
    assert same(steps(model, **options), expected)
    assert not same(expected, by_modules(model))


def test_gradients_other_attention_and_other_threads_have_the_policys_own_code(flat_calls):
    model, tokens = tiny_llama(seed=3), torch.arange(5)[None]
    expected = model(tokens).logits
    runner = InProcessRunner(model)
    with generating(), flat(model, runner.linears):
        logits = model(tokens).logits  # with gradients
        assert logits.requires_grad
        with torch.no_grad():
            plain = model(tokens).logits  # with its own attention
    assert flat_calls == [0]
    assert torch.equal(logits, expected)
    assert torch.equal(plain, expected)


def large(name, seed=3):
    """A policy whose projections outgrow a core's cache, so that they have routes."""
    options = SHAPE | {"hidden_size": 256, "intermediate_size": 300, "num_key_value_heads": 4}
    if name == "llama":
        return build(LlamaForCausalLM, LlamaConfig(**options), seed=seed)
    return build(Qwen2ForCausalLM, Qwen2Config(**options), seed=seed)


@pytest.fixture
def packed_weights(monkeypatch):
    """Shapes of the weights that are packed."""
    if packed_type(torch.float32) is None:
        pytest.skip("this torch has no packed linear layers")
    shapes, pack = [], cpu_linear.packed_weight

    def seen(weight):
        shapes.append(tuple(weight.shape))
        return pack(weight)

    monkeypatch.setattr(cpu_linear, "packed_weight", seen)
    return shapes


def with_route(route, monkeypatch):
    monkeypatch.setattr(in_process, "FastLinears", lambda model: FastLinears(model, table_where(route)))


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases, and with
@pytest.mark.parametrize("route", [PACKED, TURNED, *STREAMED, None])
def test_layers_that_multiply_the_same_rows_are_multiplied_together(
    name, route, by_modules, packed_weights, monkeypatch
):
    with_route(route, monkeypatch)
    model = large(name)
    expected = by_modules(model)
    together = {(3 * 256, 256), (2 * 300, 256)}
    assert not together.intersection(packed_weights)
    packed_weights.clear()
    ours = steps(model)
    assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) < 1e-4
    if route in (TURNED, *STREAMED):
        assert not packed_weights
    else:
        assert together < set(packed_weights)
    if route == PACKED:
        assert (300, 256) not in packed_weights
        each = packed_weights.count((3 * 256, 256))
        assert packed_weights.count((256, 256)) == each  # the output's projection, and no other of this shape


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj"])
@pytest.mark.parametrize("how", [IN_PLACE, ANOTHER])
def test_a_packed_group_is_of_the_weights_as_they_are(part, how, by_modules, packed_weights, monkeypatch):
    with_route(PACKED, monkeypatch)

    def change(model):
        module = model.model.layers[1].get_submodule(part)
        scale_weight(module, how)

    one, other = large("llama"), large("llama")
    changed, expected = steps(one, lambda: change(one)), by_modules(other, lambda: change(other))
    assert max((a - b).abs().max() for a, b in zip(changed, expected, strict=True)) < 1e-4
    assert packed_weights
    assert max((a - b).abs().max() for a, b in zip(changed, steps(large("llama")), strict=True)) > 1e-2


def test_a_group_with_an_adapter_or_a_hook_is_called_layer_by_layer(by_modules, packed_weights, monkeypatch):
    with_route(PACKED, monkeypatch)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False)
    tuned = get_peft_model(large("llama"), config)
    tuned.base_model.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: 1.5 * out)
    expected = by_modules(tuned)
    packed_weights.clear()
    ours = steps(tuned)
    assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) < 1e-4
    assert (3 * 256, 256) not in packed_weights
    assert packed_weights.count((2 * 300, 256)) * 2 == packed_weights.count((256, 300))  # one of two layers
