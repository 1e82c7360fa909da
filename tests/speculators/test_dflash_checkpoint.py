"""DFlash checkpoints: what is read right in either layout, and what is refused by name at load, never in a rollout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.policy.view import InProcessView
from atlas_rl.rollout.backends import vllm_draft_folder
from atlas_rl.speculators.dflash.checkpoint import dflash_layers, load_dflash, save_dflash
from atlas_rl.speculators.dflash.config import Span
from atlas_rl.speculators.dflash.head import DFlashHead
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.speculators.eagle3.checkpoint import load_eagle3
from atlas_rl.speculators.static_heads import head_layers, head_speculator
from atlas_rl.training.head_shape import dflash_config
from tests.dflash import BLOCK_SIZE, MASK, SHAPE, head_for, random_tensors, write_checkpoint, write_dspark, write_nested
from tests.models import tiny_llama


@cache
def view():
    return InProcessView(tiny_llama(layers=4, seed=11))


def dflash(**fields):
    return {"dflash_config": SHAPE["dflash_config"] | fields}


def with_tables(**more):
    return random_tensors() | {"embed_tokens.weight": torch.ones(64, 32), "lm_head.weight": torch.ones(64, 32), **more}


def test_a_checkpoint_of_either_layout_is_read(tmp_path):
    head = load_dflash(write_checkpoint(tmp_path / "flat"), view())
    for name, tensor in random_tensors().items():
        assert torch.equal(head.state_dict()[name], tensor), name
    assert (head.embed_tokens, head.lm_head, head.token_ids) == (None, None, None)
    nested = load_dflash(write_nested(tmp_path / "nested", with_tables()), view())
    for config in (head.config, nested.config):
        assert config.layers == (1, 3)
        assert (config.block_size, config.mask_token_id, config.max_draft_tokens) == (BLOCK_SIZE, MASK, BLOCK_SIZE - 1)
        assert config.spans == (Span(), Span())
    assert dflash_layers(tmp_path / "flat", 4) == head_layers(tmp_path / "nested", 4) == (1, 3)
    assert isinstance(head_speculator(tmp_path / "flat"), DFlashSpeculator)
    assert vllm_draft_folder(AtlasRolloutEngine(draft_model=tmp_path / "flat", console=False).config) is not None


def test_names_with_a_prefix_and_tensors_of_the_verifier_are_read(tmp_path):
    tensors = {f"model.{name}": tensor for name, tensor in random_tensors().items()}
    tensors["verifier_norm.weight"] = torch.ones(32)
    head = load_dflash(write_checkpoint(tmp_path / "head", tensors), view())
    assert torch.equal(head.fc.weight, random_tensors()["fc.weight"])


def test_newer_checkpoints_have_the_block_size_elsewhere(tmp_path):
    folder = write_checkpoint(tmp_path / "head", block_size=..., **dflash(block_size=4))
    assert load_dflash(folder, view()).config.block_size == 4


def test_null_fields_count_as_absent(tmp_path):
    nulls = {"quantization_config": None, "target_hidden_size": None, "num_target_layers": None, "is_causal": None}
    assert load_dflash(write_checkpoint(tmp_path / "head", **nulls, **dflash(causal=None)), view()).config.layers == (
        1,
        3,
    )


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("fields", "spans"),
    [
        (WINDOWS, (Span(8, True), Span())),
        (WINDOWS | {"is_causal": False}, (Span(8), Span())),
        (WINDOWS | dflash(swa_window_size=5), (Span(5, True), Span())),
        (dflash(use_swa=True, swa_window_size=5), (Span(5), Span(5))),
        (dflash(causal=True), (Span(None, True), Span(None, True))),
        ({"is_causal": False} | dflash(causal=True), (Span(), Span())),
    ],
)
def test_windows_and_causality_are_resolved_as_vllm_does(fields, spans, tmp_path):
    """`_resolve_layer_attention` of its `qwen3_dflash.py`."""
    assert load_dflash(write_checkpoint(tmp_path / "head", **fields), view()).config.spans == spans


def test_windows_of_the_speculators_layout_are_those_of_its_training(tmp_path):
    for non_causal in (True, False):
        folder = write_nested(tmp_path / "head", with_tables(), WINDOWS, sliding_window_non_causal=non_causal)
        assert load_dflash(folder, view()).config.spans == (Span(8, not non_causal), Span())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_head_that_was_written_comes_back(rank, tmp_path):
    shape = dflash_config(view(), (1, 3), num_layers=2, block_size=4, mask_token_id=MASK, markov_rank=rank)
    head = DFlashHead(shape)
    save_dflash(tmp_path, head, 4)
    again = load_dflash(tmp_path, view())
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16().float()), name
    assert again.config.layer.to_dict() | {"dtype": None} == head.config.layer.to_dict() | {"dtype": None}
    assert replace(again.config, layer=head.config.layer) == head.config


def without(*names):
    return {name: tensor for name, tensor in random_tensors().items() if name not in names}


SCALED = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
REFUSED = {
    "no width": ({"hidden_size": ...}, "describes no DFlash head: hidden_size missing"),
    "no head size": ({"head_dim": None}, "describes no DFlash head: head_dim missing"),
    "a size as text": ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
    "another type": ({"model_type": "llama"}, "layers are of the type 'llama', and those of qwen3"),
    "hybrid layers": ({"layer_types": ["linear_attention", "full_attention"]}, "layers of the type 'linear_attention'"),
    "too few types": ({"layer_types": ["full_attention"]}, "layer_types|layer types"),
    "dflash_config as text": ({"dflash_config": "x"}, "dflash_config must be an object"),
    "an unknown field": (dflash(selector_rank=4), "dflash_config has selector_rank, which may change the head"),
    "no target layers": (
        {"dflash_config": {"mask_token_id": 3}},
        "target_layer_ids must list decoder layers by number",
    ),
    "target layers as text": (dflash(target_layer_ids=["0"]), "must list decoder layers by number"),
    "layers out of order": (dflash(target_layer_ids=[2, 0]), r"must ascend, got \[2, 0\]"),
    "a layer twice": (dflash(target_layer_ids=[2, 2]), "must ascend"),
    "layer -1": (dflash(target_layer_ids=[-1, 2]), "names layer -1, the policy has 4"),
    "layer 9": (dflash(target_layer_ids=[0, 9]), "names layer 9, the policy has 4"),
    "the last layer": (dflash(target_layer_ids=[0, 3]), "output of the policy's last layer"),
    "other layers elsewhere": ({"eagle_aux_hidden_state_layer_ids": [0, 2]}, "leave out the wrong ones"),
    "a policy of six layers": ({"num_target_layers": 6}, "for a policy of 6 layers, this one has 4"),
    "no block size": ({"block_size": None}, "has no block_size"),
    "two block sizes": (dflash(block_size=4), "has the block sizes 6 and 4"),
    "blocks of one": ({"block_size": 1}, "block_size must be at least 2"),
    "no mask token": (
        {"dflash_config": {"target_layer_ids": [0, 2]}},
        "mask_token_id must be a token's number, got None",
    ),
    "a mask token without embedding": (dflash(mask_token_id=64), "token 64 .*embeddings of 64 tokens"),
    "another vocabulary": ({"vocab_size": 70}, "vocabulary of 70, the policy has one of 64"),
    "another policy's width": ({"target_hidden_size": 48}, "reads a hidden size of 48, the policy has 32"),
    "the last state only": (dflash(use_aux_hidden_state=False), "use_aux_hidden_state"),
    "sinks": (dflash(attention_sink_bias=True), "attention has sinks"),
    "scaled values": (dflash(attention_value_scale=0.6), "scales its values"),
    "interleaved pairs": ({"is_neox_style": False}, "rotary pairs interleave"),
    "scaled logits": ({"logit_scale": 2.0}, "scales its logits"),
    "a part rotated": ({"partial_rotary_factor": 0.5}, "rotates a part of each head"),
    "positions of three dimensions": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "positions have three dimensions",
    ),
    "rotations by type": ({"rope_parameters": {"full_attention": SCALED}}, "differ by type of layer"),
    "no rotary base": ({"rope_theta": ...}, "does not say its rotary base"),
    "a window of no size": (dflash(use_swa=True), "attend to a window, and its size .* is None"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
    "a reduced vocabulary without a head": ({"draft_vocab_size": 60}, "drafts 60 of 64 tokens and has no LM head"),
    "biases it says and lacks": ({"attention_bias": True}, "q_proj.bias is missing"),
    "another width of its layers": ({"intermediate_size": 64}, r"gate_proj.weight is \[48, 32\] instead of \[64, 32\]"),
    "no norm": ({"tensors": without("norm.weight")}, "norm.weight is missing"),
    "something unknown": ({"tensors": without() | {"gate.weight": torch.ones(1)}}, "gate.weight is unknown"),
    "fc for other layers": ({"tensors": without() | {"fc.weight": torch.ones(32, 96)}}, r"instead of \[32, 64\]"),
    "NaN": ({"tensors": without() | {"norm.weight": torch.full((32,), torch.nan)}}, "NaN or infinity in 'norm.weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_draft_is_refused_at_load(case, tmp_path):
    changes, message = REFUSED[case]
    folder = write_checkpoint(tmp_path / "head", **changes)
    with pytest.raises(ValueError, match=message):
        load_dflash(folder, view())
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(model=view().model, draft_model=folder, console=False)


NARROW = {"hidden_size": 16, "target_hidden_size": 32}
REFUSED_NESTED = {
    "no layers": ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids must list decoder layers"),
    "the last layer": ({"aux_hidden_state_layer_ids": [1, 4]}, "output of the policy's last layer"),
    "windows of unknown kind": ({"layer": WINDOWS, "sliding_window_non_causal": None}, "windows are causal"),
    "a layer as text": ({"transformer_layer_config": "qwen3"}, "transformer_layer_config must be an object"),
    "d2t that reorders": (
        {"tensors": with_tables(d2t=torch.tensor([1, -1] + [0] * 62))},
        "reorders the policy's tokens",
    ),
    "no d2t": ({"draft_vocab_size": 60, "tensors": with_tables()}, "drafts 60 of 64 tokens and lacks d2t"),
    "narrow without tables": ({"layer": NARROW, "tensors": random_tensors()}, "16 wide, the policy 32.* no embedding"),
}


@pytest.mark.parametrize("case", REFUSED_NESTED)
def test_what_cannot_draft_in_the_speculators_layout_is_refused(case, tmp_path):
    changes, message = REFUSED_NESTED[case]
    changes = {"tensors": with_tables()} | changes
    with pytest.raises(ValueError, match=message):
        load_dflash(write_nested(tmp_path / "head", **changes), view())


MARKOV = {"markov_head.markov_w1.weight": torch.ones(64, 4), "markov_head.markov_w2.weight": torch.ones(64, 4)}


def test_dspark_heads_of_either_layout_are_read(tmp_path):
    flat = load_dflash(write_dspark(tmp_path / "flat", random_tensors() | MARKOV), view()).config
    fields = {"speculators_model_type": "dspark", "markov_rank": 4}
    nested = load_dflash(write_nested(tmp_path / "nested", with_tables(**MARKOV), **fields), view()).config
    assert (flat.samples_anchor, flat.max_draft_tokens) == (True, BLOCK_SIZE)
    assert (nested.samples_anchor, nested.max_draft_tokens) == (False, BLOCK_SIZE - 1)
    assert (flat.layers, flat.markov_rank) == (nested.layers, nested.markov_rank) == ((1, 3), 4)


REFUSED_DSPARK = {
    "a gated head": ({"markov_head_type": "gated"}, "Markov head is of the type 'gated'"),
    "no rank": ({"markov_rank": None}, "markov_rank must be a whole number of at least 0, got None"),
    "another rank": ({"markov_rank": 8}, r"markov_w1.weight is \[64, 4\] instead of \[64, 8\]"),
    "another family": ({"model_type": "deepseek_v4"}, "layers are of the type 'deepseek_v4'"),
    "no size": ({"head_dim": None}, "describes no DSpark head: head_dim missing"),
}


@pytest.mark.parametrize("case", REFUSED_DSPARK)
def test_dspark_heads_that_cannot_draft_are_refused(case, tmp_path):
    changes, message = REFUSED_DSPARK[case]
    with pytest.raises(ValueError, match=message):
        load_dflash(write_dspark(tmp_path / "head", random_tensors() | MARKOV, **changes), view())


def test_a_dspark_head_says_which_position_predicts(tmp_path):
    fields = {"speculators_model_type": "dspark", "markov_rank": 4, "sample_from_anchor": None}
    with pytest.raises(ValueError, match="does not say which position predicts"):
        load_dflash(write_nested(tmp_path / "head", with_tables(**MARKOV), **fields), view())


def test_a_dflash_head_may_predict_from_the_newest_token_on(tmp_path):
    config = load_dflash(write_checkpoint(tmp_path / "head", **dflash(sample_from_anchor=True)), view()).config
    assert (config.first_place, config.max_draft_tokens) == (0, BLOCK_SIZE)


def test_a_mask_embedding_of_its_own_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "head")
    torch.save(torch.ones(32), folder / "mask_embedding.pt")
    with pytest.raises(ValueError, match="an embedding of its own for the mask token"):
        load_dflash(folder, view())


def test_a_head_of_another_kind_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "head")
    with pytest.raises(ValueError, match="holds a DFlash head, no EAGLE-3 head"):
        load_eagle3(folder, view())
    view().model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="holds a causal LM, no DFlash head"):
        load_dflash(tmp_path / "policy", view())
    with pytest.raises(ValueError, match="there is no such folder"):
        load_dflash(tmp_path / "nowhere", view())


def test_a_damaged_file_is_named(tmp_path):
    path = write_checkpoint(tmp_path / "head") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        load_dflash(tmp_path / "head", view())


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uses the policy's embedding"):
        save_dflash(tmp_path, load_dflash(write_nested(tmp_path / "nested", with_tables()), view()), 4)
    with pytest.raises(ValueError, match="predict their own positions"):
        save_dflash(tmp_path, head_for(view().model, **dflash(sample_from_anchor=True)), 4)
    causal = head_for(view().model, **dflash(causal=True))
    with pytest.raises(ValueError, match="see all of the context"):
        save_dflash(tmp_path, causal, 4)
