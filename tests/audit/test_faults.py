"""Every wrong way to sample is found by the audit, at once or over the steps, and named."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from atlas_rl.audit.auditor import Auditor
from atlas_rl.audit.scores import LOW_PRECISION
from tests.audit.audits import EOS, NEW, PROMPTS, asked, audit, sample
from tests.engines import VOCAB, policy
from tests.models import tiny_llama

WRONG = {
    "hotter": ({"temperature": 1.2}, {}, "times the temperature", -1),
    "colder": ({"temperature": 0.85}, {}, "times the temperature", 1),
    "temperature ignored": ({}, {"temperature": 0.6}, "times the temperature", -1),
    "greedy instead": ({"temperature": 0.0}, {}, "as if|too often", 1),
    "sampled instead of greedy": ({}, {"temperature": 0.0}, "not the policy's choice", 0),
    "top_p ignored": ({}, {"top_p": 0.8}, "probability 0", 0),
    "top_k ignored": ({}, {"top_k": 5}, "probability 0", 0),
    "min_p ignored": ({}, {"min_p": 0.1}, "probability 0", 0),
    "top_p not asked for": ({"top_p": 0.8}, {}, "as if|too often", 1),
    "penalty ignored": ({}, {"repetition_penalty": 1.8}, "repeated tokens come too often", 0),
    "penalty not asked for": ({"repetition_penalty": 1.8}, {}, "repeated tokens come too rarely", 0),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sampling_is_found_at_once_and_named(case):
    told, wanted, words, sign = WRONG[case]
    found = audit(sample(**told), asked(**wanted))
    assert any(re.search(words, finding) for finding in found.findings), found.findings
    if sign:
        assert found.scores.z * sign > 5  # too random is negative, too greedy positive


@pytest.mark.slow
@pytest.mark.parametrize(("told", "side"), [(1.05, 1), (0.95, -1)])
def test_a_slow_bias_is_found_over_the_steps(told, side):
    """Five percent of temperature: no single step shows it, and the run does."""
    auditor, steps = Auditor(1e3), []
    for step in range(40):
        found = audit(sample(num_generations=10, seed=step, temperature=told), asked(seed=step), auditor=auditor)
        steps.append(found)
        if found.findings:
            break
    assert 3 <= len(steps) < 40
    assert max(abs(step.scores.z) for step in steps) < 5
    factor = float(steps[-1].findings[0].split("drawn at ")[1].split()[0])
    assert (factor - 1) * side > 0


@pytest.mark.slow
def test_after_an_alarm_the_next_one_needs_evidence_of_its_own():
    auditor = Auditor(1e3)
    assert audit(sample(temperature=1.5), asked(), auditor=auditor).findings
    assert not audit(sample(), asked(), auditor=auditor).findings
    assert audit(sample(temperature=1.5), asked(), auditor=auditor).findings


@pytest.mark.slow
def test_a_fault_is_found_at_once_after_a_long_right_run():
    auditor = Auditor(1e3)
    for step in range(12):
        assert not audit(sample(seed=step, num_generations=5), asked(seed=step), auditor=auditor).findings
    assert audit(sample(num_generations=10, temperature=1.5), asked(), auditor=auditor).findings


def test_with_known_noise_one_percent_of_temperature_is_found_in_one_step():
    output = sample(temperature=1.01)
    assert not audit(output, asked()).findings
    (finding,) = audit(output, asked(), noise=True).findings
    assert "not the policy's choice" in finding


def test_tokens_at_random_are_found_in_one_completion():
    rng = np.random.default_rng(0)
    auditor = Auditor(1e-9)  # credit for no more than the first
    found = auditor.audit(policy(), [PROMPTS[0]], [rng.integers(VOCAB, size=NEW).tolist()], asked())
    assert found.num_completions == 1
    assert any("at random" in finding or "times the temperature" in finding for finding in found.findings)


def test_ending_tokens_that_are_cut_off_are_missed():
    output = sample(num_generations=60)
    cut = [row[:-1] if row[-1] in EOS else row for row in output.completion_ids]
    found = Auditor(1e3).audit(policy(), output.prompt_ids, cut, asked())
    assert "ending tokens come too rarely" in found.findings[0]


def drifted(scale):
    """The policy some optimizer steps ago: every weight off by a share of its layer's spread."""
    model = tiny_llama(seed=11)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * scale)
    return model


def test_a_stale_policy_is_found_by_its_logprobs_at_once():
    output = sample(drifted(0.01), num_generations=2)
    (finding,) = audit(output, asked(), logprobs=True).findings
    assert "other weights" in finding


@pytest.mark.slow
def test_a_stale_policy_is_found_by_its_tokens_too():
    found = audit(sample(drifted(0.3), num_generations=100), asked())
    assert "not drawn from the policy" in found.findings[0]
    assert found.scores.z < -5  # the newer policy finds the older one's tokens surprising


def test_shifted_logprobs_are_found():
    output = sample(num_generations=2)
    output.logprobs[:] = [[value + 0.005 for value in row] for row in output.logprobs]
    (finding,) = audit(output, asked(), logprobs=True).findings
    assert "differ from a plain forward pass by 0.005 nats" in finding


def test_logprobs_from_before_the_processing_are_named():
    options = {"temperature": 0.7, "top_p": 0.9}
    output = sample(num_generations=2, **options)
    output.logprobs[:] = [
        torch.log_softmax(policy()(torch.tensor([[*prompt, *row]])).logits[0].detach(), -1)[len(prompt) - 1 : -1]
        .gather(1, torch.tensor(row)[:, None])[:, 0]
        .tolist()
        for prompt, row in zip(output.prompt_ids, output.completion_ids, strict=True)
    ]
    (finding,) = audit(output, asked(**options), logprobs=True).findings
    assert "processed_logprobs" in finding


@pytest.mark.slow
def test_low_precision_is_told_from_a_fault():
    model = tiny_llama(seed=11).to(torch.bfloat16)
    for options in ({}, {"temperature": 0.6}, {"top_p": 0.8, "top_k": 20}):
        found = audit(
            sample(model, num_generations=8, **options), asked(**options), model=model, noise=True, logprobs=True
        )
        assert found.findings == ()
        assert 1e-4 < found.scores.logprob_error_mean_nats < LOW_PRECISION.logprob_nats / 2
    assert "not drawn from the policy" in audit(sample(model, temperature=1.3), asked(), model=model).findings[0]
