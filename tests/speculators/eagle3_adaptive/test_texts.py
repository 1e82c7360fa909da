"""What the adaptive EAGLE-3 head keeps to learn from: no more positions than its limit, prompts included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from atlas_rl.speculators.eagle3_adaptive.learner import RefineSettings
from atlas_rl.speculators.eagle3_adaptive.texts import TextBuffer, batch_of, num_positions
from tests.speculators.eagle3_adaptive.engines import LAYERS, adaptive, engine_of, rollout

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


def test_versions_may_jump_by_any_number():
    texts, buffer, rng = logged()[0].learner.log.texts(), TextBuffer(16_384), np.random.default_rng(0)
    buffer.add(texts)
    assert len(buffer.sample(4, 20_000, rng)) == 4, "the newest, however old"
    buffer.add([replace(texts[0], version=20_000)])
    drawn = buffer.sample(4, 20_000, rng)
    assert sorted(text.version for text in drawn) == [0, 0, 0, 20_000]
