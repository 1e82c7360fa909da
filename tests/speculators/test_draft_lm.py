"""Draft LMs whose vocabulary or context is not the policy's: lossless, and only the rows concerned stop."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from tests.engines import SETTINGS, VOCAB, engine_of, fixed, generate, policy, reference
from tests.models import tiny_gpt2, tiny_llama

SIZES = (56, 72)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", ["plain", "penalty", "everything"])
def test_tokens_do_not_depend_on_its_padding(rows, name):
    engine = fixed(DraftLM(tiny_llama(vocab=rows, layers=1, seed=12), VOCAB), 3)
    output = generate(engine, **SETTINGS[name])
    assert output.completion_ids == reference(name).completion_ids
    assert output.report.accepted["draft_lm"] > 0
    assert any(token >= 56 for row in output.completion_ids for token in row)  # one that the small one lacks


@pytest.mark.parametrize("rows", SIZES)
def test_draft_probs_are_over_the_policys_vocabulary(rows):
    seen = []

    class Watched(DraftLM):
        def propose(self, *args):
            draft = super().propose(*args)
            seen.append(draft)
            return draft

    drafter = Watched(tiny_llama(vocab=rows, layers=1, seed=12), VOCAB)
    controller = FixedController(["draft_lm"], "draft_lm", 3)
    generate(engine_of(speculators=[drafter], controller=controller, verification="rejection"))
    for draft in seen:
        assert draft.draft_probs.shape == (*draft.token_ids.shape, VOCAB)
        for row, length in enumerate(draft.lengths):
            sums = draft.draft_probs[row, :length].sum(dim=-1)
            assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
            assert not draft.draft_probs[row, :length, rows:].any()


def test_a_draft_does_not_walk_through_its_modules(monkeypatch):
    """The first one of a call does, once. A walk takes as long as a small draft, and a session has several uses for it."""
    walks = []

    class Watched(DraftLM):
        def propose(self, *args):
            walk, seen = nn.Module.named_modules, []

            def noted(module, *rest, **options):
                seen.append(module)
                return walk(module, *rest, **options)

            with monkeypatch.context() as patch:
                patch.setattr(nn.Module, "named_modules", noted)
                draft = super().propose(*args)
            walks.append(len(seen))
            return draft

    generate(fixed(Watched(tiny_llama(layers=2, seed=12), VOCAB), 3))
    assert walks[0] > 0
    assert len(walks) > 3
    assert not any(walks[1:])


def test_rejection_is_lossless_with_fewer_rows():
    """First two tokens of 4,000 requests against those of plain decoding; a difference of 0.06 has a chance below 1e-4."""
    small = tiny_llama(vocab=7, layers=1, hidden=16, seed=5)
    large = tiny_llama(vocab=8, layers=1, hidden=16, seed=4)
    options = {"num_generations": 4000, "max_new_tokens": 2, "eos_token_ids": [], "seed": 1}

    def shares(engine):
        rows = Counter(tuple(row) for row in engine.generate([[1, 2]], **options).completion_ids)
        return np.array([rows[a, b] / 4000 for a in range(8) for b in range(8)])

    controller = FixedController(["draft_lm"], "draft_lm", 1)
    drafted = AtlasRolloutEngine(
        model=large, speculators=[DraftLM(small, 8)], controller=controller, verification="rejection", console=False
    )
    plain = AtlasRolloutEngine(model=large, speculation=False, console=False)
    assert np.abs(shares(drafted) - shares(plain)).max() < 0.06
    assert np.abs(shares(drafted) - shares(plain)).sum() / 2 < 0.1


def test_one_row_past_its_context_stops_alone():
    short = tiny_gpt2(context=24, seed=14)
    per_request = Counter()

    class Watched(DraftLM):
        def propose(self, sequences, requests, max_draft_tokens):
            draft = super().propose(sequences, requests, max_draft_tokens)
            for request, length in zip(requests, draft.lengths, strict=True):
                per_request[int(request)] += int(length)
                assert not length or sequences.lengths[request] + length <= 25
            return draft

    prompts = [[1, 2, 3], list(range(30)), [4] * 18]
    options = {"num_generations": 1, "eos_token_ids": [], "max_new_tokens": 14}
    wanted = generate(engine_of(speculation=False), prompts, **options).completion_ids
    assert generate(fixed(Watched(short, VOCAB), 4), prompts, **options).completion_ids == wanted
    alone = per_request.copy()
    per_request.clear()
    generate(fixed(Watched(short, VOCAB), 4), prompts[:1], **options)
    assert alone[0] == per_request[0] > 0  # as if the others were not there
    assert alone[1] == 0
    assert 0 < alone[2] <= 7 * 4


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"32 tokens.*64.*tokenizer"):
        DraftLM(tiny_llama(vocab=32), VOCAB)
    DraftLM(tiny_llama(vocab=32), VOCAB, same_tokenizer=True)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_llama(layers=1)
    with torch.no_grad():
        nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"NaN or infinity in 'lm_head.weight'"):
        AtlasRolloutEngine(model=policy(), draft_model=model, console=False)
