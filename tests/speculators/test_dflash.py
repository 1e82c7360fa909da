"""DFlash: drafts that equal a forward written out and transformers' own, whatever the batch; tokens unchanged."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.policy import RecordedPolicy
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.replay.replay import replay
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.dflash import (
    BLOCK_SIZE,
    MASK,
    SHAPE,
    head_for,
    markov_tensors,
    plain_states,
    random_tensors,
    write_checkpoint,
    write_dspark,
    write_nested,
)
from tests.engines import SETTINGS, engine_of, generate
from tests.models import tiny_gemma2, tiny_llama

FEW = {"max_new_tokens": 10, "eos_token_ids": []}
IDS = np.r_[0:20, 24:64].astype(np.int64)


@cache
def policy():
    return tiny_llama(layers=4, seed=11)


class Checking(DFlashSpeculator):
    """Compares each draft with the forward that is written out.

    Args:
        given: See `DFlashSpeculator`.
        plain: Gives the logits `[depth, tokens]` of a text, int64 `[n]`, and the tokens that were drafted behind it.
        ragged: Whether to draft fewer tokens than are asked for: another number for each request, none included.
    """

    def __init__(self, given, plain, ragged=False):
        super().__init__(given)
        self.plain, self.ragged, self.checked, self.lengths = plain, ragged, 0, set()

    def propose(self, sequences, requests, max_draft_tokens):
        wanted = np.minimum(max_draft_tokens, requests % BLOCK_SIZE) if self.ragged else max_draft_tokens
        draft = super().propose(sequences, requests, wanted)
        assert (draft.lengths == np.minimum(wanted, self.head.config.max_draft_tokens)).all()
        for row, request in enumerate(requests):
            text = torch.from_numpy(sequences.token_ids[request, : sequences.lengths[request]].astype(np.int64))
            with torch.no_grad():
                probs = self.plain(text, torch.from_numpy(draft.token_ids[row])).softmax(-1)
            self.lengths.add(int(draft.lengths[row]))
            for depth in range(int(draft.lengths[row])):
                sure = float(probs[depth].max().clamp(0.01, 0.99))
                assert draft.confidence[row, depth] == pytest.approx(sure, abs=1e-4)
                if draft.draft_probs is not None:
                    assert torch.allclose(draft.draft_probs[row, depth], probs[depth], atol=1e-4)
                self.checked += 1
        return draft


def fixed_for(model, speculator, k=3, **options):
    controller = FixedController([speculator.name], speculator.name, k)
    return engine_of(model, speculators=[speculator], controller=controller, **options)


def plainly(tensors, model, spans=None, **fields):
    return lambda text, drafted: model.lm_head(plain_states(tensors, model, text, spans, **fields)[1:])


SPANS = {
    "none": {},
    "biases": {"attention_bias": True},
    "one target layer, three layers": {
        "num_hidden_layers": 3,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1]},
    },
    "causal windows and none": {
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "windows on both sides": {
        "is_causal": False,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2], "use_swa": True, "swa_window_size": 3},
    },
    "causal everywhere": {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2], "causal": True}},
}
WRITTEN_OUT = {
    "causal windows and none": [(4, True), (None, False)],
    "windows on both sides": [(3, False)] * 2,
    "causal everywhere": [(None, True)] * 2,
}


@pytest.mark.parametrize("case", SPANS)
def test_it_drafts_what_is_written_out(case, tmp_path):
    """The cache, prompts that siblings share, catching up after rejections, and what the queries of each layer see."""
    fields = SPANS[case]
    tensors = random_tensors(**fields)
    folder = write_checkpoint(tmp_path / "head", tensors, **fields)
    checking = Checking(folder, plainly(tensors, policy(), WRITTEN_OUT.get(case), **fields))
    output = generate(fixed_for(policy(), checking), **FEW)
    assert output.completion_ids == generate(engine_of(policy(), speculation=False), **FEW).completion_ids
    assert checking.checked > 100
    assert not output.report.drafter_faults


@pytest.mark.parametrize("k", [2, 9], ids=["few", "more than a block has"])
def test_rows_of_any_draft_length_draft_alike(k, tmp_path):
    """Under rejection, where the distributions that tokens are drawn from come with the draft."""
    tensors = random_tensors()
    checking = Checking(write_checkpoint(tmp_path / "head"), plainly(tensors, policy()), ragged=True)
    engine = fixed_for(policy(), checking, k=k, verification="rejection", max_batch_size=7)
    output = generate(engine, **FEW)
    assert output.report.drafted["dflash"] == checking.checked > 50
    assert checking.lengths == set(range(min(k, BLOCK_SIZE - 1) + 1))
    assert not output.report.drafter_faults


@torch.no_grad()
def test_transformers_runs_the_head_alike():
    """What the other tests compare with is no reading of our own."""
    muse = pytest.importorskip("transformers.models.muse_glimmer_assistant")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "rms_norm_eps", "max_position_embeddings", "block_size")  # fmt: skip
    config = muse.MuseGlimmerAssistantConfig(
        **{name: SHAPE[name] for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
        layer_types=["full_attention"] * SHAPE["num_hidden_layers"],
        target_layer_ids=SHAPE["dflash_config"]["target_layer_ids"],
    )
    theirs, tensors = muse.MuseGlimmerAssistantModel(config).eval(), random_tensors()
    own_names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    theirs.load_state_dict({own_names.get(name, name): tensor for name, tensor in tensors.items()})
    text = torch.tensor([5, 9, 4, 11, 30, 2, 7])
    states = policy()(text[None], output_hidden_states=True).hidden_states
    out = theirs(
        noise_embeds=policy().get_input_embeddings()(torch.tensor([[7, *[MASK] * (BLOCK_SIZE - 1)]])),
        context_hidden_states=torch.cat([states[n + 1][:, :-1] for n in config.target_layer_ids], -1),
        attention_mask={"full_attention": None},
    ).last_hidden_state[0]
    assert torch.allclose(out, plain_states(tensors, policy(), text), atol=1e-4)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole vocabulary", "reduced vocabulary"])
def test_heads_with_tables_of_their_own_draft_with_them(ids, tmp_path):
    tensors = random_tensors()
    generator = torch.Generator().manual_seed(3)
    rows = 64 if ids is None else len(ids)
    rows_of_head = torch.randn(rows, 32, generator=generator)
    own = tensors | {"embed_tokens.weight": torch.randn(64, 32, generator=generator), "lm_head.weight": rows_of_head}
    fields = {}
    if ids is not None:
        own["d2t"] = torch.from_numpy(ids - np.arange(rows))
        fields = {"draft_vocab_size": rows}

    model = tiny_llama(layers=4, seed=11)
    embedding = torch.nn.Embedding(64, 32, _weight=own["embed_tokens.weight"])

    def plain(text, drafted):
        spread = torch.full((BLOCK_SIZE - 1, 64), float("-inf"))
        with_theirs = plain_states(tensors, WithEmbedding(model, embedding), text)[1:]
        spread[:, slice(None) if ids is None else ids] = with_theirs @ rows_of_head.T
        return spread

    checking = Checking(write_nested(tmp_path / "head", own, **fields), plain)
    output = generate(fixed_for(model, checking, verification="rejection"), **FEW)
    assert not output.report.drafter_faults
    assert checking.checked > 100


class WithEmbedding(torch.nn.Module):
    """A policy whose blocks are embedded by another table."""

    def __init__(self, model, embedding):
        super().__init__()
        self.model, self.embedding = model, embedding

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_tokens_do_not_depend_on_it(verification, name, tmp_path):
    """In waves, beside the drafters that learn, across updates of the policy."""
    engine = engine_of(policy(), draft_model=write_checkpoint(tmp_path / "head"), verification=verification,
                       max_batch_size=4)  # fmt: skip
    generate(engine, **SETTINGS[name])
    engine.policy_updated()
    output = generate(engine, **SETTINGS[name])
    assert set(output.report.drafted) == {"history", "recurrent", "dflash"}
    alone = generate(fixed_for(policy(), DFlashSpeculator(tmp_path / "head"), verification=verification),
                     **SETTINGS[name])  # fmt: skip
    assert alone.report.drafted["dflash"] > 0
    if verification == "invariant":
        plain = generate(engine_of(policy(), speculation=False), **SETTINGS[name]).completion_ids
        assert output.completion_ids == plain
        assert alone.completion_ids == plain


def test_policies_that_scale_embeddings_and_cap_logits(tmp_path):
    """Blocks are embedded as the policy's first layer gets them; the policy's own cap applies to the drafts."""
    model, tensors = tiny_gemma2(layers=4), random_tensors()

    def plain(text, drafted):
        cap = model.config.final_logit_softcapping
        return torch.tanh(model.lm_head(plain_states(tensors, model, text)[1:]) / cap) * cap

    checking = Checking(write_checkpoint(tmp_path / "head"), plain)
    assert not generate(fixed_for(model, checking), **FEW).report.drafter_faults
    assert checking.checked > 100


def test_the_backlog_is_what_has_yet_to_be_read():
    """The prompts at first, those of siblings once and except their last positions; then what each step commits."""
    seen = []

    class Watched(DFlashSpeculator):
        def propose(self, sequences, requests, max_draft_tokens):
            seen.append((self.backlog(sequences, requests), len(requests)))
            return super().propose(sequences, requests, max_draft_tokens)

    generate(fixed_for(policy(), Watched(head_for(policy()))), prompts=[[5, 9, 2], [7], [3, 3, 8, 1]], **FEW)
    first, requests = seen[0]
    assert first == 2 + 0 + 3 + requests
    assert all(requests <= backlog <= 4 * requests for backlog, requests in seen[1:])


def test_a_block_may_reach_far_beyond_the_longest_text():
    engine = fixed_for(policy(), DFlashSpeculator(head_for(policy(), block_size=40)), k=2)
    output = generate(engine, **FEW)
    assert output.completion_ids == generate(engine_of(policy(), speculation=False), **FEW).completion_ids
    assert output.report.drafted["dflash"] > 0
    assert not output.report.drafter_faults


def test_requests_without_room_in_memory_get_no_drafts(monkeypatch):
    """Ten requests, and memory for some: the others are dropped, and nothing is lost but their drafts."""
    speculator = DFlashSpeculator(head_for(policy()))
    engine = fixed_for(policy(), speculator)
    monkeypatch.setattr("atlas_rl.speculators.feature_head.free_bytes", lambda device: 80 * speculator._cell_bytes)
    output = generate(engine, **FEW)
    assert output.completion_ids == generate(engine_of(policy(), speculation=False), **FEW).completion_ids
    assert 0 < output.report.drafted["dflash"] < 10 * 3 * 9
    assert not output.report.drafter_faults


@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_dspark_adds_what_the_token_before_says(from_anchor, verification, tmp_path):
    """To the token that was drafted before; its blocks predict from the newest token's position on, or fill masks in."""
    markov = markov_tensors()
    first, second = markov.values()

    def plain(text, drafted):
        states = plain_states(random_tensors(), policy(), text)
        logits = policy().lm_head(states if from_anchor else states[1:])
        before = torch.cat([text[-1:], drafted])[: len(logits)]
        return logits[: len(before)] + first[before] @ second.T

    confidence = {"confidence_head.proj.weight": torch.ones(1, 36), "confidence_head.proj.bias": torch.ones(1)}
    folder = write_dspark(tmp_path / "head", random_tensors() | markov | confidence, sample_from_anchor=from_anchor)
    checking = Checking(folder, plain)
    output = generate(fixed_for(policy(), checking, k=9, verification=verification), **FEW)
    assert checking.checked > 100
    assert max(checking.lengths) == BLOCK_SIZE - (not from_anchor)
    assert not output.report.drafter_faults


def test_dspark_over_a_reduced_vocabulary(tmp_path):
    markov = markov_tensors(draft_vocab_size=len(IDS))
    first, second = markov.values()
    output_rows = torch.randn(len(IDS), 32, generator=torch.Generator().manual_seed(3))
    offsets = torch.from_numpy(IDS - np.arange(len(IDS)))
    tables = {"embed_tokens.weight": policy().get_input_embeddings().weight.detach().clone()}
    tensors = random_tensors() | markov | tables | {"lm_head.weight": output_rows, "d2t": offsets}

    def plain(text, drafted):
        states = plain_states(random_tensors(), policy(), text)[1:]
        before = torch.cat([text[-1:], drafted])[: len(states)]
        spread = torch.full((len(before), 64), float("-inf"))
        spread[:, IDS] = states[: len(before)] @ output_rows.T + first[before] @ second.T
        return spread

    fields = {"speculators_model_type": "dspark", "markov_rank": 4, "draft_vocab_size": len(IDS)}
    checking = Checking(write_nested(tmp_path / "head", tensors, **fields), plain)
    output = generate(fixed_for(policy(), checking, verification="rejection"), **FEW)
    assert not output.report.drafter_faults
    assert checking.checked > 100


def test_it_is_replayed_with_the_policys_tables(tmp_path):
    recorder = RecordingSpeculator(tmp_path, (1, 3))
    engine = engine_of(policy(), speculators=[HistorySpeculator(), recorder])
    generate(engine, **FEW)
    engine.policy_updated()
    live = generate(fixed_for(policy(), DFlashSpeculator(head_for(policy()))), **FEW).report
    recorded, drafter = Recorded.load(recorded_calls(tmp_path)[0]), DFlashSpeculator(head_for(policy()))
    drafter.bind(RecordedPolicy(recorded, like=InProcessView(policy())), couples_noise=True)
    report, _ = replay(recorded, {"dflash": drafter}, FixedController(["dflash"], "dflash", 3))
    assert report.accepted["dflash"] == pytest.approx(live.accepted["dflash"], rel=0.1)  # of states in half precision
    assert report.drafted["dflash"] == pytest.approx(live.drafted["dflash"], rel=0.1)
