"""Policies with recurrent layers: one seed, one text, whatever drafts; and the policy's own distribution."""

from __future__ import annotations

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.training.eagle3 import TrainSettings, new_head
from benchmarks.tiny_policies import build
from tests.drafters import Parrot, recurrent_drafter
from tests.engines import PROMPTS, VOCAB, engine_of, generate
from tests.families import (
    assert_drafters_of_the_policy_work,
    assert_drafts_change_nothing,
    assert_greedy_tokens_are_transformers_own,
    assert_samples_have_the_policys_distribution,
    drafting,
    logprobs_of,
    policy,
    reference,
)
from tests.models import HYBRIDS

TWO = ["lfm2", "qwen3_5_text"]


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_tokens_do_not_depend_on_drafts_and_are_the_policys(family):
    assert_drafts_change_nothing(policy(family), reference(family))


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "bamba"])
def test_greedy_tokens_are_those_of_transformers_own_generate(family):
    assert_greedy_tokens_are_transformers_own(policy(family))


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
    assert_drafters_of_the_policy_work(family, DRAFTERS[drafter])


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
    assert_samples_have_the_policys_distribution(build(family, vocab_size=4, logit_std=1.2), verification)
