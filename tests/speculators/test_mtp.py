"""MTP layers of policies: published layouts, drafts that equal a plain forward of the layer, tokens unchanged."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas_rl import AtlasRolloutEngine
from atlas_rl.config import EngineConfig
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.rollout.backends import vllm_draft_folder
from atlas_rl.speculators.mtp.checkpoint import load_mtp
from atlas_rl.speculators.mtp.speculator import MtpSpeculator
from tests.engines import engine_of, generate
from tests.models import tiny_llama, tiny_qwen2
from tests.mtp import FAMILIES, PlainLayer, loaded, tiny_policy, write_checkpoint

FEW = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """By family: the folder, the policy loaded from it, and the layer that was written into it."""

    @cache
    def make(family):
        model = tiny_policy(family)
        layer = PlainLayer(family, model)
        folder = write_checkpoint(tmp_path_factory.mktemp(family), model, layer)
        return folder, loaded(folder, type(model)), layer

    return make


def drafting(model, speculator, k=3, **options):
    controller = FixedController([speculator.name], speculator.name, k)
    return engine_of(model, speculators=[speculator], controller=controller, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_drafts_what_a_plain_forward_of_the_layer_says(checkpoint, family):
    folder, model, layer = checkpoint(family)
    checked = {0: 0, 1: 0, 2: 0}

    class Checking(MtpSpeculator):
        @torch.no_grad()
        def propose(self, sequences, requests, max_draft_tokens):
            draft = super().propose(sequences, requests, max_draft_tokens)
            for row, request in enumerate(requests[:3]):
                text = sequences.token_ids[request, : sequences.lengths[request]].tolist()
                for depth in range(int(draft.lengths[row])):
                    tokens = torch.tensor(text + draft.token_ids[row, :depth].tolist())
                    sure = layer.logits(tokens, depth).softmax(dim=-1).max()
                    assert draft.confidence[row, depth] == pytest.approx(float(sure.clamp(0.01, 0.99)), abs=1e-4)
                    checked[depth] += 1
            return draft

    output = generate(drafting(model, Checking(folder)), **FEW)
    assert output.completion_ids == generate(engine_of(model, speculation=False), **FEW).completion_ids
    assert min(checked.values()) > 5
    assert not output.report.warnings


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_transformers_reads_and_runs_the_layer_alike(checkpoint, family, monkeypatch):
    """What the other tests compare with is no reading of our own."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MTP")
    from transformers.cache_utils import MtpCache

    _, model, layer = checkpoint(family)
    monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4\..*"])  # of published sizes
    theirs = layers.MtpModel.from_pretrained(model)
    tokens = torch.tensor([[5, 9, 4, 11, 30, 2]])
    _, logits, _ = theirs(
        input_ids=tokens[:, 1:],
        last_hidden_states=model.model(tokens[:, :-1]).last_hidden_state,
        attention_mask=None,
        position_ids=torch.arange(1, 6)[None],
        mtp_cache=MtpCache(config=model.config.get_mtp_config()),
    )
    assert torch.allclose(logits[0, 0], layer.logits(tokens[0], 0), atol=1e-4)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_a_name_is_all_the_engine_needs(checkpoint, verification):
    """Beside the drafters that learn, in waves, across updates of the policy."""
    _, model, _ = checkpoint("qwen3_5_text")
    controller = FixedController(["history", "recurrent", "mtp"], "mtp", 3)  # whatever drafts cost on this machine
    engine = engine_of(model, draft_model="mtp", verification=verification, max_batch_size=4, controller=controller)
    generate(engine)
    engine.policy_updated()
    output = generate(engine, temperature=0.7)
    assert output.report.drafted["mtp"] > 0
    if verification == "invariant":
        assert output.completion_ids == generate(engine_of(model, speculation=False), temperature=0.7).completion_ids


def test_a_layer_that_has_learned_to_predict_is_accepted(tmp_path):
    model = tiny_policy("mimo")
    with torch.no_grad():  # the next token depends on the last one more than on all others
        for each in model.model.layers:
            each.self_attn.o_proj.weight.mul_(0.02)
    layer = PlainLayer("mimo", model)
    before = generate(drafting(model, MtpSpeculator(write_checkpoint(tmp_path / "raw", model, layer))))
    tokens = torch.randint(64, (16, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.model(tokens)
        features, wanted = out.last_hidden_state, model.lm_head(out.last_hidden_state).log_softmax(-1)
    learning = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(100):
        logits = model.lm_head(layer.step(tokens[:, 1:], features[:, :-1]))
        loss = (wanted[:, 1:].exp() * (wanted[:, 1:] - logits.log_softmax(-1))).sum(-1).mean()
        learning.zero_grad()
        loss.backward()
        learning.step()
    after = generate(drafting(model, MtpSpeculator(write_checkpoint(tmp_path / "trained", model, layer))))
    assert after.completion_ids == before.completion_ids
    assert before.report.accepted_length < 1.5
    assert after.report.accepted_length > before.report.accepted_length + 0.5, (
        before.report.accepted_length,
        after.report.accepted_length,
    )


def test_the_layer_of_a_folder_that_holds_nothing_else_drafts(checkpoint, tmp_path):
    folder, model, layer = checkpoint("qwen3_5_text")
    save_file(layer.tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert generate(engine_of(model, draft_model=tmp_path), **FEW).report.drafted["mtp"] > 0
    assert generate(engine_of(model, draft_model=f"mtp:{folder}"), **FEW).report.drafted["mtp"] > 0


def test_experts_that_are_stored_together_are_read(checkpoint, tmp_path):
    _, model, layer = checkpoint("qwen3_5_moe_text")
    one_by_one = load_mtp(write_checkpoint(tmp_path / "a", model, layer), InProcessView(model)).state_dict()
    stored = {name: None for name in layer.tensors() if ".experts." in name}
    stored |= {f"mtp.layers.0.mlp.experts.{n}": layer.state_dict()[f"block.mlp.experts.{n}"].clone() for n in
               ("gate_up_proj", "down_proj")}  # fmt: skip
    together = load_mtp(write_checkpoint(tmp_path / "b", model, layer, **stored), InProcessView(model)).state_dict()
    assert all(torch.equal(tensor, together[name]) for name, tensor in one_by_one.items())


def test_half_precision_rounds_weights_and_neither_frequencies_nor_biases_of_routers(checkpoint):
    folder, model, _ = checkpoint("glm4_moe")
    whole, half = load_mtp(folder, InProcessView(model)), load_mtp(folder, InProcessView(loaded(folder).bfloat16()))
    assert half.eh_proj.weight.dtype == torch.bfloat16
    for name, table in whole.named_buffers():
        assert torch.equal(table, dict(half.named_buffers())[name]), name
    frequencies = dict(whole.named_buffers())["rotary.rotary.inv_freq"].clone()
    assert torch.equal(dict(whole.to(torch.bfloat16).named_buffers())["rotary.rotary.inv_freq"], frequencies)


def test_of_several_layers_the_first_drafts_and_a_warning_says_so(checkpoint, tmp_path, caplog):
    _, model, layer = checkpoint("glm4_moe")
    more = {name.replace("layers.4.", "layers.5."): tensor + 1 for name, tensor in layer.tensors().items()}
    folder = write_checkpoint(tmp_path, model, layer, **more)
    head = load_mtp(folder, InProcessView(model))
    assert torch.equal(head.eh_proj.weight, layer.project.weight)
    assert "has 2 MTP layers: the first drafts every token" in caplog.text


WRONG = {
    "none": (lambda t: dict.fromkeys(t), "no MTP layer in .*transformers leaves it out when it saves"),
    "a part is missing": (lambda t: {"mtp.norm.weight": None}, r"lacks 'norm\.weight'"),
    "another size": (lambda t: {"mtp.fc.weight": torch.zeros(16, 32)}, r"of shape \(16, 32\) instead of \(32, 64\)"),
    "something unknown": (lambda t: {"mtp.layers.0.gate.weight": torch.zeros(1)}, "has 'block.gate.weight', which"),
    "quantized": (lambda t: {"mtp.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, "is quantized"),
    "NaN": (lambda t: {"mtp.norm.weight": torch.full((32,), torch.nan)}, "NaN or infinity in 'norm.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, case):
    _, model, layer = checkpoint("qwen3_5_text")
    change, message = WRONG[case]
    write_checkpoint(tmp_path, model, layer, **change(layer.tensors()))
    with pytest.raises(ValueError, match=message):
        engine_of(model, draft_model=f"mtp:{tmp_path}").generate([[5]], max_new_tokens=2)


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError])
def test_a_layer_that_cannot_be_made_without_memory_is_refused(checkpoint, error, monkeypatch):
    """As one that reads a number of a tensor while it is made."""
    folder, model, _ = checkpoint("qwen3_5_text")

    def init(self, *args, **kwargs):
        if error is RuntimeError:
            torch.zeros(1).item()
        raise error("not on the meta device")

    monkeypatch.setattr(type(model.model.layers[-1]), "__init__", init)
    with pytest.raises(ValueError, match=r"draft_model='mtp': no further .*meta.*leave it out"):
        load_mtp(folder, InProcessView(model))


def test_policies_without_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the policy does not say which that was"):
        engine_of(tiny_qwen2(), draft_model="mtp").generate([[5]], max_new_tokens=2)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no MTP layer in .*Most families have none"):
        engine_of(loaded(tmp_path), draft_model="mtp").generate([[5]], max_new_tokens=2)
    model = tiny_llama()
    model.config.name_or_path = "somebody/a-model-that-is-not-here"
    with pytest.raises(ValueError, match="'somebody/a-model-that-is-not-here' is no folder of this machine"):
        engine_of(model, draft_model="mtp").generate([[5]], max_new_tokens=2)


def test_folders_and_engines_that_cannot_have_it_are_refused():
    with pytest.raises(ValueError, match="no checkpoint in 'nowhere'"):
        AtlasRolloutEngine(draft_model="mtp:nowhere")
    with pytest.raises(ValueError, match="no checkpoint in ''"):
        AtlasRolloutEngine(draft_model="mtp:")
    with pytest.raises(ValueError, match="with vLLM draft_model='mtp' does not draft"):
        vllm_draft_folder(EngineConfig(draft_model="mtp"))


def test_a_sharded_policy_is_refused(checkpoint, tmp_path):
    from torch.distributed import destroy_process_group, init_process_group, is_initialized
    from torch.distributed.fsdp import fully_shard

    folder, _, _ = checkpoint("qwen3_5_text")
    model = loaded(folder)
    own_group = not is_initialized()  # a vLLM engine of this process keeps one
    if own_group:
        init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model)
        with pytest.raises(ValueError, match="a policy that FSDP shards"):
            load_mtp(folder, InProcessView(model))
    finally:
        if own_group:
            destroy_process_group()


def test_a_damaged_file_is_named(checkpoint, tmp_path):
    _, model, layer = checkpoint("qwen3_5_text")
    path = write_checkpoint(tmp_path, model, layer) / "model.safetensors"
    assert "mtp.fc.weight" in load_file(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        engine_of(model, draft_model=f"mtp:{tmp_path}").generate([[5]], max_new_tokens=2)
