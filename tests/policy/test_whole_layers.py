"""Decoder layers run as one kernel where that is faster: the same logits, nothing stale, and hooks of parts run."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atlas_rl.policy import flat_layers, in_process, whole_layers
from atlas_rl.policy.base import Taps
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.linear_routes import PACKED, STREAMED, Contest, packed_type
from atlas_rl.policy.whole_layers import PARTS, WHOLE
from tests.models import SHAPE, build
from tests.policy.changes import HOW, scale_weight
from tests.policy.layer_steps import LENGTHS, same, steps, with_hook
from tests.routes import table_where

LARGE = SHAPE | {"hidden_size": 256, "intermediate_size": 300, "num_key_value_heads": 4}
"""Projections that outgrow a core's cache, so that they have routes."""
POLICIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LARGE)),
    "grouped heads and biases": (
        LlamaForCausalLM,
        LlamaConfig(**LARGE | {"num_attention_heads": 8}, head_dim=64, attention_bias=True, mlp_bias=True),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**LARGE, sliding_window=4)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**LARGE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**LARGE, head_dim=64)),
}
NARROW, *_ = STREAMED
NUM_STEPS = len(LENGTHS) - 1  # the first forward is over prompts, whose layers begin the cache


def policy(name="llama", seed=3):
    own, config = POLICIES[name]
    return build(own, config, seed=seed)


@pytest.fixture
def seen(monkeypatch):
    """How many layers ran as one kernel since the policy was probed."""
    counts, own = [0], whole_layers.decoder_layer

    def counted(*args):
        counts[0] += 1
        return own(*args)

    monkeypatch.setattr(whole_layers, "decoder_layer", counted)
    return counts


@pytest.fixture
def by(monkeypatch, seen):
    """Runs steps with a known route of the products and one of the layers; None leaves the latter to be timed."""

    probe = InProcessRunner.row_bytes

    def probed(*args):
        out = probe(*args)
        seen[0] = 0
        return out

    monkeypatch.setattr(InProcessRunner, "row_bytes", probed)

    def run(model, layers, *args, products=NARROW, **kwargs):
        class Known(FastLinears):
            def contest(self, key, num_rows, routes):
                contest = super().contest(key, num_rows, routes)
                if layers is not None and contest.winner is None:
                    contest = Contest({route: [1.0 if route == layers else 2.0] for route in routes})
                    contest.decide()
                return contest

        with monkeypatch.context() as patch:
            patch.setattr(in_process, "FastLinears", lambda model: Known(model, table_where(products)))
            return steps(model, *args, **kwargs)

    return run


@pytest.mark.parametrize("products", STREAMED)
@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_those_of_the_parts_to_the_bit(name, products, by, seen):
    model = policy(name)
    expected = by(model, PARTS, products=products)
    assert seen == [0]
    ours = by(model, WHOLE, products=products)
    assert seen == [NUM_STEPS * model.config.num_hidden_layers]
    assert same(ours, expected)


def test_a_layer_has_the_faster_route(by, seen, monkeypatch):
    """Both are timed, as often as needed, and then one is used."""
    contests, own = [], FastLinears.contest

    def kept(*args):
        contests.append(own(*args))
        return contests[-1]

    monkeypatch.setattr(FastLinears, "contest", kept)
    model = policy()
    expected = by(model, PARTS)
    assert same(by(model, None), expected)
    for contest in contests:
        assert set(contest.seconds) == {PARTS, WHOLE}
    timed = [
        len(route) for contest in {id(each): each for each in contests}.values() for route in contest.seconds.values()
    ]
    assert sum(timed) > 0
    assert seen[0] >= sum(timed) // 2 - len(timed)


def test_no_kernel_before_the_routes_of_products_are_known(by, seen):
    by(policy(), WHOLE, products=None)
    assert seen == [0]


@pytest.mark.parametrize("part", ["input_layernorm", "post_attention_layernorm", "mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("how", HOW)
def test_a_weight_that_changes_within_a_call_is_seen(part, how, by, seen):
    def change(model):
        scale_weight(model.model.layers[1].get_submodule(part), how)

    one, other = policy(), policy()
    expected = by(other, PARTS, lambda: change(other))
    changed = by(one, WHOLE, lambda: change(one))
    assert seen[0] == 2 * NUM_STEPS
    assert same(changed, expected)
    assert not same(changed, by(policy(), PARTS))


def test_a_weight_of_another_layout_runs_by_parts(by, seen):
    def change(model):
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data = weight.detach().t().contiguous().t()

    one, other = policy(), policy()
    expected = by(other, PARTS, lambda: change(other))
    changed = by(one, WHOLE, lambda: change(one))
    assert seen[0] == NUM_STEPS  # the other layer
    assert same(changed, expected)


@pytest.mark.parametrize("tensor", ["self_attn.q_proj.bias", "mlp.down_proj.bias"])
def test_a_bias_in_another_form_at_the_same_place_runs_by_parts(tensor, by, seen):
    def change(model):
        bias = model.model.layers[1].get_parameter(tensor)
        bias.data = bias.data[:1].expand(len(bias))

    name = "grouped heads and biases"
    one, other = policy(name), policy(name)
    expected = by(other, PARTS, lambda: change(other))
    changed = by(one, WHOLE, lambda: change(one))
    assert seen[0] == NUM_STEPS
    assert same(changed, expected)


def test_weights_that_are_no_parameters_run_by_parts(by, seen):
    def frozen():
        model = policy()
        norm = model.model.layers[1].input_layernorm
        weight = norm.weight.detach()
        del norm.weight
        norm.register_buffer("weight", weight)
        return model

    ours = by(frozen(), WHOLE)
    assert seen[0] == NUM_STEPS  # the other layer
    assert same(ours, by(policy(), PARTS))


def test_packed_copies_that_are_faster_are_used(by, seen):
    by(policy(), WHOLE, products=PACKED)
    # Without packed layers in this torch, another route has won.
    assert seen == [0 if packed_type(torch.float32) else 2 * NUM_STEPS]


def test_what_the_parts_run_is_looked_at_once(by, monkeypatch):
    """Every layer compares the stand-ins of its parts when they may have changed, not in every forward."""
    looks, own = [0], flat_layers.stand_ins_of

    def counted(modules):
        looks[0] += 1
        return own(modules)

    monkeypatch.setattr(flat_layers, "stand_ins_of", counted)
    after = []
    by(policy(), WHOLE, lambda: after.append(looks[0]))
    assert after[0] > 0
    assert after[1] == after[-1]


@pytest.mark.parametrize(
    "part", ["input_layernorm", "self_attn", "self_attn.o_proj", "mlp", "mlp.act_fn", "mlp.up_proj"]
)
def test_hooks_of_a_part_run(part, by, seen):
    (one, ours), (other, theirs) = (with_hook(policy(), part) for _ in range(2))
    changed = by(one, WHOLE)
    assert seen[0] == NUM_STEPS  # the layer without a hook
    assert same(changed, by(other, PARTS))
    assert len(ours) == len(theirs) > 0


def test_layers_that_drafters_look_at_keep_their_values(by, seen):
    def taps():
        return Taps(wants_layers=(0, 1, 2))

    model = policy()
    expected = by(model, PARTS, taps=taps)
    assert same(by(model, WHOLE, taps=taps), expected)
    assert seen[0] == 2 * NUM_STEPS


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "relu"])
def test_other_gates_run_by_parts(act, by, seen):
    model = build(LlamaForCausalLM, LlamaConfig(**LARGE, hidden_act=act), seed=3)
    assert same(by(model, WHOLE), by(model, PARTS))
    assert seen == [0]


def test_half_precision_and_gradients_have_the_policys_own_code(by, seen):
    by(policy().bfloat16(), WHOLE)
    assert seen == [0]
    model = policy()
    assert model(torch.arange(5)[None]).logits.requires_grad
    assert seen == [0]
