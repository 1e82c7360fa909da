"""Attention sinks, and layers that share keys and values, over ragged rows: the logits of plain forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.policy import rectangle, short_rows, varlen
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.placement import Placement
from tests.families import made, policy
from tests.models import FACTORIES
from tests.policy.rows import LENGTH, TOLERANCE, Rows, plain_logits, run_in_every_way, texts

SINKS = ["gpt_oss", "granite_swa", "mimo_v2_flash"]
SHARING = ["gemma3n_text", "gemma4_text, shared keys and values"]


@pytest.mark.parametrize("family", ["gpt_oss", "mimo_v2_flash", "gemma4_text, keys as values", *SHARING])
def test_ragged_rows_are_as_plain_forwards(family):
    run_in_every_way(Rows(policy(family)))


@pytest.mark.parametrize("family", ["gpt_oss", SHARING[1]])
def test_steps_of_fixed_shapes_are_as_plain_forwards(family):
    """As on a GPU: sequences of any length, a token each."""
    rows = Rows(policy(family))
    rows.cache.varlen = True
    run_in_every_way(rows)
    assert rows.cache.attended == {True}


# --------------------------------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize("family", SINKS)
def test_sinks_count(family):
    """What the other tests rely on."""
    model, (text,) = made(family), texts(1)
    before = plain_logits(model, text)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
    assert (plain_logits(model, text) - before).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_are_one_more_logit_in_every_softmax(window):
    """By hand, rows of several lengths, two queries and one."""
    torch.manual_seed(0)
    keys, values, sinks = torch.randn(3, 10, 2, 8), torch.randn(3, 10, 2, 8), torch.tensor([-3.0, 0.0, 2.0, 30.0])
    query = torch.randn(4, 4, 8)
    packing = varlen.Packing(torch.tensor([0, 2, 3, 4]), torch.tensor([10, 0, 20, 30]), torch.tensor([7, 4, 10]), 2, 10)
    out = varlen.attend(query, keys, values, packing, 0.5, window, sinks)
    for token, (row, last) in enumerate([(1, 5), (1, 6), (0, 3), (2, 9)]):
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(4):
            scores = keys[row, first : last + 1, head // 2] @ query[token, head] * 0.5
            shares = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]
            assert torch.allclose(out[token, head], shares @ values[row, first : last + 1, head // 2], atol=1e-5)


def test_few_queries_at_a_time_give_the_same(monkeypatch):
    monkeypatch.setattr(rectangle, "_SCORE_BYTES", 1)
    rows, (a, b) = Rows(policy("gpt_oss")), texts(2)
    with rows.runner.session(rows.cache):
        rows.forward({0: a[:9], 1: b[:5]})
        rows.forward({0: a[9:10], 1: b[5:9]}, rejected=[2, 0])


@pytest.mark.parametrize("family", ["gpt_oss", "mistral", "gemma2", "llama"])
def test_masks_of_few_queries_at_a_time_give_the_same(family, monkeypatch):
    monkeypatch.setattr(rectangle, "_MASK_BYTES", 200)
    monkeypatch.setattr(short_rows, "MOST_TOKENS", 0)
    run_in_every_way(Rows(FACTORIES[family](seed=2) if family in FACTORIES else policy(family)))


@pytest.mark.parametrize("family", ["gpt_oss", "mistral", "gemma2"])
def test_masks_of_long_prompts_take_little_memory(family, monkeypatch):
    model = FACTORIES[family](seed=2) if family in FACTORIES else policy(family)
    monkeypatch.setattr(rectangle, "_MASK_BYTES", 1_000)
    largest, part_of_mask = [0], Placement.part_of_mask

    def noting(self, *arguments):
        made = part_of_mask(self, *arguments)
        largest.append(made.nbytes)
        return made

    monkeypatch.setattr(Placement, "part_of_mask", noting)
    rows, (text,) = Rows(model), texts(1, 2 * LENGTH)
    with rows.runner.session(rows.cache):
        rows.forward({0: text[:20]}, settled=np.array([20]))
        rows.forward({0: text[20:48]})
    assert 500 < max(largest) <= 1_000


def test_scores_of_long_prompts_take_little_memory(monkeypatch):
    """One of 2,000 tokens by eight heads has 128 MB of them."""
    largest, softmax = [0], torch.softmax

    def noting(scores, **options):
        largest.append(scores.nbytes)
        return softmax(scores, **options)

    monkeypatch.setattr(torch, "softmax", noting)
    model = made("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"], num_attention_heads=8)
    runner = InProcessRunner(model)
    with runner.session(runner.new_cache(1, 2000)):
        runner.forward(Segments(np.full(2000, 5), 0, np.zeros(1, int), np.array([2000])), np.array([1999]))
    assert rectangle._SCORE_BYTES / 2 < max(largest) <= rectangle._SCORE_BYTES


@pytest.mark.parametrize("family", ["gpt_oss", SHARING[1]])
def test_under_autocast(family):
    model, (text,) = policy(family), texts(1)
    runner = InProcessRunner(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_logits(model, text)
        with runner.session(cache := runner.new_cache(1, LENGTH)):
            got = [runner.forward(Segments(text[:8], 0, np.zeros(1, int), np.array([8])), np.arange(8))]
            for start in range(8, LENGTH, 2):
                step = Segments(text[start : start + 2], 0, np.array([start]), np.array([2]))
                got.append(runner.forward(step, np.arange(2)))
    assert {kept.dtype for kept in cache.keys.values()} == {torch.bfloat16}
    assert (torch.cat(got) - expected).abs().mean() < 0.05  # logits spread by two nats
    assert (plain_logits(model, text) - expected).abs().max() > TOLERANCE  # it did compute in bfloat16


# ------------------------------------------------------------------------------------------------- shared keys and values


@pytest.mark.parametrize("family", SHARING)
def test_layers_that_share_keys_and_values_have_none_of_their_own(family):
    model = policy(family)
    runner = InProcessRunner(model)
    with runner.session(cache := runner.new_cache(2, LENGTH)):
        runner.forward(Segments(texts(1)[0], 0, np.zeros(1, int), np.array([LENGTH])), np.arange(1))
        assert cache.sources == {0: 0, 1: 1, 2: 0, 3: 1}
        assert set(cache.keys) == set(cache.values) == {0, 1}
        assert runner.row_bytes(LENGTH) == cache.num_bytes == LENGTH * cache.cell_bytes


def test_a_layer_cannot_change_whose_keys_it_reads():
    runner = InProcessRunner(policy(SHARING[1]))
    with runner.session(cache := runner.new_cache(1, LENGTH)):
        step = Segments(np.array([5]), 0, np.zeros(1, int), np.ones(1, int))
        runner.forward(step, np.arange(1))
        cache.sources[2] = 2
        with pytest.raises(RuntimeError, match="layer 2 attends to the keys of layer 0, and attended to those of 2"):
            runner.forward(step, np.arange(1))
