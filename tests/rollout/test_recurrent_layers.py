"""Policies with recurrent layers: one seed, one text, whatever drafts; and the policy's own distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from atlas_rl.core import SamplingParams
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.training.eagle3 import TrainSettings, new_head
from benchmarks.tiny_policies import build
from tests.drafters import Parrot, RandomDrafter, recurrent_drafter
from tests.engines import PROMPTS, VOCAB, engine_of, generate
from tests.exact import FALSE_ALARM, p_value, sequence_probabilities
from tests.families import drafting, logprobs_of, policy, reference
from tests.models import HYBRIDS

TWO = ["lfm2", "qwen3_5_text"]


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_tokens_do_not_depend_on_drafts_and_are_the_policys(family):
    wanted = reference(family)
    # Rows for four of ten requests: the others wait, and rows move when some end.
    output = generate(drafting(policy(family), Parrot(wanted.completion_ids, error_rate=0.3), max_batch_size=4))
    assert output.completion_ids == wanted.completion_ids
    assert 0 < output.report.acceptance_rate < 1
    for prompt, completion, logprobs in zip(wanted.prompt_ids, wanted.completion_ids, output.logprobs, strict=True):
        assert np.allclose(logprobs, logprobs_of(policy(family), prompt, completion), atol=1e-3)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "bamba"])
def test_greedy_tokens_are_those_of_transformers_own_generate(family):
    model, prompt = policy(family), [5, 9, 4, 11, 30]
    own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = generate(
        drafting(model, RandomDrafter()),
        [prompt],
        temperature=0.0,
        max_new_tokens=14,
        eos_token_ids=[],
        num_generations=1,
    )
    assert output.completion_ids == [own[0, len(prompt) :].tolist()]


DRAFTERS = {
    "recurrent head": lambda model: recurrent_drafter(),
    "eagle3": lambda model: Eagle3Speculator(
        new_head(InProcessView(model), TrainSettings(layers=(1, 2, 3)), np.arange(3, 60))
    ),
    "fp4": lambda model: Fp4SelfSpeculator(),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", TWO)
def test_drafters_that_read_or_run_the_policy_work(family, drafter):
    engine = drafting(policy(family), DRAFTERS[drafter](policy(family)))
    generate(engine, max_new_tokens=6)
    engine.policy_updated()
    output = generate(engine)
    assert output.completion_ids == reference(family).completion_ids
    assert sum(output.report.drafted.values()) > 0
    assert not output.report.warnings


@pytest.mark.parametrize("family", TWO)
def test_the_policy_drafting_for_itself_is_always_accepted(family):
    """With a cache of its own, whose states go back behind rejected drafts."""
    output = generate(drafting(policy(family), DraftLM(policy(family), VOCAB)))
    assert output.completion_ids == reference(family).completion_ids
    assert output.report.acceptance_rate == 1


def test_requests_that_wait_for_memory_have_the_same_tokens(monkeypatch):
    family = "lfm2"
    options = {"prompts": PROMPTS[:3], "max_new_tokens": 44, "eos_token_ids": [], "num_generations": 1}
    wanted = generate(engine_of(policy(family), speculation=False), **options)
    monkeypatch.setattr(InProcessRunner, "free_bytes", lambda self: 2 * self.row_bytes(46))
    output = generate(drafting(policy(family), Parrot(wanted.completion_ids, error_rate=0.1)), **options)
    assert output.completion_ids == wanted.completion_ids
    assert any("memory for the attention cache ran short" in warning for warning in output.report.warnings)


@pytest.mark.parametrize("family", TWO)
def test_adapters_of_recurrent_layers_count(family):
    model = get_peft_model(
        build(family, seed=2),
        LoraConfig(target_modules=["in_proj", "in_proj_qkv", "out_proj"], init_lora_weights=False),
    ).eval()
    wanted = generate(engine_of(model, speculation=False))
    assert wanted.completion_ids != reference(family).completion_ids
    output = generate(drafting(model, Parrot(wanted.completion_ids, error_rate=0.3)))
    assert output.completion_ids == wanted.completion_ids
    assert np.allclose(
        output.logprobs[0], logprobs_of(model, wanted.prompt_ids[0], wanted.completion_ids[0]), atol=1e-3
    )


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("family", TWO)
def test_samples_have_the_policys_distribution(family, verification):
    model, prompt, new = build(family, vocab_size=4, logit_std=1.2), [1, 3, 2], 4
    engine = drafting(model, RandomDrafter(with_probs=True), 2, verification=verification)
    output = engine.generate([prompt], num_generations=2500, max_new_tokens=new, eos_token_ids=[0], seed=11)
    assert output.report.accepted["random"] > 0
    expected = sequence_probabilities(model, prompt, SamplingParams(max_new_tokens=new, eos_token_ids=(0,)))
    assert p_value(output.completion_ids, expected) > FALSE_ALARM
