"""EAGLE-3 checkpoints: what is read right in either layout, and what is refused by name at load, never in a rollout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.eagle3.checkpoint import eagle3_layers, load_eagle3, save_eagle3
from atlas_rl.speculators.eagle3.config import Eagle3Config, default_layers, new_layers
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.training.eagle3 import TrainSettings, new_head
from atlas_rl.training.head_shape import head_config
from tests.models import tiny_bigram

LAYERS, IDS = (1, 2, 3), np.r_[0:20, 24:64].astype(np.int64)
LAYERS_FIELD = "eagle_aux_hidden_state_layer_ids"


def policy():
    return tiny_bigram(layers=4, seed=11)


@pytest.fixture(scope="module")
def view():
    return InProcessView(policy())


@pytest.fixture
def folder(view, tmp_path):
    save_eagle3(tmp_path, new_head(view, TrainSettings(layers=LAYERS), IDS), view.model)
    return tmp_path


def edit(folder, tensors=None, flat=False, **config):
    """Change the config's fields (`...` deletes one) and the tensors; `flat` rewrites it in the original layout."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    if flat:
        own = {name: settings[name] for name in ("draft_vocab_size", LAYERS_FIELD)}
        settings = settings["transformer_layer_config"] | own | {"architectures": ["LlamaForCausalLMEagle3"]}
    settings = {name: value for name, value in (settings | config).items() if value is not ...}
    path.write_text(json.dumps(settings))
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def replaced(**tensors):
    return lambda old: old | tensors


def without(*names):
    return lambda old: {name: tensor for name, tensor in old.items() if name not in names}


OFFSETS = torch.from_numpy(IDS - np.arange(len(IDS)))
REFUSED = {
    "d2t out of range": ({"tensors": replaced(d2t=OFFSETS + 10)}, "d2t leads out of the policy's 64 tokens"),
    "d2t below zero": ({"tensors": replaced(d2t=OFFSETS - 1)}, "d2t leads out"),
    "d2t of ids": ({"tensors": replaced(d2t=torch.from_numpy(IDS))}, "offsets, not ids"),
    "d2t of ids within range, no t2d": (
        {
            "tensors": lambda old: (
                without("t2d")(old)
                | {"d2t": torch.arange(0, 20, 2), "lm_head.weight": old["lm_head.weight"][:10].clone()}
            ),
            "draft_vocab_size": 10,
        },
        "d2t can be read as offsets and as token ids. Add t2d",
    ),
    "d2t twice": (
        {"tensors": replaced(d2t=torch.cat([torch.ones(1, dtype=torch.int64), OFFSETS[1:]]))},
        "more than once",
    ),
    "d2t against t2d": ({"tensors": replaced(t2d=torch.arange(64) < 60)}, "d2t and t2d name different tokens"),
    "d2t of floats": ({"tensors": replaced(d2t=OFFSETS.float())}, "60 whole numbers, got float32"),
    "d2t too short": ({"tensors": replaced(d2t=OFFSETS[:-1].clone())}, r"60 whole numbers, got int64 of shape \[59\]"),
    "t2d too short": ({"tensors": replaced(t2d=torch.ones(60, dtype=torch.bool))}, "t2d must hold true or false"),
    "no d2t": ({"tensors": without("d2t", "t2d")}, "drafts 60 of 64 tokens and lacks d2t"),
    "no LM head": ({"tensors": without("lm_head.weight")}, "no LM head"),
    "no norm": ({"tensors": without("norm.weight")}, "norm.weight is missing"),
    "NaN": ({"tensors": replaced(**{"norm.weight": torch.full((32,), torch.nan)})}, "NaN or infinity in 'norm.weight'"),
    "one row too many": (
        {"tensors": replaced(**{"lm_head.weight": torch.ones(61, 32)})},
        r"lm_head.weight is \[61, 32\] instead of \[60, 32\]",
    ),
    "null draft vocabulary": ({"draft_vocab_size": None}, "no draft_vocab_size"),
    "no draft vocabulary": ({"draft_vocab_size": ...}, "no draft_vocab_size"),
    "draft vocabulary of 0": ({"draft_vocab_size": 0}, "draft_vocab_size must be a whole number of at least 1"),
    "draft vocabulary as text": ({"draft_vocab_size": "60"}, "draft_vocab_size must be a whole number"),
    "layer -1": ({LAYERS_FIELD: [1, 2, -1]}, "names layer -1: the policy has 4, and .* counted from 0 to 3"),
    "layer 4": ({LAYERS_FIELD: [1, 2, 4]}, "names layer 4"),
    "a layer twice": ({LAYERS_FIELD: [1, 2, 2]}, "names a layer twice"),
    "layers as text": ({LAYERS_FIELD: ["1", "2", "3"]}, "must list decoder layers by number"),
    "no layers in a small policy": (
        {LAYERS_FIELD: None},
        f'a policy of 4 has not the usual ones: add "{LAYERS_FIELD}"',
    ),
    "two layers, as it says": ({LAYERS_FIELD: [1, 2]}, r"fc.weight is \[32, 96\] instead of \[32, 64\]"),
    "no layer": ({"transformer_layer_config": None}, "describes no EAGLE-3 head: hidden_size"),
    "a layer as text": ({"transformer_layer_config": "llama"}, "transformer_layer_config must be an object"),
    "eagle_config as text": ({"eagle_config": "x"}, "eagle_config must be an object"),
    "the last state only": ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "a flag as text": ({"norm_output": "false"}, "norm_output must be true or false"),
    "norms it says and lacks": ({"fc_norm": True}, "fc_norm.0.weight is missing"),
    "norms it has and denies": (
        {"tensors": replaced(**{"input_norm.weight": torch.ones(96)})},
        "input_norm.weight is unknown",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_draft_is_refused_at_load(view, folder, case):
    changes, message = REFUSED[case]
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_eagle3(folder, view)
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(model=view.model, draft_model=folder, console=False)


def test_two_layers_or_another_type_are_refused(view, folder):
    layer = json.loads((folder / "config.json").read_text())["transformer_layer_config"]
    for change, message in (
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"model_type": "deepseek_v3"}, "of the type 'deepseek_v3'"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
    ):
        edit(folder, transformer_layer_config=layer | change)
        with pytest.raises(ValueError, match=message):
            load_eagle3(folder, view)


@pytest.mark.parametrize("flat", [False, True])
def test_null_fields_count_as_absent(view, folder, flat):
    nulls = {"eagle_config": None, "target_hidden_size": None, "norm_before_fc": None, "speculators_version": None}
    edit(folder, flat=flat, **nulls)
    assert load_eagle3(folder, view).config.layers == LAYERS
    assert eagle3_layers(folder, 4) == LAYERS


@pytest.mark.parametrize("draft_vocab_size", [None, ...])
def test_a_head_over_the_whole_vocabulary_needs_no_size(view, tmp_path, draft_vocab_size):
    save_eagle3(tmp_path, new_head(view, TrainSettings(layers=LAYERS), np.arange(64)), view.model)
    edit(tmp_path, tensors=without("d2t", "t2d"), draft_vocab_size=draft_vocab_size)
    head = load_eagle3(tmp_path, view)
    assert head.config.draft_vocab_size == 64
    assert torch.equal(head.token_ids, torch.arange(64))


def test_either_of_d2t_and_t2d_is_enough(view, folder):
    edit(folder, tensors=without("t2d"))
    assert torch.equal(load_eagle3(folder, view).token_ids, torch.from_numpy(IDS))
    edit(
        folder,
        tensors=lambda old: (
            without("d2t")(old) | {"t2d": torch.zeros(64).bool().scatter(0, torch.from_numpy(IDS), True)}
        ),
    )
    assert torch.equal(load_eagle3(folder, view).token_ids, torch.from_numpy(IDS))


def test_the_residual_is_normed_by_default_in_the_speculators_layout_only(view, folder):
    """As vLLM has it (transformers_utils/configs/speculators/algos.py and models/llama_eagle3.py)."""
    edit(folder, norm_before_residual=...)
    assert load_eagle3(folder, view).config.norm_before_residual
    edit(folder, flat=True)
    assert not load_eagle3(folder, view).config.norm_before_residual
    edit(folder, norm_before_residual=True)
    assert load_eagle3(folder, view).config.norm_before_residual


def test_layers_are_read_in_ascending_order(view, folder):
    edit(folder, **{LAYERS_FIELD: [3, 1, 2]})
    assert load_eagle3(folder, view).config.layers == LAYERS


def test_layers_of_new_heads_exist_and_differ():
    assert new_layers(32) == default_layers(32) == (2, 16, 29)
    for num_layers in range(1, 12):
        layers = new_layers(num_layers)
        assert len(layers) == min(3, num_layers)
        assert list(layers) == sorted(set(layers))
        assert 0 <= layers[0] <= layers[-1] < num_layers


def full_head(view, **options):
    shape = head_config(view, LAYERS, len(IDS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        head = Eagle3Head(Eagle3Config(shape.layer, len(IDS), LAYERS, **options))
        for parameter in head.parameters():  # norms that do nothing would hide a norm that is left out
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    head.set_vocabulary(torch.from_numpy(IDS))
    return head.bfloat16().float()


def one_step(head, options, states, embeddings):
    """A head's first prediction for a single position, written out; attention over one position is its value."""

    def norm(weight, x):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    w = head.state_dict()
    parts = [states[n] for n in LAYERS]
    if options.get("norm_before_fc"):
        parts = list(norm(w["input_norm.weight"], torch.cat(parts, -1)).chunk(3, -1))
    if options.get("fc_norm"):
        parts = [norm(w[f"fc_norm.{n}.weight"], part) for n, part in enumerate(parts)]
    feature = torch.cat(parts, -1) @ w["fc.weight"].T
    normed = norm(w["layers.0.hidden_norm.weight"], feature)
    x = torch.cat([norm(w["layers.0.input_layernorm.weight"], embeddings), normed], -1)
    value = x @ w["layers.0.self_attn.v_proj.weight"].T
    value = value.view(-1, 2, 8).repeat_interleave(2, 1).flatten(1)
    x = (normed if options.get("norm_before_residual") else feature) + value @ w["layers.0.self_attn.o_proj.weight"].T
    y = norm(w["layers.0.post_attention_layernorm.weight"], x)
    gate, up = (y @ w[f"layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    x = x + (torch.nn.functional.silu(gate) * up) @ w["layers.0.mlp.down_proj.weight"].T
    logits = norm(w["norm.weight"], x) @ w["lm_head.weight"].T
    return (norm(w["norm.weight"], x) if options.get("norm_output") else x), logits


VARIANTS = [
    {}, {"norm_before_residual": True}, {"norm_before_fc": True}, {"fc_norm": True}, {"norm_output": True},
    {"norm_before_residual": True, "norm_before_fc": True, "fc_norm": True, "norm_output": True},
]  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "+".join(options) or "plain")
def test_heads_of_each_variant_come_back_and_run_as_written_out(view, tmp_path, options, flat):
    given = full_head(view, **options)
    save_eagle3(tmp_path, given, view.model)
    if flat:
        edit(tmp_path, flat=True, **dict.fromkeys(options, True))
    head = load_eagle3(tmp_path, view)
    for name, tensor in given.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name
    generator = torch.Generator().manual_seed(1)
    states = {n: torch.randn(5, 32, generator=generator) for n in LAYERS}
    embeddings = torch.randn(5, 32, generator=generator)

    def attend(query, key, value):
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)

    with torch.no_grad():
        feature = head.fuse(states)
        out = head(embeddings[:, None], feature[:, None], torch.zeros(5, 1, dtype=torch.int64), attend)[:, 0]
        logits = head.logits(out)
    expected = one_step(given, options, states, embeddings)
    for own, written_out in zip((out, logits), expected, strict=True):
        assert torch.allclose(own, written_out, atol=2e-4), (own - written_out).abs().max()


def test_a_head_over_all_tokens_is_written_without_a_mapping(view, tmp_path):
    """vLLM loads it only so."""
    given = new_head(view, TrainSettings(layers=LAYERS), np.arange(view.vocab_size)).bfloat16().float()
    save_eagle3(tmp_path, given, view.model)
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / "model.safetensors"))
    head = load_eagle3(tmp_path, view)
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in given.state_dict().items())


def test_qwen3_layers_norm_queries_and_keys(view, tmp_path):
    given = full_head(view, qk_norm=True)
    save_eagle3(tmp_path, given, view.model)
    head = load_eagle3(tmp_path, view)
    assert head.layers[0].self_attn.q_norm is not None
    controller = FixedController(["eagle3"], "eagle3", 3)
    engine = AtlasRolloutEngine(
        model=view.model, speculators=[Eagle3Speculator(head)], controller=controller, console=False
    )
    report = engine.generate([[5, 9, 2], [7]], max_new_tokens=12, eos_token_ids=[], seed=1).report
    assert report.drafted["eagle3"] > 0
