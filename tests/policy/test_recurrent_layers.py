"""Recurrent layers over ragged rows: the logits of plain forwards, whatever was drafted, rejected, copied or dropped."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from atlas_rl.policy import ragged_attention, recurrent_rows
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.memory import allocated
from atlas_rl.policy.recurrent_layers import GatedDelta, recurrent_layers
from benchmarks.tiny_policies import build
from tests.models import HYBRIDS
from tests.policy.rows import LENGTH, TOLERANCE, Rows, plain_logits, run_in_every_way, texts


@cache
def policy(family):
    return build(family)


@pytest.mark.parametrize("family", HYBRIDS)
def test_ragged_rows_are_as_plain_forwards(family):
    run_in_every_way(Rows(policy(family)))


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "bamba"])
def test_a_drafter_may_go_on_from_its_own_drafts(family):
    """As a draft LM does: it runs its own drafts one by one, and goes back behind all of them."""
    rows, (a, b) = Rows(policy(family)), texts(2)
    with rows.runner.session(rows.cache):
        rows.forward({0: a[:5], 1: b[:7]}, settled=np.array([5, 7]))
        for step in range(3):
            rows.forward({0: b[step : step + 1], 1: a[step : step + 1]}, settled=np.array([5, 7]))
        rows.texts = {0: [*a[:5], b[0]], 1: list(b[:7])}  # one draft of row 0 was right
        rows.forward({0: a[5:9], 1: b[7:8]}, rejected=[1, 2])
        rows.forward({0: a[9:10], 1: b[8:12]})


RECURRENT = {
    "lfm2": {"layer_types": ["conv"] * 4},
    "qwen3_next": {"layer_types": ["linear_attention"] * 4},
    "granitemoehybrid": {"layer_types": ["linear_attention"] * 4},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_what_is_not_a_number_stays_in_its_row_and_goes_with_its_draft(family):
    """With recurrent layers alone: attention multiplies masked cells by zero, which `decode/stand_ins.py` is for."""
    model = build(family, tie_word_embeddings=False, **RECURRENT[family])
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    runner, (a, b) = InProcessRunner(model), (np.where(text == 5, 6, text) for text in texts(2))
    with runner.session(runner.new_cache(2, LENGTH)):
        runner.forward(Segments(np.append(a[:4], b[:2]), 0, np.zeros(2, int), np.array([4, 2])), np.arange(6))
        got = runner.forward(
            Segments(np.array([a[4], 5, 5, b[2]]), 0, np.array([4, 2]), np.array([3, 1])), np.arange(4)
        )
        assert got.isfinite().all(1).tolist() == [True, False, False, True]
        got = runner.forward(Segments(np.array([a[5], b[3]]), 0, np.array([5, 3]), np.ones(2, int)), np.arange(2))
    for logits, text in zip(got, (a[:6], b[:4]), strict=True):
        assert (logits - plain_logits(model, text)[-1]).abs().max() < TOLERANCE


def test_states_are_float32_under_autocast():
    model, (text,) = policy("bamba"), texts(1)
    runner = InProcessRunner(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_logits(model, text)
        with runner.session(cache := runner.new_cache(1, LENGTH)):
            got = [runner.forward(Segments(text[:8], 0, np.zeros(1, int), np.array([8])), np.arange(8))]
            for start in range(8, LENGTH):
                step = Segments(text[start : start + 1], 0, np.array([start]), np.ones(1, int))
                got.append(runner.forward(step, np.arange(1)))
    assert {kept.state.dtype for kept in cache.recurrent._layers.values()} == {torch.float32}
    assert (torch.cat(got) - expected).abs().mean() < 0.05  # logits spread by two nats


def test_a_row_cannot_go_back_behind_what_is_settled():
    runner, (text,) = InProcessRunner(policy("lfm2")), texts(1)
    with runner.session(runner.new_cache(2, LENGTH)):
        runner.forward(Segments(text[:6], 0, np.zeros(1, int), np.array([6]), settled=np.array([6])), np.arange(6))
        for start in (5, 7):
            with pytest.raises(RuntimeError, match=f"continued behind 6 to 6 tokens, not behind {start}"):
                runner.forward(Segments(text[6:7], 0, np.array([start]), np.array([1])), np.arange(1))
        with pytest.raises(RuntimeError, match="behind 6 to 6 tokens, not behind 4"):
            runner.copy_rows(0, [1], 4)
        runner.forward(Segments(text[6:7], 0, np.array([6]), np.array([1])), np.arange(1))


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_a_forward_that_fails_half_way_leaves_the_states_right(family, monkeypatch):
    """A drafter that runs the policy over its cache may fail; only its drafts are lost then."""
    rows, (a, b) = Rows(policy(family)), texts(2)
    with rows.runner.session(rows.cache):
        rows.forward({0: a[:5], 1: b[:7]}, settled=np.array([5, 7]))
        rows.forward({0: a[5:8], 1: b[7:9]}, rejected=[2, 1])
        last = rows.runner.recurrent[max(rows.runner.recurrent)]
        with monkeypatch.context() as failing:
            failing.setattr(last, "convolved", lambda window: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rows.forward({0: b[:1], 1: a[:1]}, settled=np.array([8, 9]))
        rows.forward({0: a[8:10], 1: b[9:10]}, rejected=[1, 2])
        rows.forward({0: a[10:11], 1: b[10:14]})


def test_memory_counts_the_states():
    runner = InProcessRunner(policy("qwen3_next"))
    with runner.session(cache := runner.new_cache(4, LENGTH)):
        before = runner.state_cells
        prompt = Segments(texts(1)[0], 0, np.zeros(1, int), np.array([LENGTH]), settled=np.array([LENGTH]))
        runner.forward(prompt, np.arange(1))
        # Two heads of keys, four of values, of 8 and 16 numbers; three tokens that a convolution looks back at.
        channels, state = 2 * 2 * 8 + 4 * 16, 4 * 8 * 16
        assert cache.state_bytes == 3 * 4 * (state + 3 * (channels + 2 * 4))
        assert runner.state_cells == -(-cache.state_bytes // cache.cell_bytes)
        assert before >= runner.state_cells  # with what is recorded of drafts
        held = cache.num_bytes
        runner.reserve(3, LENGTH)
        assert cache.num_bytes == 3 * held


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_rows_are_there_wherever_resizing_ends(family, monkeypatch):
    """Two layers of each kind: keys, values and records, and states if the family has any."""
    model, (a, b) = policy(family), texts(2)
    tensors = 8 if family == "qwen3_5_text" else 6
    for failing in range(tensors):
        rows, left = Rows(model), [failing]

        def full(like, *shape, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError
            return allocated(like, *shape)

        with rows.runner.session(rows.cache):
            rows.forward({0: a[:5], 1: b[:7]}, settled=np.array([5, 7]))
            with monkeypatch.context() as failing_from:
                for module in (ragged_attention, recurrent_rows):
                    failing_from.setattr(module, "allocated", full)
                with pytest.raises(MemoryError):
                    rows.cache.reserve(5, 7)
            assert rows.cache.held_rows == 2
            rows.runner.reserve(3, 7)
            rows.copy(1, [2])
            rows.copy(0, [4])
            rows.forward({0: a[5:7], 1: b[7:8], 2: a[:2], 4: b[:3]}, rejected=[1, 0, 2, 1])


def test_a_layer_whose_formula_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(GatedDelta, "fields", (*GatedDelta.fields, "something_of_a_later_version"))
    assert recurrent_layers(policy("qwen3_5_text")) == {}
    with pytest.raises(ValueError, match=r"has layers of type 'linear_attention'.*Qwen3\.5.*; generate with"):
        InProcessRunner(policy("qwen3_5_text"))
