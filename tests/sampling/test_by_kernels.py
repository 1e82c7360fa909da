"""Dispatch to kernels: on a CPU nothing changes; where kernels run (here: interpreted) every decision is the eager one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from atlas_kernels.draft_head import draft_head
from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import SamplingParams
from atlas_rl.decode import generate as generate_module
from atlas_rl.policy.logits import NonFiniteLogits
from atlas_rl.policy.view import InProcessView
from atlas_rl.sampling import by_kernels as fused
from atlas_rl.sampling.by_kernels import FusedVerifier, verifier_on
from atlas_rl.sampling.verification import DrafterInvariant, RejectionSampling
from atlas_rl.speculators import head_sampling
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.recurrent import speculator as recurrent
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram, tiny_llama
from tests.verification import CPU, CUDA, VOCAB, case


@pytest.fixture
def interpreted():
    """Kernels on the CPU, one by one."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    return {"implementation": "triton"}


SAMPLINGS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "truncated": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 1.2},
    "penalty": {"repetition_penalty": 1.4, "temperature": 0.8},
    "greedy with a penalty": {"repetition_penalty": 1.4, "temperature": 0.0},
    "suppressed": {"suppress_tokens": (3, 5, 9), "temperature": 0.8},
}


@pytest.mark.parametrize(
    ("form", "with_probs", "sampling"),
    [
        *((DrafterInvariant, False, name) for name in SAMPLINGS),
        (RejectionSampling, False, "cold"),
        (RejectionSampling, False, "greedy"),
        (RejectionSampling, True, "plain"),
        (RejectionSampling, True, "truncated"),
        (RejectionSampling, True, "suppressed"),
    ],
)
def test_outcomes_are_those_of_the_eager_form(interpreted, form, with_probs, sampling):
    assert_same_outcome(interpreted, form, with_probs, sampling, [2, 0, 1])


@pytest.mark.parametrize("form", [DrafterInvariant, RejectionSampling])
def test_no_drafts_at_all(interpreted, form):
    assert_same_outcome(interpreted, form, False, "plain", [0, 0])


def assert_same_outcome(interpreted, form, with_probs, sampling, lengths):
    outcomes = []
    for verifier in (form(), FusedVerifier(form(), **interpreted)):
        params = SamplingParams(max_new_tokens=8, **SAMPLINGS[sampling])
        outcomes.append(verifier.verify(*case(lengths, params, with_probs=with_probs)))
    eager, kernel = outcomes
    assert np.array_equal(eager.num_accepted, kernel.num_accepted)
    assert np.array_equal(eager.token_ids, kernel.token_ids)
    for name in ("logprobs", "entropies", "max_probs"):
        np.testing.assert_allclose(getattr(kernel, name), getattr(eager, name), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("verifying", ["eager", "triton", "reference"])
@pytest.mark.parametrize("sampling", ["plain", "greedy", "truncated"])
@pytest.mark.parametrize(("form", "with_probs"), [(DrafterInvariant, False), (RejectionSampling, True)])
def test_logits_that_are_not_finite_are_refused_where_they_are_reached(verifying, sampling, form, with_probs):
    """Row 3, the first of request 1, is always reached; row 5 is not, because the request's first draft is wrong."""
    if verifying == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    verifier = form() if verifying == "eager" else FusedVerifier(form(), verifying)
    params = SamplingParams(max_new_tokens=8, **SAMPLINGS[sampling])
    for at, value in ((3, float("nan")), (3, float("-inf")), (5, float("nan"))):
        logits, draft, sequences, requests = case([2, 2], params, with_probs=with_probs)
        draft.token_ids[1, 0] = wrong = int(logits[3].argmin())
        if with_probs:
            draft.draft_probs[1, 0] = torch.zeros(VOCAB).index_fill(0, torch.tensor(wrong), 1.0)
        logits[at] = value
        if at == 3:
            with pytest.raises(NonFiniteLogits, match="policy's logits are not finite"):
                verifier.verify(logits, draft, sequences, requests)
        else:
            assert verifier.verify(logits, draft, sequences, requests).num_accepted[1] == 0


@pytest.mark.parametrize("form", [DrafterInvariant, RejectionSampling])
def test_many_rows_decide_alike(form):
    """By the kernels' references, which the kernels are tested to be: 2,400 drafted positions."""
    lengths = [4] * 600
    params = SamplingParams(max_new_tokens=8)
    eager = form().verify(*case(lengths, params, with_probs=form is RejectionSampling))
    fused_ = FusedVerifier(form(), "reference").verify(*case(lengths, params, with_probs=form is RejectionSampling))
    assert np.array_equal(eager.num_accepted, fused_.num_accepted)
    assert np.array_equal(eager.token_ids, fused_.token_ids)
    assert eager.num_accepted.sum() > 100


# -------------------------------------------------------------------------------------------------------- who dispatches


def test_on_a_cpu_and_without_triton_the_eager_form_stays(monkeypatch):
    form = DrafterInvariant()
    assert verifier_on(CPU, form) is form
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert verifier_on(CUDA, form) is form


@pytest.mark.parametrize("form", [DrafterInvariant, RejectionSampling])
def test_on_cuda_with_triton_the_kernels_do_it(form):
    pytest.importorskip("triton", reason="the kernels need Triton")
    verifier = verifier_on(CUDA, form())
    assert isinstance(verifier, FusedVerifier)
    assert verifier.couples_noise == form.couples_noise


def test_a_form_of_somebody_elses_is_not_replaced(monkeypatch):
    class Own(RejectionSampling):
        """Decides otherwise."""

    monkeypatch.setattr(fused, "kernels_run_on", lambda device: True)
    form = Own()
    assert verifier_on(CPU, form) is form


def generated(model, verification, speculators, num_generations=1, max_new_tokens=6, **options):
    name = speculators[0].name
    engine = AtlasRolloutEngine(
        model=model,
        speculators=speculators,
        controller=FixedController([name], name, 3),
        verification=verification,
        console=False,
    )
    options |= {"num_generations": num_generations, "max_new_tokens": max_new_tokens, "eos_token_ids": [17]}
    for seed in (4, 5):
        output = engine.generate([[5, 9, 2], [7]], seed=seed, **options)
        engine.policy_updated()
    return output


@pytest.mark.parametrize("verification", ["invariant", pytest.param("rejection", marks=pytest.mark.slow)])
def test_a_whole_generation_by_kernels_has_the_same_tokens(interpreted, monkeypatch, verification):
    model = tiny_llama(seed=5)
    eager = generated(model, verification, [Fp4SelfSpeculator()])
    calls = []

    def dispatched(device, form):
        calls.append(device)
        return FusedVerifier(form, **interpreted)

    monkeypatch.setattr(generate_module, "verifier_on", dispatched)
    by_kernels = generated(model, verification, [Fp4SelfSpeculator()])
    assert calls
    assert by_kernels.completion_ids == eager.completion_ids
    assert by_kernels.report.drafted == eager.report.drafted
    assert by_kernels.report.accepted == eager.report.accepted
    for ours, theirs in zip(by_kernels.logprobs, eager.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("verification", "options"),
    [
        pytest.param("invariant", {"temperature": 0.9}, marks=pytest.mark.slow),
        pytest.param("rejection", {}, marks=pytest.mark.slow),
        pytest.param("rejection", {"top_p": 0.8, "top_k": 20}, marks=pytest.mark.slow),
        ("invariant", {"temperature": 0.0}),
    ],
)
def test_the_recurrent_drafter_drafts_the_same_by_its_kernel(interpreted, monkeypatch, verification, options):
    model = tiny_bigram()
    options |= {"num_generations": 3}
    eager = generated(model, verification, [recurrent_drafter()], **options)
    calls = []

    def counted(*arguments, **named):
        calls.append(len(arguments))
        return draft_head(*arguments, **named, **interpreted)

    monkeypatch.setattr(recurrent, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(head_sampling, "draft_head", counted)
    by_kernel = generated(model, verification, [recurrent_drafter()], **options)
    assert calls
    assert by_kernel.completion_ids == eager.completion_ids
    assert by_kernel.report.drafted == eager.report.drafted
    assert by_kernel.report.accepted == eager.report.accepted


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.0}])
def test_the_head_kernel_draws_unless_only_the_drafter_takes_the_likeliest(options, monkeypatch):
    monkeypatch.setattr(recurrent, "kernels_run_on", lambda device: True)
    sampling = SamplingParams(max_new_tokens=8, **options)

    def by_kernel(**of_the_drafter):
        speculator = recurrent_drafter(**of_the_drafter)
        speculator.bind(InProcessView(tiny_bigram()), True)
        return speculator._draws_by_kernel(sampling)

    assert by_kernel()
    assert by_kernel(argmax=True) == sampling.greedy


@pytest.mark.slow
def test_nothing_here_loads_triton_on_a_cpu():
    """`import atlas_rl` does not (tests/test_package.py); drafting and verifying on a CPU does not either."""
    code = (
        "import sys; sys.modules['triton'] = None\n"  # importing it now raises
        "from tests.models import tiny_llama; from atlas_rl import AtlasRolloutEngine\n"
        "engine = AtlasRolloutEngine(model=tiny_llama(), draft_model='fp4', console=False)\n"
        "print(len(engine.generate([[1, 2]], max_new_tokens=4, eos_token_ids=[], seed=1).completion_ids[0]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "4"
