"""Samples have exactly the policy's distribution, whatever drafts, verifies or truncates; and a biased sampler is caught."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from atlas_kernels.noise import Stream, request_keys
from atlas_rl import AtlasRolloutEngine, SamplingParams
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.sampling import verification
from atlas_rl.sampling.verification import Positions, RejectionSampling, choose
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from atlas_rl.training.eagle3 import TrainSettings, new_head
from tests.dflash import head_for
from tests.drafters import RandomDrafter, TrimByDrawnToken
from tests.exact import CERTAIN, FALSE_ALARM, p_value, sequence_probabilities
from tests.models import tiny_llama

VOCAB, PROMPT, NEW, SAMPLES = 5, [1, 3, 2], 3, 6000
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.75, "temperature": 1.3},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.5},
    "everything": {"temperature": 1.2, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
}

MASKED = {"mask_token_id": 4, "target_layer_ids": [0]}


@cache
def policy() -> PreTrainedModel:
    return tiny_llama(vocab=VOCAB, seed=3, logit_std=1.5)


@cache
def drafter() -> PreTrainedModel:
    """Disagrees with the policy, but not wildly: every branch of rejection sampling is taken."""
    return tiny_llama(vocab=VOCAB, layers=1, seed=4, logit_std=1.0)


@cache
def enumerated(name: str) -> dict[tuple[int, ...], float]:
    sampling = SamplingParams(max_new_tokens=NEW, eos_token_ids=(0,), **SAMPLINGS[name])
    return sequence_probabilities(policy(), PROMPT, sampling)


SPECULATORS = {
    "history": HistorySpeculator,
    "draft_lm": lambda: DraftLM(drafter(), VOCAB),
    # Both know three of the five tokens: the policy samples what they cannot propose.
    "recurrent": lambda: RecurrentSpeculator(max_vocab=3, budget_share=20.0, clock=itertools.count().__next__),
    "eagle3": lambda: Eagle3Speculator(
        new_head(InProcessView(policy()), TrainSettings(layers=(0, 1)), np.array([1, 2, 4]))
    ),
    "dflash": lambda: DFlashSpeculator(
        head_for(policy(), block_size=3, dflash_config=MASKED)
    ),  # two independent tokens
    "dspark": lambda: DFlashSpeculator(head_for(policy(), markov_rank=2, block_size=2, dflash_config=MASKED)),
    "fp4_self": Fp4SelfSpeculator,
    "random": RandomDrafter,
    "random_with_probs": lambda: RandomDrafter(with_probs=True),
}


def sample(
    speculator: Speculator | None, verifier: str, sampling: dict[str, Any], num_samples: int = SAMPLES, **options: Any
) -> list[list[int]]:
    """`num_samples` completions; the speculator drafts on every step."""
    if speculator is None:
        engine = AtlasRolloutEngine(model=policy(), speculation=False, verification=verifier, console=False)
    else:
        controller = options.pop("controller", FixedController)([speculator.name], speculator.name, 2)
        engine = AtlasRolloutEngine(
            model=policy(), speculators=[speculator], controller=controller, verification=verifier, console=False
        )
        # Rollouts to draft from: a history without them has nothing to say in three tokens.
        engine.generate([PROMPT], num_generations=300, max_new_tokens=NEW, eos_token_ids=[0], seed=5, **sampling)
        engine.policy_updated()
    output = engine.generate(
        [PROMPT], num_generations=num_samples, max_new_tokens=NEW, eos_token_ids=[0], seed=11, **sampling
    )
    if speculator is not None:
        assert output.report.drafted[speculator.name] > 0
    return output.completion_ids


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_sampler_is_exact(sampling: str) -> None:
    assert p_value(sample(None, "invariant", SAMPLINGS[sampling]), enumerated(sampling)) > FALSE_ALARM


def is_quick(speculator: str, verifier: str, sampling: str) -> bool:
    """Every speculator under plain sampling, and one whose drafts are rejected by their probabilities under all options."""
    usual = verifier == "invariant" and sampling == "plain"
    return usual or (speculator, verifier, sampling) == ("random_with_probs", "rejection", "everything")


CASES = [
    pytest.param(*case, marks=() if is_quick(*case) else pytest.mark.slow)
    for case in itertools.product(SPECULATORS, ["invariant", "rejection"], SAMPLINGS)
]


@pytest.mark.parametrize(("speculator", "verifier", "sampling"), CASES)
def test_speculation_is_exact(speculator: str, verifier: str, sampling: str) -> None:
    samples = sample(SPECULATORS[speculator](), verifier, SAMPLINGS[sampling])
    assert p_value(samples, enumerated(sampling)) > FALSE_ALARM


def test_the_test_itself_catches_a_shifted_distribution() -> None:
    samples = sample(None, "invariant", {"temperature": 0.8})
    assert p_value(samples, enumerated("plain")) < CERTAIN


def test_trimming_by_the_drawn_token_biases_rejection_and_is_caught() -> None:
    samples = sample(DraftLM(drafter(), VOCAB), "rejection", {}, controller=TrimByDrawnToken)
    assert p_value(samples, enumerated("plain")) < CERTAIN


def test_trimming_by_the_drawn_token_cannot_bias_invariant_sampling() -> None:
    samples = sample(DraftLM(drafter(), VOCAB), "invariant", {}, controller=TrimByDrawnToken)
    assert p_value(samples, enumerated("plain")) > FALSE_ALARM


@pytest.mark.parametrize("shared", [False, True])
def test_noise_shared_between_draft_and_recovery_is_caught(shared: bool) -> None:
    """The class of bug of vLLM#54282: the drafter draws with the noise that recovery uses."""
    rows = 200_000
    p, q = torch.tensor([0.45, 0.35, 0.15, 0.05]), torch.tensor([0.05, 0.15, 0.2, 0.6])
    keys, indices = request_keys(seed=2, num_requests=rows), np.full(rows, 7)
    stream = Stream.RECOVER if shared else Stream.DRAFT
    drafts = choose(q.repeat(rows, 1), keys, indices, stream, greedy=False)
    positions = Positions(p.repeat(rows, 1), keys, indices, drafts, q.repeat(rows, 1))
    tokens, accepted = RejectionSampling().decide(positions, SamplingParams(max_new_tokens=1))
    assert accepted.mean() == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.01)
    value = stats.chisquare(np.bincount(tokens, minlength=4), p.numpy() * rows).pvalue
    assert value < CERTAIN if shared else value > FALSE_ALARM


def test_a_rejection_sampler_that_recovers_from_p_itself_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sloppy(RejectionSampling):
        def decide(self, positions: Positions, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
            tokens, accepted = super().decide(positions, sampling)
            anew = choose(positions.probs, positions.keys, positions.indices, Stream.RECOVER, greedy=False)
            return np.where(accepted, tokens, anew), accepted

    monkeypatch.setitem(verification.VERIFIERS, "rejection", Sloppy)
    samples = sample(HistorySpeculator(), "rejection", {})
    assert p_value(samples, enumerated("plain")) < CERTAIN
