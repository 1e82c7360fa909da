"""The engine inside real TRL trainers: a few steps of GRPO and RLOO on a tiny policy, through both ways in."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from atlas_rl import AtlasRolloutEngine
from atlas_rl.core import Rollouts
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.models import tiny_llama
from tests.trainers import DATA, WORDS, build_trainer, passes_of, rewards, with_special_tokens, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def policy() -> Any:
    return with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))


def build(kind: str, tokenizer: Any, folder: Path, **options: Any) -> Any:
    return build_trainer(kind, policy(), tokenizer, folder, **options)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("peft", [False, True])
def test_attached_trainers_train(kind: str, peft: bool, tokenizer: Any, tmp_path: Path) -> None:
    trainer = build(kind, tokenizer, tmp_path, peft=peft)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    engine = AtlasRolloutEngine(output_dir=tmp_path, console=False)
    assert engine.attach(trainer, baseline_every=1) is engine
    trainer.train()
    assert len(engine.reports) == 3
    after = {name: p for name, p in trainer.model.named_parameters() if name in before}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for index, report in enumerate(engine.reports):
        assert (report.step, report.policy_version, report.mode) == (index, index, "train")
        assert report.num_requests == 8
        assert report.num_tokens == sum(report.completion_lengths)
        assert (report.baseline_tokens_per_s or 0) > 0
        assert (report.step_s or 0) > report.generate_s
        assert not report.warnings, "tokens must be the same without speculation"
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["num_tokens"] for row in rows] == [report.num_tokens for report in engine.reports]
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    speeds = [report.tokens_per_s for report in engine.reports]
    assert [entry["atlas/tokens_per_s"] for entry in logged] == pytest.approx(speeds)
    gains = [report.speedup_measured for report in engine.reports]
    assert [entry["atlas/speedup_measured"] for entry in logged] == pytest.approx(gains)


def test_a_rerun_is_no_part_of_the_run(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seconds, here a pause in each rerun, are neither the training step's nor the drafters' to learn in."""
    seen: list[float] = []

    class Watching(HistorySpeculator):
        def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
            seen.append(rollouts.measuring_s)
            return super().refresh(rollouts, policy_version)

    trainer = build("grpo", tokenizer, tmp_path)
    engine = AtlasRolloutEngine(speculators=[Watching()], console=False).attach(trainer, baseline_every=2)
    generate = engine.rollout

    def slow_to_rerun(*args: Any, speculation: bool | None = None, **options: Any) -> Any:
        time.sleep(1.0 if speculation is False else 0.0)
        return generate(*args, speculation=speculation, **options)

    monkeypatch.setattr(engine, "rollout", slow_to_rerun)
    began_s = time.perf_counter()
    trainer.train()
    assert sum(report.step_s or 0.0 for report in engine.reports) < time.perf_counter() - began_s - 2.0
    assert [seconds >= 1.0 for seconds in seen] == [True, False]
    assert seen[1] == 0.0


def test_rollout_func_is_the_second_way_in(tokenizer: Any, tmp_path: Path) -> None:
    engine = AtlasRolloutEngine(console=False)
    trainer = build("grpo", tokenizer, tmp_path, rollout_func=engine)
    trainer.train()
    assert [report.policy_version for report in engine.reports] == [0, 1, 2]
    assert all(report.num_requests == 8 for report in engine.reports)


@pytest.mark.slow
def test_both_ways_in_generate_the_same(tokenizer: Any, tmp_path: Path) -> None:
    """Learning rate 0: the policy stands still, so the rollouts of both ways must agree step by step."""
    seen: dict[str, list[list[str]]] = {"attach": [], "rollout_func": []}
    for way, log in seen.items():

        def recording(completions: list[str], log: list[list[str]] = log, **kwargs: Any) -> list[float]:
            log.append(list(completions))
            return rewards(completions)

        engine = AtlasRolloutEngine(console=False)
        way_in = {"rollout_func": engine} if way == "rollout_func" else {}
        trainer = build("grpo", tokenizer, tmp_path, reward_funcs=recording, learning_rate=0.0, **way_in)
        if way == "attach":
            engine.attach(trainer)
        trainer.train()
    assert seen["attach"] == seen["rollout_func"]
    assert len({tuple(step) for step in seen["attach"]}) == 3, "every step has a seed of its own"


def test_rows_and_rewards_line_up(tokenizer: Any, tmp_path: Path) -> None:
    """A reward function sees each prompt beside its own completion: the policy's greedy answer to that prompt."""
    reference = AtlasRolloutEngine(model=policy(), tokenizer=tokenizer, speculation=False, console=False)
    checked = []

    def check(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            expected = reference.generate([tokenizer(prompt)["input_ids"]], max_new_tokens=12, temperature=0.0)
            assert ids == expected.completion_ids[0]
            assert completion == tokenizer.decode(ids, skip_special_tokens=True)
            checked.append(prompt)
        return [0.0] * len(prompts)

    trainer = build(
        "grpo", tokenizer, tmp_path, reward_funcs=check, max_steps=1, generation_kwargs={"temperature": 0.0}
    )
    AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    assert len(checked) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "spare", "passes"),
    [({}, True, 1), ({}, False, 2), ({"top_p": 0.7}, True, 2)],
    ids=["spared", "wanted", "truncated"],
)
def test_the_forward_pass_of_the_importance_sampling_correction_is_spared(
    options: dict[str, Any], spare: bool, passes: int, tokenizer: Any, tmp_path: Path
) -> None:
    """One pass over the rollouts of a step is the loss's."""
    trainer = build("grpo", tokenizer, tmp_path, max_steps=2, **options)
    AtlasRolloutEngine(console=False, spare_importance_sampling=spare).attach(trainer)
    assert trainer.vllm_importance_sampling_correction
    steps = passes_of(trainer)
    trainer.train()
    assert [steps.count(step) for step in range(2)] == [passes, passes]
    assert trainer.vllm_importance_sampling_correction == (passes == 2)


def test_importance_ratios_are_one_where_the_correction_is_wanted(tokenizer: Any, tmp_path: Path) -> None:
    trainer = build("grpo", tokenizer, tmp_path, max_steps=2)
    AtlasRolloutEngine(console=False, spare_importance_sampling=False).attach(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "sampling/importance_sampling_ratio/mean" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4


def test_evaluation_is_reported_apart(tokenizer: Any, tmp_path: Path) -> None:
    trainer = build(
        "grpo",
        tokenizer,
        tmp_path,
        eval_dataset=DATA.select(range(4)),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
    )
    engine = AtlasRolloutEngine(console=False)
    engine.attach(trainer)
    trainer.train()
    assert [report.mode for report in engine.reports].count("train") == 2
    assert [report.mode for report in engine.reports].count("eval") == 1
    evaluation = next(report for report in engine.reports if report.mode == "eval")
    assert evaluation.num_requests == 16
    assert any("eval_atlas/tokens_per_s" in entry for entry in trainer.state.log_history)


def test_a_resumed_step_has_the_seed_of_the_uninterrupted_run(tokenizer: Any, tmp_path: Path) -> None:
    from atlas_rl.integrations.trl.adapter import TrainerAdapter

    trainer = build("grpo", tokenizer, tmp_path)
    first = TrainerAdapter(AtlasRolloutEngine(console=False), trainer, 0)
    seeds = [first._seed(step, mode) for step, mode in ((0, "train"), (0, "train"), (1, "train"), (1, "eval"))]
    resumed = TrainerAdapter(AtlasRolloutEngine(console=False), trainer, 0)
    assert resumed._seed(1, "train") == seeds[2]
    assert len(set(seeds)) == 4


def test_bad_trainers_get_a_sentence_and_stay_as_they_were(tokenizer: Any, tmp_path: Path) -> None:
    trainer = build("grpo", tokenizer, tmp_path, generation_kwargs={"num_beams": 2})
    with pytest.raises(ValueError, match="num_beams"):
        AtlasRolloutEngine(console=False).attach(trainer)
    assert not trainer.use_vllm
    assert not hasattr(trainer, "vllm_generation")

    trainer = build("grpo", tokenizer, tmp_path)
    AtlasRolloutEngine(console=False).attach(trainer)
    with pytest.raises(ValueError, match="another engine: build a new trainer"):
        AtlasRolloutEngine(console=False).attach(trainer)

    with pytest.raises(ValueError, match="GRPOTrainer"):
        AtlasRolloutEngine(console=False).attach(object())

    with pytest.raises(ValueError, match="baseline_every"):
        AtlasRolloutEngine(console=False).attach(build("grpo", tokenizer, tmp_path), baseline_every=-1)


def test_the_adapter_speaks_what_the_tool_loop_asks_for(tokenizer: Any, tmp_path: Path) -> None:
    """The tool loop asks the engine's adapter for the context length and for further turns."""
    trainer = build("grpo", tokenizer, tmp_path, max_steps=1)
    AtlasRolloutEngine(console=False).attach(trainer)
    assert trainer.vllm_generation.llm.llm_engine.model_config.max_model_len == 64
    prompt_ids, completion_ids, logprobs, token_ids = trainer.vllm_generation.generate(
        prompts=[[2, 3, 4], [5, 6]], images=None, num_generations=1
    )
    assert prompt_ids == [[2, 3, 4], [5, 6]]
    for ids, values, tokens in zip(completion_ids, logprobs, token_ids, strict=True):
        assert [[token] for token in ids] == tokens
        assert all(len(value) == 1 and value[0] <= 0 for value in values)
    with pytest.raises(ValueError, match="images"):
        trainer.vllm_generation.generate(prompts=[[2]], images=[["picture"]], num_generations=1)


@pytest.mark.slow
def test_a_resumed_run_gets_its_drafters_back(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def trainer(max_steps: int) -> Any:
        made = build("grpo", tokenizer, tmp_path, max_steps=max_steps)
        made.args.save_strategy, made.args.save_steps = "steps", 2
        return made

    first = trainer(2)
    engine = AtlasRolloutEngine(console=False).attach(first)
    first.train()
    saved = tmp_path / "checkpoint-2" / "atlas_rl.safetensors"
    assert saved.is_file()
    second = trainer(3)
    resumed = AtlasRolloutEngine(console=False).attach(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    before, after = engine.state_dict(), resumed.state_dict()
    assert resumed.policy_version == 2
    # Steps 0 and 1 came out of the checkpoint, step 2 was made since.
    saved_tokens, tokens = before["history"]["archive"]["tokens"], after["history"]["archive"]["tokens"]
    assert len(saved_tokens) > sum(report.num_tokens for report in engine.reports)
    assert np.array_equal(tokens[: len(saved_tokens)], saved_tokens)
    assert len(tokens) - len(saved_tokens) > resumed.reports[0].num_tokens
    assert after["recurrent"]["trained"]
    # The head has not learned from step 2 yet: that waits for the next policy update.
    assert np.array_equal(after["recurrent"]["counts"], before["recurrent"]["counts"])


def saving(tokenizer: Any, folder: Path, max_steps: int) -> Any:
    trainer = build("grpo", tokenizer, folder, max_steps=max_steps)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    return trainer


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of training, saved with its drafters."""
    folder = tmp_path_factory.mktemp("first")
    trainer = saving(tokenizer, folder, 1)
    AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    return folder / "checkpoint-1"


def resume(checkpoint: Any, tokenizer: Any, folder: Path, **options: Any) -> tuple[AtlasRolloutEngine, bool]:
    """Resume for one more step; the engine, and whether its history knew the first step's rollouts from the start."""
    trainer = saving(tokenizer, folder, 2)
    engine = AtlasRolloutEngine(console=False, **options).attach(trainer)
    knew = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            knew.append(len(engine.state_dict().get("history", {}).get("archive", {}).get("tokens", ())) > 0)

    trainer.add_callback(Watch)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 2
    return engine, knew[0]


@pytest.mark.parametrize("way", ["path", "renamed", "latest"])
def test_drafters_come_from_the_folder_that_the_run_resumes_from(
    way: str, checkpoint: Path, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: Any = str(checkpoint)  # another folder than this run's output_dir
    if way == "renamed":
        asked = shutil.copytree(checkpoint, tmp_path / "best")
    elif way == "latest":
        shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
        asked = True
    assert resume(asked, tokenizer, tmp_path)[1]
    assert "drafter" not in caplog.text


@pytest.mark.parametrize("fault", ["damaged", "missing", "fewer"])
def test_drafters_that_cannot_be_restored_are_named_and_training_goes_on(
    fault: str, checkpoint: Path, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "best"))
    saved, options = folder / "atlas_rl.safetensors", {}
    if fault == "damaged":
        saved.write_bytes(saved.read_bytes()[:50])
    elif fault == "missing":
        saved.unlink()
    else:
        options["speculators"] = [HistorySpeculator()]
    engine, knew = resume(str(folder), tokenizer, tmp_path, **options)
    assert knew is (fault == "fewer")
    assert len(engine.reports) == 1
    words = {"damaged": "is damaged", "missing": "holds no drafter state", "fewer": "recurrent"}[fault]
    assert words in caplog.text
    assert str(folder) in caplog.text or fault == "fewer"
