"""When the importance-sampling correction is switched off: only if rollouts are drawn from what the trainer scores."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl import importance
from atlas_rl.integrations.trl.importance import ImportanceCheck
from tests.integrations.launch import reports_of
from tests.models import tiny_llama
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

SAMPLING = SamplingParams(max_new_tokens=24, temperature=0.8)


def trainer(*, temperature: float = 0.8, autocast: bool = False) -> Any:
    def precision() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, autocast=precision)
    return SimpleNamespace(
        vllm_importance_sampling_correction=True,
        use_vllm=True,
        temperature=temperature,
        accelerator=accelerator,
        model_wrapped=torch.nn.Identity(),
    )


@pytest.fixture(scope="module")
def rollouts(llama: PreTrainedModel) -> Any:
    engine = AtlasRolloutEngine(model=llama, console=False)
    return engine.generate([[2, 3, 4], [5, 6]], max_new_tokens=24, temperature=0.8, eos_token_ids=(), seed=1)


def shifted(rollouts: Any, nats: float) -> Any:
    return replace(rollouts, logprobs=[[value + nats for value in row] for row in rollouts.logprobs])


@pytest.mark.parametrize(
    ("shift_nats", "bf16", "kept"),
    [
        (0.0, False, False),
        (0.01, False, True),
        (0.01, True, False),
        (0.5, True, True),
        (float("nan"), False, True),
        (float("nan"), True, True),
    ],
)
def test_kept_where_logprobs_differ_by_more_than_rounding(
    shift_nats: float, bf16: bool, kept: bool, llama: PreTrainedModel, rollouts: Any
) -> None:
    checked = trainer(autocast=bf16)
    ImportanceCheck(checked, wanted=True).observe(llama, SAMPLING, shifted(rollouts, shift_nats))
    assert checked.vllm_importance_sampling_correction is kept


def test_a_few_tokens_decide_nothing(llama: PreTrainedModel, rollouts: Any) -> None:
    """Two completions of two tokens, as the shortest of a batch often are: it waits for more."""
    checked = trainer()
    check = ImportanceCheck(checked, wanted=True)
    short = replace(
        rollouts,
        completion_ids=[row[:2] for row in rollouts.completion_ids],
        logprobs=[row[:2] for row in rollouts.logprobs],
    )
    check.observe(llama, SAMPLING, short)
    assert checked.vllm_importance_sampling_correction
    check.observe(llama, SAMPLING, rollouts)
    assert not checked.vllm_importance_sampling_correction


def test_one_long_rollout_that_differs_is_enough_to_keep_it(llama: PreTrainedModel, rollouts: Any) -> None:
    checked = trainer()
    first, second = rollouts.logprobs
    mixed = replace(
        rollouts,
        prompt_ids=[*rollouts.prompt_ids, rollouts.prompt_ids[0]],
        completion_ids=[*rollouts.completion_ids, rollouts.completion_ids[0][:1]],
        logprobs=[[value + 0.3 for value in first], second, first[:1]],
    )
    ImportanceCheck(checked, wanted=True).observe(llama, SAMPLING, mixed)
    assert checked.vllm_importance_sampling_correction


def test_kept_where_training_rounds_weights_that_are_gathered_whole(
    llama: PreTrainedModel, rollouts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP1 with mixed precision: the gathered policy agrees with itself, and is not what the trainer scores with."""
    checked = trainer()
    monkeypatch.setattr(importance, "rounds_in_training", lambda model: model is checked.model_wrapped)
    ImportanceCheck(checked, wanted=True).observe(llama, SAMPLING, rollouts)
    assert checked.vllm_importance_sampling_correction


def test_the_first_rollouts_decide(llama: PreTrainedModel, rollouts: Any) -> None:
    checked = trainer()
    check = ImportanceCheck(checked, wanted=True)
    check.observe(llama, SAMPLING, shifted(rollouts, 0.5))
    check.observe(llama, SAMPLING, rollouts)
    assert checked.vllm_importance_sampling_correction


def test_switched_on_again_where_the_options_change(llama: PreTrainedModel, rollouts: Any) -> None:
    checked = trainer()
    check = ImportanceCheck(checked, wanted=True)
    check.observe(llama, SAMPLING, rollouts)
    assert not checked.vllm_importance_sampling_correction
    check.observe(llama, replace(SAMPLING, top_p=0.9), rollouts)
    assert checked.vllm_importance_sampling_correction


@pytest.mark.parametrize(
    ("wanted", "sampling"),
    [
        (False, SAMPLING),
        (True, replace(SAMPLING, top_p=0.9)),
        (True, replace(SAMPLING, repetition_penalty=1.1)),
        (True, replace(SAMPLING, temperature=0.0)),
        (True, replace(SAMPLING, temperature=0.6)),
    ],
    ids=["not wanted", "truncated", "penalised", "greedy", "another temperature than the trainer's"],
)
def test_left_alone(wanted: bool, sampling: SamplingParams, llama: PreTrainedModel, rollouts: Any) -> None:
    checked = trainer()
    ImportanceCheck(checked, wanted=wanted).observe(llama, sampling, rollouts)
    assert checked.vllm_importance_sampling_correction


def test_a_schedule_changes_what_is_sampled_and_not_what_is_scored(llama: PreTrainedModel, rollouts: Any) -> None:
    """GRPO scores at the temperature that it was built with, here 1, whatever `trainer.temperature` says later."""
    checked = trainer()
    check = ImportanceCheck(checked, wanted=True, built_at=1.0)
    check.observe(llama, SAMPLING, rollouts)
    assert checked.vllm_importance_sampling_correction


class Cooling(TrainerCallback):
    """Lowers a trainer's temperature after the first step, and notes whether the correction is on after every step."""

    def __init__(self, of: Any) -> None:
        self.trainer = of
        self.corrects: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.corrects.append(getattr(self.trainer, "vllm_importance_sampling_correction", False))
        self.trainer.temperature = 0.6


def cooling(kind: str, folder: Path, **options: Any) -> Any:
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    made = build_trainer(kind, model, word_tokenizer(), folder, max_steps=2, **options)
    made.add_callback(Cooling(made))
    return made


def test_a_temperature_schedule_switches_the_correction_on_again(tmp_path: Path) -> None:
    training = cooling("grpo", tmp_path)
    AtlasRolloutEngine(console=False).attach(training)
    training.train()
    (callback,) = (each for each in training.callback_handler.callbacks if isinstance(each, Cooling))
    assert callback.corrects == [False, True]
    (corrected,) = (row for row in training.state.log_history if "sampling/importance_sampling_ratio/mean" in row)
    assert corrected["sampling/sampling_logp_difference/mean"] > 0.01


@pytest.mark.parametrize("way", ["rloo", "rollout_func"])
def test_a_temperature_schedule_that_nothing_corrects_for_is_said_once(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = AtlasRolloutEngine(console=False)
    if way == "rloo":
        training = cooling("rloo", tmp_path)
        engine.attach(training)
    else:
        training = cooling("grpo", tmp_path, rollout_func=engine)
    with caplog.at_level(logging.WARNING):
        training.train()
        training.train()
    assert caplog.text.count("sampled at temperature 0.6, and scored at 1, with which") == 1


@pytest.mark.parametrize("kwargs", [{"temperature": 0.6}, {"temperature": 1.4}, {"top_k": 4}])
def test_kept_in_training_where_the_trainer_scores_another_distribution(kwargs: dict[str, Any], tmp_path: Path) -> None:
    """The ratios that TRL then computes are those of the two distributions."""
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    training = build_trainer("grpo", model, word_tokenizer(), tmp_path, max_steps=2, generation_kwargs=kwargs)
    AtlasRolloutEngine(console=False).attach(training)
    training.train()
    assert training.vllm_importance_sampling_correction
    ratios = [row for row in training.state.log_history if "sampling/importance_sampling_ratio/mean" in row]
    assert len(ratios) == 2
    assert all(row["sampling/sampling_logp_difference/mean"] > 0.01 for row in ratios)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo ranks found, by the rank whose logprobs are shifted."""
    return reports_of("tests.integrations.two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("worst", [0, 1, None])
def test_ranks_decide_together_by_the_worst(worst: int | None, two_ranks: list[dict[str, Any]]) -> None:
    """Ranks that disagreed would hang."""
    # The ranks compare at the end of the first step; from then on a pass is spared, or none.
    expected = {"corrected": worst is not None, "passes": [2, 2, 2] if worst is not None else [2, 1, 1]}
    assert [rank[str(worst)] for rank in two_ranks] == [expected] * 2
