"""What a checkpoint folder holds: kinds of heads by configuration and tensors, and causal LMs that are not whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas_rl import AtlasRolloutEngine
from atlas_rl.speculators.causal_lm import load_causal_lm
from atlas_rl.speculators.identify import CAUSAL_LM, DFLASH, DSPARK, EAGLE3, MTP, kind_of
from tests.engines import draft_model, generate, policy, reference, tokenizer
from tests.models import tiny_gpt2, tiny_llama, tiny_qwen2
from tests.mtp import FAMILIES, PlainLayer, tiny_policy, write_checkpoint

HIDDEN = 32
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 1}
QUERY, TWICE = (
    {"layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN)},
    {"layers.0.self_attn.q_proj.weight": (HIDDEN, 2 * HIDDEN)},
)
FUSE_TWO, FUSE_THREE = {"fc.weight": (HIDDEN, 2 * HIDDEN)}, {"fc.weight": (HIDDEN, 3 * HIDDEN)}
REDUCED = {"d2t": (8,), "t2d": (64,)}


def layout(kind, **fields):
    return {"speculators_model_type": kind, "transformer_layer_config": LLAMA, "draft_vocab_size": 8, **fields}


KINDS = {
    "EAGLE-1 by its tensors": (LLAMA, FUSE_TWO | QUERY, "EAGLE-1"),
    "EAGLE-1 whatever it says": (LLAMA | {"draft_vocab_size": 64}, FUSE_TWO | QUERY, "EAGLE-1"),
    "EAGLE-1 of the speculators layout": (layout("eagle"), {"fusion_fc.weight": (HIDDEN, 2 * HIDDEN)}, "EAGLE-1"),
    "EAGLE-1 by its architecture": ({"architectures": ["EagleLlamaForCausalLM"], "model_type": "eagle"}, {}, "EAGLE-1"),
    "EAGLE-3 of the speculators layout": (layout("eagle3"), FUSE_THREE | TWICE | REDUCED, EAGLE3),
    "EAGLE-3 of the original layout": (LLAMA, {"midlayer.self_attn.q_proj.weight": (HIDDEN, 2 * HIDDEN)}, EAGLE3),
    "EAGLE-3 by how it reads": (LLAMA, FUSE_THREE | TWICE, EAGLE3),
    "EAGLE-3 over two layers": (LLAMA, FUSE_TWO | TWICE, EAGLE3),
    "EAGLE-3 by its architecture": (LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}, {}, EAGLE3),
    "P-EAGLE": (layout("peagle", mask_token_id=3), FUSE_THREE | TWICE | REDUCED, "P-EAGLE"),
    "P-EAGLE that calls itself EAGLE-3": (layout("eagle3"), FUSE_THREE | TWICE | {"mask_hidden": (1, 96)}, "P-EAGLE"),
    "DFlash": (layout("dflash", mask_token_id=3), FUSE_THREE | QUERY | {"hidden_norm.weight": (HIDDEN,)}, DFLASH),
    "DFlash 2": (layout("dflash2"), {}, "DFlash 2"),
    "DFlash 2, flat": (
        {"architectures": ["DFlash2DraftModel"], "model_type": "qwen3", "dflash_config": {"selector_rank": 4}},
        {},
        "DFlash 2",
    ),
    "DFlash 2 by its tensors": (
        {"architectures": ["DFlashDraftModel"]},
        {"selector.predecessor_codebook": (64, 4)},
        "DFlash 2",
    ),
    "LiLiCorr": ({"architectures": ["LiLiCorrDraftModel"], "dflash_config": {"mask_token_id": 3}}, {}, "LiLiCorr"),
    "DFlash, flat": ({"model_type": "qwen3", "dflash_config": {"mask_token_id": 3}}, {}, DFLASH),
    "DFlash by its tensors": (LLAMA, FUSE_THREE | QUERY | {"hidden_norm.weight": (HIDDEN,)}, DFLASH),
    "DSpark that calls itself DFlash": ({"architectures": ["DFlashDraftModel"], "markov_rank": 4}, {}, DSPARK),
    "DSpark": (layout("dspark", markov_rank=4), {}, DSPARK),
    "DSpark by its tensors": (LLAMA, {"markov_head.markov_w1.weight": (64, 4)}, DSPARK),
    "Medusa": ({"medusa_num_heads": 3, "medusa_num_layers": 1}, {"0.0.linear.weight": (HIDDEN, HIDDEN)}, "Medusa"),
    "Medusa for vLLM": ({"model_type": "medusa"}, {"blocks.0.layers.0.weight": (HIDDEN, HIDDEN)}, "Medusa"),
    "MTP": ({"architectures": ["DeepSeekMTPModel"], "model_type": "deepseek_mtp"}, {}, "MTP"),
    "MTP by its tensors": (LLAMA, {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)}, "MTP"),
    "MLP speculator": ({"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator"}, {}, "MLP"),
    "a kind that is new": (layout("jetspec"), {}, "a speculator of the kind 'jetspec'"),
    "null fields": (
        LLAMA | {"draft_vocab_size": None, "speculators_model_type": None, "dflash_config": None},
        {},
        CAUSAL_LM,
    ),
}


def write(folder, config, shapes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shapes:
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", KINDS)
def test_kinds_are_told_apart(tmp_path, case):
    config, shapes, kind = KINDS[case]
    folder = write(tmp_path / "head", config, shapes)
    assert kind in kind_of(folder)
    if kind == "MTP":
        with pytest.raises(ValueError, match="no MTP layer in"):
            generate(AtlasRolloutEngine(model=policy(), draft_model=folder, console=False))
    elif kind not in (EAGLE3, DFLASH, DSPARK, CAUSAL_LM):
        with pytest.raises(ValueError, match=rf"holds .*{kind}.*give the folder of an EAGLE-3 or DFlash head, or of a"):
            AtlasRolloutEngine(model=policy(), draft_model=folder, console=False)


def test_medusa_heads_are_known_by_their_file(tmp_path):
    torch.save({}, tmp_path / "medusa_lm_head.pt")
    assert "Medusa" in kind_of(tmp_path)


@pytest.mark.parametrize("described", ["x", [1], 3])
def test_a_config_without_the_form_of_its_layout_is_named(tmp_path, described):
    with pytest.raises(ValueError, match=r"config.json': speculators_config must be an object"):
        kind_of(write(tmp_path / "head", {"speculators_config": described}, {}))


def test_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is missing.*adapter: merge it"):
        kind_of(tmp_path)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2])
@pytest.mark.parametrize("as_pickle", [False, True])
def test_a_whole_causal_lm_is_one(tmp_path, build, as_pickle):
    model = build(layers=1)
    model.save_pretrained(tmp_path)
    if as_pickle:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    assert kind_of(tmp_path) == CAUSAL_LM
    loaded = load_causal_lm(tmp_path, torch.float32)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_with_its_mtp_layer_is_a_causal_lm_and_the_layer_alone_is_none(tmp_path, family):
    model = tiny_policy(family)
    layer = PlainLayer(family, model)
    whole = write_checkpoint(tmp_path / "whole", model, layer)
    assert any("language_model." in name for name in load_file(whole / "model.safetensors")) == ("," in family)
    assert kind_of(whole) == CAUSAL_LM
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((whole / "config.json").read_text())
    save_file(layer.tensors(), alone / "model.safetensors")
    assert kind_of(alone) == MTP
    save_file(
        {f"model.language_model.{name}": tensor for name, tensor in layer.tensors().items()},
        alone / "model.safetensors",
    )
    assert kind_of(alone) == MTP


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


NORM = "model.norm.weight"
INCOMPLETE = {
    "no LM head": (without("lm_head.weight"), "lm_head.weight is missing"),
    "no head and no norm": (without("lm_head.weight", NORM), f"lm_head.weight, {NORM} are missing"),
    "something else in it": (lambda t: t | {"score.weight": torch.ones(1, 32)}, "score.weight is unknown"),
    "another shape": (lambda t: t | {NORM: torch.ones(16)}, f"{NORM} is of another shape"),
    "NaN": (lambda t: t | {NORM: torch.full((32,), torch.nan)}, f"NaN or infinity in '{NORM}'"),
    "infinity": (
        lambda t: t | {"lm_head.weight": torch.full((64, 32), torch.inf)},
        "NaN or infinity in 'lm_head.weight'",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_causal_lm_that_is_not_whole_is_refused(tmp_path, case):
    change, message = INCOMPLETE[case]
    draft_model().save_pretrained(tmp_path)
    save_file(
        change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(model=policy(), draft_model=tmp_path, console=False)


def test_other_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="model of type 't5', no causal LM"):
        load_causal_lm(write(tmp_path / "t5", {"model_type": "t5"}, {}), torch.float32)
    with pytest.raises(ValueError, match="give a causal LM that it knows"):
        load_causal_lm(write(tmp_path / "new", {"model_type": "of tomorrow"}, {}), torch.float32)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_causal_lm(write(tmp_path / "bare", LLAMA, {}), torch.float32)
    draft_model().save_pretrained(tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        load_causal_lm(tmp_path / "cut", torch.float32)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("rows", [56, 72])
def test_a_draft_lm_that_is_padded_differently_drafts(tmp_path, rows, verification):
    tiny_llama(vocab=rows, layers=1, seed=12).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    options = {"console": False, "verification": verification, "tokenizer": tokenizer()}
    output = generate(AtlasRolloutEngine(model=policy(), draft_model=tmp_path, **options))
    assert output.report.drafted["draft_lm"] > 0
    if verification == "invariant":
        assert output.completion_ids == reference().completion_ids
