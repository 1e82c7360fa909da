"""The engine at the edges of a batch: waves, endings, full contexts; and the logprobs it returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from tests.drafters import Parrot, RandomDrafter
from tests.engines import (
    EOS,
    MAX_NEW,
    PROMPTS,
    SETTINGS,
    VOCAB,
    Mute,
    draft_model,
    engine_of,
    fixed,
    generate,
    policy,
    processed_logprobs,
    reference,
    tokenizer,
)
from tests.models import FACTORIES, tiny_llama


def test_rows_come_back_prompt_by_prompt():
    output = generate(engine_of(), num_generations=3)
    assert output.prompt_ids == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len(output.completion_ids) == len(output.logprobs) == 15
    assert [len(row) for row in output.logprobs] == [len(row) for row in output.completion_ids]
    # A request's noise is that of its row; so repeating the prompts by hand is the same.
    by_hand = generate(engine_of(), [prompt for prompt in PROMPTS for _ in range(3)], num_generations=1)
    assert by_hand.completion_ids == output.completion_ids


@pytest.mark.parametrize("max_batch_size", [1, 3, 9])
@pytest.mark.parametrize("speculation", [False, True])
def test_waves_give_the_same_tokens(max_batch_size, speculation):
    engine = engine_of(max_batch_size=max_batch_size, speculation=speculation)
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert max(active for _, active in output.report.active_batch_curve) <= max_batch_size


def test_waves_give_the_same_tokens_with_a_draft_lm():
    drafter = DraftLM(draft_model(), VOCAB)
    engine = engine_of(max_batch_size=3, speculators=[drafter], controller=FixedController(["draft_lm"], "draft_lm", 3))
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    unlimited = generate(fixed(DraftLM(draft_model(), VOCAB), 3)).report
    assert abs(output.report.acceptance_rate - unlimited.acceptance_rate) < 0.1


def test_a_prefill_in_chunks_gives_the_same_tokens(monkeypatch):
    from atlas_rl.decode import loop

    monkeypatch.setattr(loop, "PREFILL_TOKENS", 4)
    assert generate(engine_of()).completion_ids == reference().completion_ids


def test_a_batch_of_one():
    """Request 0 of a call has the same noise whatever the rest of the batch is."""
    output = generate(engine_of(), PROMPTS[:1], num_generations=1)
    assert output.completion_ids == reference().completion_ids[:1]
    assert output.report.num_requests == 1


def test_a_completion_ends_with_its_first_ending_token():
    endless = generate(engine_of(), eos_token_ids=[])
    assert {len(row) for row in endless.completion_ids} == {MAX_NEW}
    stopped = 0
    for row, full in zip(reference().completion_ids, endless.completion_ids, strict=True):
        ends = [i for i, token in enumerate(full) if token in EOS]
        assert row == full[: ends[0] + 1 if ends else None]
        stopped += bool(ends)
    assert 2 <= stopped < len(PROMPTS) * 2  # both happen


def test_drafts_behind_an_ending_token_are_dropped():
    endless = generate(engine_of(), eos_token_ids=[]).completion_ids
    output = generate(fixed(Parrot(endless, error_rate=0), 8))
    assert output.completion_ids == reference().completion_ids
    assert output.report.accepted == output.report.drafted  # neither accepted nor rejected behind the end


@pytest.mark.parametrize("speculation", [False, True])
def test_one_token(speculation):
    output = generate(engine_of(speculation=speculation), max_new_tokens=1)
    assert output.completion_ids == [row[:1] for row in reference().completion_ids]
    assert output.report.num_forwards == 0
    assert output.report.accepted_length == 1
    assert not output.report.warnings


def test_no_false_alarm_where_there_is_little_to_draft():
    assert not generate(fixed(RandomDrafter(), 3), max_new_tokens=2).report.warnings  # no room for a draft at all
    assert not generate(fixed(Mute(), 3), [[1]], max_new_tokens=6).report.warnings


@pytest.mark.parametrize("spare", [0, 1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_that_fills_the_context(family, spare):
    """Every position of the context is run, and one more token drawn from the last."""
    model = FACTORIES[family](context=32, seed=15)
    prompt = np.random.default_rng(0).integers(VOCAB, size=32 - spare).tolist()
    plain = generate(engine_of(model, speculation=False), [prompt, [1]], eos_token_ids=[], max_new_tokens=50)
    assert [len(row) for row in plain.completion_ids] == [spare + 1] * 2 + [32] * 2
    drafter = Parrot(plain.completion_ids, error_rate=0.2)
    engine = engine_of(model, speculators=[drafter], controller=FixedController(["parrot"], "parrot", 8))
    output = generate(engine, [prompt, [1]], eos_token_ids=[], max_new_tokens=50)
    assert output.completion_ids == plain.completion_ids


def test_greedy_is_what_transformers_generates():
    model = tiny_llama(seed=16)
    prompts = [*PROMPTS, list(range(30)), [9] * 17]
    output = generate(
        engine_of(model), prompts, temperature=0.0, eos_token_ids=[], num_generations=1, max_new_tokens=40
    )
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0)
    assert output.completion_ids == theirs[:, width:].tolist()
    assert len({tuple(row) for row in output.completion_ids}) >= len(prompts) - 1


def test_ending_tokens_come_from_tokenizer_and_policy():
    model = tiny_llama(seed=11)
    model.generation_config.eos_token_id = EOS[:2]
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer(eos=EOS[2]), console=False)
    assert generate(engine, eos_token_ids=None).completion_ids == reference().completion_ids


@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs_are_those_of_a_plain_forward(setting):
    output = generate(fixed(Parrot(reference(setting).completion_ids, error_rate=0.3), 5), **SETTINGS[setting])
    entropy, likeliest = [], []
    for prompt, completion, logprobs in zip(output.prompt_ids, output.completion_ids, output.logprobs, strict=True):
        rows = processed_logprobs(policy(), prompt, completion, SETTINGS[setting])
        own = rows.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (own - torch.tensor(logprobs)).abs().max() < 1e-4
        entropy += torch.special.entr(rows.exp()).sum(-1).tolist()
        likeliest += rows.exp().amax(-1).tolist()
    assert output.report.entropy == pytest.approx(np.mean(entropy), abs=1e-4)
    assert output.report.mean_max_prob == pytest.approx(np.mean(likeliest), abs=1e-4)


def test_greedy_logprobs_are_the_policys_own():
    output = generate(engine_of(), temperature=0.0)
    for prompt, completion, logprobs in zip(output.prompt_ids, output.completion_ids, output.logprobs, strict=True):
        rows = processed_logprobs(policy(), prompt, completion, {})
        assert (rows.amax(-1) - torch.tensor(logprobs)).abs().max() < 1e-4
