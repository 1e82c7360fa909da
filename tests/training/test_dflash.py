"""The training of DFlash heads: the blocks it learns from, acceptance that rises, interruptions."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.speculators.dflash.checkpoint import load_dflash, save_dflash
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.training.anchored_blocks import run_blocks
from atlas_rl.training.dflash import (
    DFlashLesson,
    DFlashSettings,
    default_dflash_layers,
    new_dflash_head,
    train_dflash,
)
from tests.dflash import head_for, plain_states, random_tensors
from tests.models import tiny_bigram, tiny_gemma2, tiny_llama

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4], [11, 12], [40, 2, 2]]
LAYERS, MASK, EOS = (1, 3), 62, [17]


@cache
def policy():
    return tiny_bigram(layers=4, seed=11)


def settings(**options):
    small = {"num_layers": 2, "block_size": 4, "learning_rate": 4e-3, "epochs": 1}
    return DFlashSettings(**{"layers": LAYERS, "mask_token_id": MASK, **small, **options})


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    recorder = RecordingSpeculator(folder, LAYERS)
    engine = AtlasRolloutEngine(model=policy(), speculators=[HistorySpeculator(), recorder], console=False)
    for seed in range(8):
        engine.generate(PROMPTS, num_generations=4, max_new_tokens=24, eos_token_ids=EOS, seed=seed)
        engine.policy_updated()
    return recorded_calls(folder)


def silent(line):
    pass


def accepted_length(speculator):
    controller = FixedController(["dflash"], "dflash", 3)
    engine = AtlasRolloutEngine(model=policy(), speculators=[speculator], controller=controller, console=False)
    output = engine.generate(PROMPTS, num_generations=4, max_new_tokens=24, eos_token_ids=EOS, seed=99)
    assert not output.report.drafter_faults
    return output.report.accepted_length


def test_a_trained_head_is_accepted(calls, tmp_path):
    """On held-out calls, and in a rollout that reads the written checkpoint; the policy is not changed by it."""
    weights = {name: tensor.clone() for name, tensor in policy().state_dict().items()}
    view, options = InProcessView(policy()), settings(epochs=5, learning_rate=1e-2)
    head = train_dflash(view, calls, tmp_path / "work", options, say=silent)
    log = json.loads((tmp_path / "work" / "training.json").read_text())
    first, last = (log["epochs"][epoch]["acceptance"] for epoch in (0, -1))
    assert len(first) == 3
    assert last[0] > 0.3
    assert last[0] > first[0]
    save_dflash(tmp_path / "head", head, 4)
    assert load_dflash(tmp_path / "head", view).config.layers == LAYERS
    untrained = accepted_length(DFlashSpeculator(new_dflash_head(view, options)))
    assert accepted_length(DFlashSpeculator(tmp_path / "head")) > untrained + 0.2
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy().state_dict().items())
    assert all(parameter.grad is None for parameter in policy().parameters())


@torch.no_grad()
def test_it_trains_on_the_blocks_that_are_drafted(calls):
    """Many blocks at once, against one block at a time written out; features are recorded in half precision."""
    head, recorded = head_for(policy()), Recorded.load(calls[0])
    lesson = DFlashLesson(InProcessView(policy()), head, settings(block_size=6, blocks_per_text=4))
    requests = np.array([0, 4, 9])
    batch = lesson.batch(recorded, requests, np.random.default_rng(0))
    out = run_blocks(head, batch)
    checked = 0
    for row, request in enumerate(requests):
        length, prompt = int(recorded.sequences.lengths[request]), int(recorded.sequences.prompt_lengths[request])
        text = torch.from_numpy(recorded.sequences.token_ids[request, :length].astype(np.int64))
        for block, anchor in enumerate(batch.anchors[row].tolist()):
            assert max(prompt - 1, 1) <= anchor <= length - 2
            alone = plain_states(random_tensors(), policy(), text[: anchor + 1])[1:]
            assert torch.allclose(out[row, block], alone, atol=5e-2), (out[row, block] - alone).abs().max()
            drawn = [max(prompt, 2) <= anchor + depth < length for depth in range(1, 6)]
            if batch.valid[row, block].any():
                assert batch.valid[row, block].tolist() == drawn
                checked += 1
    assert checked > 6


def test_the_target_is_the_distribution_that_tokens_were_drawn_from(calls):
    head, recorded = head_for(policy()), Recorded.load(calls[0])
    lesson = DFlashLesson(InProcessView(policy()), head, settings(block_size=6))
    batch = lesson.batch(recorded, np.array([2]), None)
    length = int(recorded.sequences.lengths[2])
    text = torch.from_numpy(recorded.sequences.token_ids[2, :length].astype(np.int64))
    with torch.no_grad():
        logits = policy()(text[None]).logits[0]
        own = lesson._logits(batch.drawn_from[batch.valid])
    places = (batch.anchors[:, :, None] + torch.arange(1, 6))[batch.valid]
    assert torch.allclose(own.softmax(-1), logits[places - 1].softmax(-1), atol=2e-2)


def test_logits_of_a_policy_that_caps_them_are_learned_as_they_are():
    view = InProcessView(tiny_gemma2(layers=4))
    lesson = DFlashLesson(view, head_for(view.model), settings())
    states = 20 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lesson._logits(states), view.logits(states), atol=1e-4)


def test_a_training_goes_on_in_the_middle_of_an_epoch(calls, tmp_path):
    """With the same blocks, which are chosen at random."""
    options, view, lines = settings(blocks_per_text=3), InProcessView(policy()), []
    whole = train_dflash(view, calls[:4], tmp_path / "whole", options, say=silent)

    def stop_at_the_estimate(line):
        lines.append(line)
        if "from here" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dflash(view, calls[:4], tmp_path / "parts", options, say=stop_at_the_estimate, save_every_s=0)
    assert re.fullmatch(r"training takes about \d+ (s|min) from here, .*", lines[-1])
    parts = train_dflash(view, calls[:4], tmp_path / "parts", options, say=lines.append)
    assert "goes on at epoch 1/1, batch 6/9" in lines
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name].float(), tensor.float(), atol=1e-5), name
    with pytest.raises(ValueError, match="other blocks_per_text"):
        train_dflash(view, calls[:4], tmp_path / "parts", settings(blocks_per_text=2), say=silent)


def test_layers_of_new_heads_exist_and_differ():
    assert default_dflash_layers(36, 5) == (2, 10, 18, 26, 34)  # z-lab's [1, 9, 17, 25, 33] for Qwen3-8B
    for num_layers in range(1, 12):
        for num_draft_layers in range(1, 7):
            layers = default_dflash_layers(num_layers, num_draft_layers)
            assert len(layers) == len(set(layers)) <= num_draft_layers
            assert bool(layers) == (num_layers > 1)
            assert list(layers) == sorted(layers)
            assert all(1 <= layer < num_layers for layer in layers)


def test_what_cannot_be_learned_is_refused(calls, tmp_path):
    view = InProcessView(policy())
    with pytest.raises(ValueError, match="the mask token 64 has no embedding"):
        new_dflash_head(view, settings(mask_token_id=64))
    model = tiny_llama(layers=4)
    with torch.no_grad():
        model.get_input_embeddings().weight[MASK] = 0
    with pytest.raises(ValueError, match="the embedding of the mask token 62 is zero"):
        new_dflash_head(InProcessView(model), settings())
    with pytest.raises(ValueError, match=r"no hidden states of layers \[2\]: record them anew"):
        train_dflash(view, calls, tmp_path, settings(layers=(1, 2)), say=silent)
    with pytest.raises(ValueError, match="too few to hold one out"):
        train_dflash(view, calls[:1], tmp_path, settings(), say=silent)


def test_a_markov_head_helps_where_a_token_depends_on_the_one_before(calls, tmp_path):
    """The policy's tokens depend on the last one, which is drawn: only the Markov head knows what was drawn."""
    acceptance = {}
    for rank in (0, 16):
        work, options = tmp_path / f"rank {rank}", settings(epochs=5, learning_rate=1e-2, markov_rank=rank)
        head = train_dflash(InProcessView(policy()), calls, work, options, say=silent)
        acceptance[rank] = json.loads((work / "training.json").read_text())["epochs"][-1]["acceptance"]
    assert acceptance[16][1] > acceptance[0][1] + 0.1
    save_dflash(tmp_path / "head", head, 4)
    config = load_dflash(tmp_path / "head", InProcessView(policy())).config
    assert (config.markov_rank, config.max_draft_tokens, config.layers) == (16, 3, LAYERS)
    assert accepted_length(DFlashSpeculator(tmp_path / "head")) > 1.4
