"""What a configuration says: which policies are refused, how far they reach, and how long their context is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaConfig, LlamaForCausalLM

from atlas_rl import AtlasRolloutEngine
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.supported import fields_of, reach_of
from atlas_rl.policy.view import InProcessView
from atlas_rl.training.eagle3 import TrainSettings, new_head
from benchmarks.tiny_policies import build, tiny_config
from tests.models import tiny_gpt2
from tests.policy.texts import generate, plain

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old names": {"type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn after scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "llama3": {"rope_type": "llama3", "factor": 4.0, **LLAMA3},
}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", SCALED)
def test_scaled_positions_reach_as_far_as_transformers_goes(rope, form):
    """16 positions and a factor of 4 give 40 new tokens, those of transformers' own greedy generation."""
    options = {form: dict(SCALED[rope]), "max_position_embeddings": 16}
    if form == "rope_parameters":
        options[form]["rope_theta"] = 1e4
    model = build("llama", **options)
    assert InProcessRunner(model).max_context == 64
    expected = model.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert generate(model, [[5, 9, 2]], 40) == [expected[0, 3:].tolist()]


def test_learned_positions_are_a_hard_limit():
    model = tiny_gpt2(context=32)
    model.config.rope_scaling = {"type": "linear", "factor": 4.0}
    assert InProcessRunner(model).max_context == 32


@pytest.mark.parametrize("none", [0, -1])
def test_a_policy_may_say_that_its_positions_have_no_end(none):
    model = build("llama")
    model.config.max_position_embeddings = none
    assert InProcessRunner(model).max_context is None


def test_unscaled_positions_end_where_the_configuration_says():
    assert InProcessRunner(build("llama")).max_context == 128


LENGTH = {
    "rope type 'dynamic'": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
                                      "max_position_embeddings": 24}),
    "rope type 'longrope'": ("phi3", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 24},
                                      "original_max_position_embeddings": 24}),
    r"chunked attention \(attention_chunk_size=24\)": ("llama4_text", {"attention_chunk_size": 24}),
    r"mask hides other tokens \(sliding_window=24\)": ("phimoe", {"sliding_window": 24}),
}  # fmt: skip


@pytest.mark.parametrize("cause", LENGTH)
def test_what_depends_on_length_is_right_up_to_there_and_refused_beyond(cause):
    model_type, options = LENGTH[cause]
    model = build(model_type, **options)
    prompts = [[5, 9, 2], list(range(3, 16))]
    assert generate(model, prompts, 12) == plain(model, prompts, 12)  # 13 + 12 tokens, the last of which is not run
    with pytest.raises(ValueError, match=rf"up to 24 tokens.*{cause}.*may reach 25: lower max_new_tokens"):
        generate(model, prompts, 13)
    with pytest.raises(ValueError, match=cause):  # a short request beside a long one
        generate(model, [[5, 9, 2], list(range(3, 33))], 2)


def test_settings_are_read_in_every_form():
    def reach(**options):
        found = reach_of(LlamaConfig(hidden_size=32, num_attention_heads=4, **options))
        return found.tokens if found else None

    assert reach(max_position_embeddings=64) is None
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert reach(max_position_embeddings=64, rope_scaling=dynamic) == 64
    assert reach(max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0}) == 64
    longrope = {**LONGROPE, "original_max_position_embeddings": 32}
    assert reach(max_position_embeddings=64, rope_parameters=longrope) == 32
    nested = tiny_config("gemma3_text")
    nested.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": longrope,
    }
    assert reach_of(nested).tokens == 32


def test_fields_that_differ_between_layers_are_read_from_the_layers():
    config = tiny_config("gemma4_text", global_head_dim=16)
    assert sorted(fields_of(config, "head_dim")) == [8, 16]
    assert fields_of(config, "hidden_size") == [32]


@pytest.mark.parametrize(("model_type", "head_dim"), [("gemma4_text", 8), ("gemma3_text", 8), ("gemma3n_text", 8)])
def test_a_head_is_made_for_policies_whose_layers_differ(model_type, head_dim):
    model = build(model_type)
    head = new_head(InProcessView(model), TrainSettings(layers=(1, 2, 3)), np.arange(60))
    assert head.config.layer.head_dim == head_dim
    assert head.config.layer.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("kind", ["linear_attention", "conv"])
def test_other_layer_types_are_refused_at_construction(kind):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.layer_types = ["full_attention", kind]
    with pytest.raises(ValueError, match=f"layers of type '{kind}'"):
        AtlasRolloutEngine(model=LlamaForCausalLM(config), console=False)


# ---------------------------------------------------------------------------------------------------- modules that are none


def scripted(model):
    model.model.layers[0].mlp.act_fn = torch.jit.script(torch.nn.SiLU())
    return model


AWAY = {
    "meta": lambda model: model.to("meta"),
    "cpu_offload": lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
    "one weight": lambda model: model.model.norm.to("meta") and model,
}


@pytest.mark.parametrize("away", AWAY)
def test_a_policy_whose_weights_are_elsewhere_is_refused_before_any_work(away):
    with pytest.raises(ValueError, match=r"weights that are not in memory \(.* is on device 'meta'\)"):
        AtlasRolloutEngine(model=AWAY[away](build("llama")), console=False)


def test_weights_that_are_offloaded_later_are_noticed_at_the_next_call():
    model = build("llama")
    engine = AtlasRolloutEngine(model=model, console=False, speculation=False)
    engine.generate([[2, 3]], max_new_tokens=2, eos_token_ids=())
    model.to("meta")
    with pytest.raises(ValueError, match="weights that are not in memory"):
        engine.generate([[2, 3]], max_new_tokens=2, eos_token_ids=())


@pytest.mark.parametrize("training", [False, True])
def test_a_scripted_module_is_refused_by_name(training):
    with pytest.raises(ValueError, match=r"compiled by torch.jit \(model.layers.0.mlp.act_fn\)"):
        AtlasRolloutEngine(model=scripted(build("llama").train(training)), console=False)
