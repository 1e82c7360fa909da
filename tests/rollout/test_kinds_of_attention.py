"""Sinks, shared keys and values, wrappers around text policies: one seed, one text, whatever drafts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from benchmarks.tiny_policies import build
from tests.drafters import Parrot, recurrent_drafter
from tests.engines import VOCAB, engine_of, generate
from tests.families import (
    assert_drafters_of_the_policy_work,
    assert_drafts_change_nothing,
    assert_greedy_tokens_are_transformers_own,
    assert_samples_have_the_policys_distribution,
    drafting,
    made,
    policy,
    reference,
)

SHARED = "gemma4_text, shared keys and values"
KINDS = ["gpt_oss", "granite_swa", "mimo_v2_flash", SHARED, "gemma3n_text"]
TWO = ["gpt_oss", SHARED]
WRAPPERS = ["qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.mark.parametrize("family", KINDS)
def test_the_tokens_do_not_depend_on_drafts_and_are_the_policys(family):
    assert_drafts_change_nothing(policy(family), reference(family))


@pytest.mark.parametrize("family", WRAPPERS)
def test_text_through_a_multimodal_wrapper(family):
    """Their positions have three dimensions, which are equal where there is text alone."""
    model = build(family, wrapper=True)
    assert_drafts_change_nothing(model, generate(engine_of(model, speculation=False)))


def test_greedy_tokens_of_a_wrapper_are_those_of_its_own_generate():
    """Which keeps an offset of positions on the model for the next call."""
    model = build("qwen2_5_vl", wrapper=True)
    assert hasattr(model.model, "rope_deltas")
    assert_greedy_tokens_are_transformers_own(model)


@pytest.mark.parametrize(("field", "what"), [("image_token_id", "an image"), ("video_token_id", "a video")])
def test_prompts_with_images_are_refused(field, what):
    model = build("qwen3_vl", wrapper=True, **{field: 61})
    engine = engine_of(model)
    generate(engine, [[5, 9], [3, 4]], max_new_tokens=2, num_generations=1)
    message = rf"request 1 has a place for {what} in its prompt \(token 61, the policy's {field}\).*text alone"
    with pytest.raises(ValueError, match=message):
        generate(engine, [[5, 9], [3, 61]], max_new_tokens=2, num_generations=1)


DRAFTERS = {
    "recurrent head": lambda model: recurrent_drafter(),
    "fp4": lambda model: Fp4SelfSpeculator(),
    "itself": lambda model: DraftLM(model, VOCAB),
}


@pytest.mark.parametrize(
    ("family", "drafter"), [("gpt_oss", "recurrent head"), *((SHARED, drafter) for drafter in DRAFTERS)]
)
def test_drafters_that_read_or_run_the_policy_work(family, drafter):
    assert_drafters_of_the_policy_work(family, DRAFTERS[drafter])


@pytest.mark.parametrize("family", TWO)
def test_adapters_count(family):
    adapter = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(made(family), adapter).eval()
    wanted = generate(engine_of(model, speculation=False))
    assert wanted.completion_ids != reference(family).completion_ids
    assert_drafts_change_nothing(model, wanted)


@pytest.mark.parametrize("family", TWO)
def test_under_autocast_drafts_change_nothing_but_near_ties(family):
    """Batches of another shape round differently."""
    with torch.autocast("cpu", torch.bfloat16):
        wanted = generate(engine_of(policy(family), speculation=False))
        output = generate(drafting(policy(family), Parrot(wanted.completion_ids, error_rate=0.3)))
    same = [a == b for a, b in zip(output.completion_ids, wanted.completion_ids, strict=True)]
    assert np.mean(same) >= 0.7
    assert not output.report.warnings  # the audit's among them


@pytest.mark.parametrize(("family", "verification"), [*product(TWO, ["invariant"]), ("gpt_oss", "rejection")])
def test_samples_have_the_policys_distribution(family, verification):
    assert_samples_have_the_policys_distribution(made(family, vocab_size=4, logit_std=1.2), verification)
