"""vLLM with our proposer generates exactly the policy's tokens. To be run on every new vLLM version before it is allowed.

Distributions are compared over whole sequences, as in tests/exact.py: the seeds are fixed, and over fresh ones a comparison
raises a false alarm with probability `FALSE_ALARM`.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import SamplingParams
from atlas_rl.vllm import internals
from atlas_rl.vllm.internals import runner
from atlas_rl.vllm.internals.version import since
from tests.drafters import RandomDrafter
from tests.exact import CERTAIN, FALSE_ALARM, p_value, sequence_probabilities
from tests.models import tiny_llama
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

PROMPT = [1, 2, 1, 2, 1]
SAMPLES = 3000


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_llama(vocab=6, hidden=64, heads=2, kv_heads=2, logit_std=1.5)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    return engine(folder, max_num_seqs=256)


def rollouts(llm: Any, seed: int = 0, **options: Any) -> Any:
    """With drafts that are wrong as often as not, and always asked for."""
    drafter = RandomDrafter()
    controller = FixedController([drafter.name], drafter.name, 3)
    made = AtlasRolloutEngine(model=llm, speculators=[drafter], controller=controller, console=False)
    given: dict[str, Any] = {"max_new_tokens": 4, "eos_token_ids": [5], "seed": seed, "num_generations": SAMPLES}
    return made.generate([PROMPT], **(given | options))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"top_k": 3}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_whole_sequences_have_the_policys_distribution(policy: Any, llm: Any, options: dict[str, float]) -> None:
    output = rollouts(llm, **options)
    assert output.report.drafted["random"] > SAMPLES
    assert 0 < output.report.accepted["random"] < output.report.drafted["random"]
    sampling = SamplingParams(max_new_tokens=4, eos_token_ids=(5,), **options)  # type: ignore[arg-type]
    assert p_value(output.completion_ids, sequence_probabilities(policy, PROMPT, sampling)) > FALSE_ALARM


def test_the_cpu_sampler_is_wrong_without_the_repair_and_right_with_it(
    policy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams as VllmParams
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        pytest.skip("the fault is of vLLM's CPU backend")
    if str(internals.installed_version()).startswith("0.30."):
        pytest.skip(
            "vLLM 0.30's own rejection sampler raises on CPUs: it looks for the arguments of a kernel in a stand-in"
        )
    sampling = SamplingParams(max_new_tokens=4, eos_token_ids=(5,), temperature=0.5)
    expected = sequence_probabilities(policy, PROMPT, sampling)
    internals.repair_cpu_sampler()
    repaired = rejection_sampler.expand_batch_to_tokens
    # vLLM's own n-gram drafts and rejection sampler, at a temperature that is not 1.
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    own = engine(folder, max_num_seqs=256, speculative_config=ngram)
    params = VllmParams(n=SAMPLES, temperature=0.5, max_tokens=4, stop_token_ids=[5], detokenize=False)

    def samples() -> list[list[int]]:
        return completions(own.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False))

    assert p_value(samples(), expected) > FALSE_ALARM
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", repaired.__wrapped__)
    assert p_value(samples(), expected) < CERTAIN


def test_a_version_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.33.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.33\.1 is not known"):
        internals.check_version()


def test_an_internal_is_chosen_by_the_version_and_not_by_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, newer in (("0.27.1", False), ("0.28.0", True), ("0.28.3+cpu", True), ("0.32.0", True)):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert since("0.28") is newer


def test_steps_without_drafts_are_sampled_alike_as_vllm_before_032_hands_them_over(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those versions hand over no metadata of drafts for them: so every version runs what they need."""
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
    options |= {"seed": 7, "num_generations": 16, "max_new_tokens": 30}
    expected = rollouts(llm, **options)
    own, steps = runner.draft_metadata, []

    def without(spec: Any, num_rows: int, device: torch.device) -> Any:
        if spec is not None and any(spec.num_draft_tokens):
            return spec
        steps.append(num_rows)
        return own(None, num_rows, device)

    monkeypatch.setattr(runner, "draft_metadata", without)
    found = rollouts(llm, **options)
    assert steps
    assert found.completion_ids == expected.completion_ids
    assert found.logprobs == expected.logprobs


def test_a_method_that_takes_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def propose_draft_token_ids(self: Any, scheduler_output: Any, hidden_states: Any) -> None:
        """As another version might have it."""

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", propose_draft_token_ids)
    with pytest.raises(ValueError, match="propose_draft_token_ids than atlas_rl knows"):
        internals.install()


def test_one_seed_gives_one_text_whatever_is_drafted_here_and_in_process(policy: Any, llm: Any) -> None:
    drafted = rollouts(llm, seed=7, num_generations=64, max_new_tokens=40)
    plain = AtlasRolloutEngine(model=llm, speculation=False, console=False)
    in_process = AtlasRolloutEngine(model=policy, console=False)
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": [5], "seed": 7, "num_generations": 64}
    assert plain.generate([PROMPT], **options).completion_ids == drafted.completion_ids
    ours = in_process.generate([PROMPT], **options)
    assert ours.completion_ids == drafted.completion_ids
    differences = [np.abs(np.subtract(a, b)).max() for a, b in zip(ours.logprobs, drafted.logprobs, strict=True)]
    assert max(differences) < 1e-4


def test_logprobs_are_those_of_a_plain_forward(policy: Any, llm: Any) -> None:
    output = rollouts(llm, num_generations=8, max_new_tokens=60, temperature=0.8)
    for completion, logprobs in zip(output.completion_ids, output.logprobs, strict=True):
        ids = torch.tensor([[*PROMPT, *completion]])
        with torch.no_grad():
            logits = policy(ids).logits[0, len(PROMPT) - 1 : -1].float() / 0.8
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)


def test_greedy_decoding_equals_vllm_without_speculation(folder: Path, llm: Any) -> None:
    from vllm import SamplingParams as VllmParams

    drafted = rollouts(llm, num_generations=4, max_new_tokens=60, temperature=0.0)
    plain = engine(folder, speculative_config=None)
    params = VllmParams(temperature=0.0, max_tokens=60, stop_token_ids=[5], detokenize=False)
    expected = completions(plain.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False))
    assert drafted.completion_ids == expected * 4
    # Logprobs as well, the likeliest tokens' and ranks included.
    params.logprobs = 3
    theirs, ours = (
        one.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0].outputs[0].logprobs
        for one in (plain, llm)
    )
    assert [{token: entry.rank for token, entry in each.items()} for each in ours] == [
        {token: entry.rank for token, entry in each.items()} for each in theirs
    ]
    for mine, its in zip(ours, theirs, strict=True):
        assert [mine[token].logprob for token in its] == pytest.approx(
            [entry.logprob for entry in its.values()], abs=1e-4
        )


def test_requests_of_plain_vllm_calls_draw_with_their_own_seeds(llm: Any) -> None:
    """Seeds, several samples of one request, logprobs and requests without a seed, as any user of vLLM asks for them."""
    from vllm import SamplingParams as VllmParams

    def ask(**options: Any) -> Any:
        params = VllmParams(temperature=1.0, max_tokens=30, ignore_eos=True, detokenize=False, **options)
        return llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)

    one, again = completions(ask(seed=3, n=4)), completions(ask(seed=3, n=4))
    assert one == again
    assert len({tuple(tokens) for tokens in one}) == 4
    assert completions(ask()) != completions(ask())
    tops = ask(seed=3, logprobs=2)[0].outputs[0].logprobs
    assert all(2 <= len(entry) <= 3 for entry in tops)
