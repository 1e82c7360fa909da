"""What the adaptive EAGLE-3 head keeps to learn from: no more positions than its limit, prompts included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from atlas_rl.core import Hidden, Prompts, SamplingParams, Sequences, Verified
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.eagle3_adaptive.call_log import CallLog
from atlas_rl.speculators.eagle3_adaptive.learner import RefineSettings
from atlas_rl.speculators.eagle3_adaptive.texts import TextBuffer, batch_of, num_positions
from tests.speculators.eagle3_adaptive.engines import LAYERS, adaptive, engine_of, policy, rollout

LONG = [[7 * n % 61 + k for n in range(40)] for k in range(3)]


def test_a_call_larger_than_the_buffer_is_sampled():
    speculator = adaptive(settings=RefineSettings(max_tokens=60))
    engine = engine_of(speculator)
    output = rollout(engine, 3)
    texts = speculator.learner.log.texts()
    assert 0 < sum(map(len, texts)) <= 60
    assert sum(map(len, output.completion_ids)) > 120
    assert len({id(text.prompt) for text in texts}) > 1  # of several prompts
    assert all(text.features[LAYERS[0]].shape[0] == len(text) - 1 for text in texts)
    engine.policy_updated()
    assert speculator.refreshes


def logged(max_tokens=16_384):
    """A speculator that has logged a call of long prompts."""
    speculator = adaptive(settings=RefineSettings(max_tokens=max_tokens))
    engine = engine_of(speculator)
    engine.generate(LONG, num_generations=2, max_new_tokens=12, eos_token_ids=[], seed=1)
    return speculator, engine


def test_only_what_is_read_of_a_prompt_is_kept(monkeypatch):
    texts_module = "atlas_rl.speculators.eagle3_adaptive.texts"
    monkeypatch.setattr(f"{texts_module}._BEFORE", 8)
    batches = []
    for rows in (40, 9):
        monkeypatch.setattr(f"{texts_module}._PROMPT_ROWS", rows)
        texts = logged()[0].learner.log.texts()
        assert [len(text.prompt) for text in texts] == [40] * 6
        assert {len(states) for text in texts for states in text.prompt.features.values()} == {rows}
        monkeypatch.setattr(f"{texts_module}._ROWS", 4)  # so that stretches begin anywhere in the drawn tokens
        drawn = [batch_of(texts, LAYERS, np.random.default_rng(seed)) for seed in range(5)]
        monkeypatch.setattr(f"{texts_module}._ROWS", 64)
        batches.append([*drawn, batch_of(texts, LAYERS, np.random.default_rng(0))])
    for whole, cut in zip(*batches, strict=True):
        assert torch.equal(whole.known, cut.known)
        assert torch.equal(whole.drawn_from, cut.drawn_from)
        for one, other in ((whole.rows, cut.rows), (whole.before, cut.before)):
            assert torch.equal(one.starts, other.starts)
            assert torch.equal(one.embeddings, other.embeddings)
            assert all(torch.equal(one.features[layer], other.features[layer]) for layer in LAYERS)


def test_prompts_count_towards_the_buffer_once():
    texts = logged()[0].learner.log.texts()
    assert num_positions(texts) == 3 * 40 + 6 * 12
    texts = logged(max_tokens=110)[0].learner.log.texts()  # 72 tokens are drawn in all
    assert texts
    assert num_positions(texts) <= 110
    speculator, engine = logged(max_tokens=300)
    engine.generate(LONG, num_generations=2, max_new_tokens=12, eos_token_ids=[], seed=2)
    speculator.learner.end_call()
    assert len(speculator.learner._buffer._calls) == 1


def test_a_log_that_one_prompt_fills_takes_no_more():
    log = logged(max_tokens=30)[0].learner.log
    assert len({id(states) for states in log._prompts.values()}) <= 1


@pytest.mark.parametrize("running", [[1, 3], [2, 3], [0, 1, 2, 3], [3]])
def test_a_log_that_overflows_keeps_requests_that_are_logged(running):
    """Some requests of a call may never be logged: their prompt was found in a cache, or other drafters had them."""
    view, requests = InProcessView(policy()), np.array(running)
    sequences = Sequences(
        token_ids=np.ones((4, 64), np.int32),
        lengths=np.full(4, 4),
        prompt_lengths=np.full(4, 2),
        prompt_keys=np.zeros(4, np.int64),
        noise_keys=np.zeros(4, np.uint64),
        sampling=SamplingParams(max_new_tokens=60),
        vocab_size=64,
        policy_version=0,
    )
    log = CallLog(sequences, (0,), max_tokens=6)
    log.start(Prompts([requests], Hidden(np.zeros(1, np.int64), torch.zeros(0, 32), {0: torch.zeros(2, 32)})), view)
    rows = len(running)
    for step in range(3):
        if not log._kept[requests].any():
            break
        states = torch.zeros(2 * rows, 32)
        verified = Verified(
            requests=requests,
            token_ids=np.ones((rows, 2), np.int64),
            num_committed=np.full(rows, 2),
            num_accepted=np.ones(rows, np.int64),
            num_drafted=np.ones(rows, np.int64),
            finished=np.zeros(rows, bool),
            hidden=Hidden(2 * np.arange(rows), states, {0: states}),
        )
        log.observe(verified, np.full(rows, 4 + 2 * step), view)
    texts = log.texts()
    assert texts
    assert sum(map(len, texts)) >= 2


def test_a_call_of_which_nothing_is_logged_has_no_texts():
    log = logged()[0].learner.log
    log._entries, log._num_logged = [entry.of(np.zeros(len(entry.requests), bool)) for entry in log._entries], 0
    assert log.texts() == []


def test_versions_may_jump_by_any_number():
    texts, buffer, rng = logged()[0].learner.log.texts(), TextBuffer(16_384), np.random.default_rng(0)
    buffer.add(texts)
    assert len(buffer.sample(4, 20_000, rng)) == 4, "the newest, however old"
    buffer.add([replace(texts[0], version=20_000)])
    drawn = buffer.sample(4, 20_000, rng)
    assert sorted(text.version for text in drawn) == [0, 0, 0, 20_000]
