"""When the importance-sampling correction is switched off: only if the sampled logprobs are the trainer's own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.importance import ImportanceCheck

SAMPLING = SamplingParams(max_new_tokens=8, temperature=0.8)


def trainer(*, bf16: bool = False) -> Any:
    args = SimpleNamespace(bf16=bf16, fp16=False)
    return SimpleNamespace(vllm_importance_sampling_correction=True, args=args)


@pytest.fixture(scope="module")
def rollouts(llama: PreTrainedModel) -> Any:
    engine = AtlasRolloutEngine(model=llama, console=False)
    return engine.generate([[2, 3, 4], [5, 6]], max_new_tokens=8, temperature=0.8, eos_token_ids=(), seed=1)


def shifted(rollouts: Any, nats: float) -> Any:
    return replace(rollouts, logprobs=[[value + nats for value in row] for row in rollouts.logprobs])


@pytest.mark.parametrize(
    ("shift_nats", "bf16", "kept"),
    [(0.0, False, False), (0.01, False, True), (0.01, True, False), (0.5, True, True)],
)
def test_kept_where_logprobs_differ_by_more_than_rounding(
    shift_nats: float, bf16: bool, kept: bool, llama: PreTrainedModel, rollouts: Any
) -> None:
    checked = trainer(bf16=bf16)
    ImportanceCheck(checked, wanted=True).observe(llama, SAMPLING, shifted(rollouts, shift_nats))
    assert checked.vllm_importance_sampling_correction is kept


def test_the_first_rollouts_decide(llama: PreTrainedModel, rollouts: Any) -> None:
    checked = trainer()
    check = ImportanceCheck(checked, wanted=True)
    check.observe(llama, SAMPLING, shifted(rollouts, 0.5))
    check.observe(llama, SAMPLING, rollouts)
    assert checked.vllm_importance_sampling_correction


@pytest.mark.parametrize(
    ("wanted", "sampling"),
    [(False, SAMPLING), (True, replace(SAMPLING, top_p=0.9)), (True, replace(SAMPLING, repetition_penalty=1.1))],
    ids=["not wanted", "truncated", "penalised"],
)
def test_left_alone(wanted: bool, sampling: SamplingParams, llama: PreTrainedModel, rollouts: Any) -> None:
    checked = trainer()
    ImportanceCheck(checked, wanted=wanted).observe(llama, sampling, rollouts)
    assert checked.vllm_importance_sampling_correction
