"""Sinks, shared keys and values, wrappers around text policies: one seed, one text, whatever drafts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from atlas_rl.core import SamplingParams
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from benchmarks.tiny_policies import build
from tests.drafters import Parrot, RandomDrafter, recurrent_drafter
from tests.engines import VOCAB, engine_of, generate
from tests.exact import FALSE_ALARM, p_value, sequence_probabilities
from tests.families import drafting, logprobs_of, made, policy, reference

SHARED = "gemma4_text, shared keys and values"
KINDS = ["gpt_oss", "granite_swa", "mimo_v2_flash", SHARED, "gemma3n_text"]
TWO = ["gpt_oss", SHARED]
WRAPPERS = ["qwen2_5_vl", "qwen3_vl", "qwen3_5"]


def assert_drafts_change_nothing(model, wanted):
    """Rows for four of ten requests: the others wait, and rows move when some end."""
    output = generate(drafting(model, Parrot(wanted.completion_ids, error_rate=0.3), max_batch_size=4))
    assert output.completion_ids == wanted.completion_ids
    assert 0 < output.report.acceptance_rate < 1
    for prompt, completion, logprobs in zip(wanted.prompt_ids, wanted.completion_ids, output.logprobs, strict=True):
        assert np.allclose(logprobs, logprobs_of(model, prompt, completion), atol=1e-3)


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
    model, prompt = build("qwen2_5_vl", wrapper=True), [5, 9, 4, 11, 30]
    own = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.model.rope_deltas = torch.tensor([[7]])  # as after a prompt with an image
    output = generate(
        drafting(model, RandomDrafter()),
        [prompt],
        temperature=0.0,
        max_new_tokens=14,
        eos_token_ids=[],
        num_generations=1,
    )
    assert output.completion_ids == [own[0, len(prompt) :].tolist()]


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
    engine = drafting(policy(family), DRAFTERS[drafter](policy(family)))
    generate(engine, max_new_tokens=6)
    engine.policy_updated()
    output = generate(engine)
    assert output.completion_ids == reference(family).completion_ids
    assert sum(output.report.drafted.values()) > 0
    assert not output.report.warnings


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
    model, prompt, new = made(family, vocab_size=4, logit_std=1.2), [1, 3, 2], 4
    engine = drafting(model, RandomDrafter(with_probs=True), 2, verification=verification)
    output = engine.generate([prompt], num_generations=2500, max_new_tokens=new, eos_token_ids=[0], seed=11)
    assert output.report.accepted["random"] > 0
    expected = sequence_probabilities(model, prompt, SamplingParams(max_new_tokens=new, eos_token_ids=(0,)))
    assert p_value(output.completion_ids, expected) > FALSE_ALARM
