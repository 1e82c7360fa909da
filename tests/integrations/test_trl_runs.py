"""One trainer that trains several times, and one engine that serves several trainers."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from atlas_rl import AtlasRolloutEngine
from atlas_rl.integrations.trl.runs import refuse_ranks_apart
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.models import tiny_llama
from tests.other_trainers import build_other
from tests.trainers import DATA, WORDS, build_trainer, with_special_tokens, word_tokenizer

Rows = list[list[int]]


def policy(seed: int = 1) -> Any:
    return with_special_tokens(tiny_llama(vocab=len(WORDS), seed=seed, context=64))


def noting(rows: list[Rows]) -> Any:
    """A reward function that adds the completions of each of its calls to `rows`."""

    def reward(completion_ids: Rows, **kwargs: Any) -> list[float]:
        rows.append([list(row) for row in completion_ids])
        return [float(len(row)) for row in completion_ids]

    return reward


def interrupting(rows: list[Rows], call: int) -> Any:
    """`noting`, interrupted in its call of this number, from 1 on."""
    reward = noting(rows)

    def interrupted(**kwargs: Any) -> list[float]:
        scores: list[float] = reward(**kwargs)
        if len(rows) == call:
            raise KeyboardInterrupt
        return scores

    return interrupted


def build(way: str, engine: AtlasRolloutEngine, folder: Path, *, seed: int = 1, **options: Any) -> Any:
    """A GRPO trainer that generates with the engine, attached or by `rollout_func`."""
    way_in: dict[str, Any] = {"rollout_func": engine} if way == "rollout_func" else {}
    trainer = build_trainer("grpo", policy(seed), word_tokenizer(), folder, **way_in, **options)
    if way == "attach":
        engine.attach(trainer)
    return trainer


GREEDY: Any = {"max_steps": 1, "generation_kwargs": {"temperature": 0.0}}


@pytest.mark.parametrize("first_way", ["attach", "rollout_func"])
def test_every_trainer_of_an_engine_gets_rollouts_of_its_own_policy(first_way: str, tmp_path: Path) -> None:
    """The second one must neither get tokens of the first one's policy, nor report to its log."""
    engine = AtlasRolloutEngine(console=False)
    rows: tuple[list[Rows], list[Rows]] = [], []
    first = build(first_way, engine, tmp_path, reward_funcs=noting(rows[0]), **GREEDY)
    first.train()
    second = build("rollout_func", engine, tmp_path, seed=2, reward_funcs=noting(rows[1]), **GREEDY)
    second.train()
    for seed, own in ((1, rows[0]), (2, rows[1])):
        alone, wanted = AtlasRolloutEngine(console=False), list[Rows]()
        build("attach", alone, tmp_path, seed=seed, reward_funcs=noting(wanted), **GREEDY).train()
        assert own == wanted
    assert rows[0] != rows[1]
    assert [sum("atlas/tokens_per_s" in entry for entry in each.state.log_history) for each in (first, second)] == [
        1,
        1,
    ]
    assert [report.policy_version for report in engine.reports] == [0, 1], "versions go on"
    first.train()
    assert len(engine.reports) == 3, "the first trainer goes on with its own adapter, whose callbacks it has"


def test_an_engine_may_be_attached_to_a_second_trainer(tmp_path: Path) -> None:
    engine = AtlasRolloutEngine(console=False)
    for seed in (1, 2):
        build("attach", engine, tmp_path, seed=seed, max_steps=2).train()
    assert [report.step for report in engine.reports] == [0, 1, 0, 1]
    assert [report.policy_version for report in engine.reports] == [0, 1, 2, 3]


class Refreshes(HistorySpeculator):
    """Notes the versions that it is refreshed at."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: list[int] = []

    def refresh(self, rollouts: Any, policy_version: int) -> Any:
        self.versions.append(policy_version)
        return super().refresh(rollouts, policy_version)


@pytest.mark.parametrize("way", ["attach", "rollout_func"])
@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_second_run_goes_on_with_versions_and_has_noise_of_its_own(way: str, max_steps: int, tmp_path: Path) -> None:
    """With a learning rate of 0, only the noise can make the completions differ."""
    drafter, rows = Refreshes(), list[Rows]()
    engine = AtlasRolloutEngine(speculators=[drafter], console=False)
    trainer = build(
        way, engine, tmp_path, max_steps=max_steps, learning_rate=0.0, reward_funcs=noting(rows), shuffle_dataset=False
    )
    trainer.train()
    trainer.train()
    assert [report.step for report in engine.reports] == [*range(max_steps)] * 2
    assert [report.policy_version for report in engine.reports] == [*range(2 * max_steps)]
    assert drafter.versions == [*range(1, 2 * max_steps)], "at every step, the first of the second run included"
    assert len({str(each) for each in rows}) == 2 * max_steps


def test_a_trainer_that_calls_the_policy_trains_twice(tmp_path: Path) -> None:
    engine = AtlasRolloutEngine(console=False)
    trainer = build_other("online_dpo", tmp_path, max_steps=1)
    engine.attach(trainer)
    trainer.train()
    trainer.train()
    assert [report.policy_version for report in engine.reports] == [0, 1]


@pytest.mark.parametrize("way", ["attach", "rollout_func"])
def test_a_run_that_resumes_in_the_same_process_repeats_the_step(way: str, tmp_path: Path) -> None:
    """Its weights are those of the checkpoint, so its rollouts are those of the interrupted run, under a new version."""
    engine, rows = AtlasRolloutEngine(console=False), list[Rows]()
    trainer = build(way, engine, tmp_path, reward_funcs=noting(rows), max_steps=2)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [report.step for report in engine.reports] == [0, 1, 1]
    assert [report.policy_version for report in engine.reports] == [0, 1, 2]
    assert rows[2] == rows[1]


@pytest.mark.parametrize("way", ["attach", "rollout_func"])
def test_a_later_run_restores_its_drafters_from_the_folder_that_it_resumes_from(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = build("attach", AtlasRolloutEngine(console=False), tmp_path / "other", max_steps=1)
    saving.args.save_strategy, saving.args.save_steps = "steps", 1
    saving.train()
    saved, restored = tmp_path / "other" / "checkpoint-1", list[Path]()
    engine = AtlasRolloutEngine(console=False)
    trainer = build(way, engine, tmp_path / "own", max_steps=2)
    trainer.train()
    monkeypatch.setattr(engine, "load_drafters", restored.append)
    trainer.train(resume_from_checkpoint=str(saved))
    assert restored == [saved / "atlas_rl.safetensors"]
    assert [report.step for report in engine.reports] == [0, 1, 1]


def test_a_sync_that_fails_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AtlasRolloutEngine(console=False)
    trainer = build("attach", engine, tmp_path)
    steps: list[int] = []

    def fails_once(*, step: int) -> None:
        steps.append(step)
        if len(steps) == 1:
            raise MemoryError

    monkeypatch.setattr(engine, "policy_updated", fails_once)
    with pytest.raises(MemoryError):
        trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.sync_weights()
    assert steps == [0, 0]


def test_an_evaluation_between_two_uses_of_a_batch_decides_nothing(tmp_path: Path) -> None:
    """The batch of step 0 is used for four steps. It was made without correction, so it has no ratios for the loss."""
    corrects: list[bool] = []

    class Truncating(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            corrects.append(trainer.vllm_importance_sampling_correction)
            if state.global_step == 1:
                args.generation_kwargs = {"top_p": 0.9}

    engine = AtlasRolloutEngine(console=False)
    trainer = build(
        "attach",
        engine,
        tmp_path,
        steps_per_generation=4,
        gradient_accumulation_steps=1,
        max_steps=5,
        eval_dataset=DATA.select(range(4)),
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.add_callback(Truncating)
    trainer.train()
    assert [report.step for report in engine.reports if report.mode == "eval"] == [2, 4, 5]
    assert corrects == [False, False, False, False, True]


def test_an_interrupted_step_is_no_part_of_the_next_run(tmp_path: Path) -> None:
    engine = AtlasRolloutEngine(console=False)
    trainer = build("attach", engine, tmp_path, max_steps=2, reward_funcs=interrupting([], 2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert [report.step for report in engine.reports] == [0, 0, 1]
    assert [report.num_requests for report in engine.reports] == [8, 8, 8]
    assert [report.policy_version for report in engine.reports] == [0, 2, 3]


def test_a_run_whose_first_step_was_interrupted_begins_with_the_same_noise(tmp_path: Path) -> None:
    rows = list[Rows]()
    engine = AtlasRolloutEngine(console=False)
    trainer = build("attach", engine, tmp_path, max_steps=1, reward_funcs=interrupting(rows, 1), shuffle_dataset=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert rows[1] == rows[0]


def test_the_best_checkpoint_that_a_run_ends_with_is_a_policy_of_its_own(tmp_path: Path) -> None:
    """It is synced before the next generation, although that has the step of the last one."""
    drafter = Refreshes()
    engine = AtlasRolloutEngine(speculators=[drafter], console=False)
    each_step: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = build("attach", engine, tmp_path, max_steps=2, eval_dataset=DATA.select(range(4)), **each_step)
    trainer.args.save_strategy, trainer.args.load_best_model_at_end = "steps", True
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False
    trainer.train()
    trainer.evaluate()
    evaluations = [report for report in engine.reports if report.mode == "eval"]
    assert [report.step for report in evaluations] == [1, 2, 2]
    assert [report.policy_version for report in evaluations] == [1, 2, 3]
    assert drafter.versions == [1, 2, 3]


@pytest.mark.parametrize("way", ["evaluate", "predict"])
def test_an_evaluation_that_raised_is_no_part_of_the_next_one(way: str, tmp_path: Path) -> None:
    rows, data = list[Rows](), DATA.select(range(4))
    reward = noting(rows)

    def failing(**kwargs: Any) -> list[float]:
        scores: list[float] = reward(**kwargs)
        if len(rows) == 2:
            raise RuntimeError("on purpose")
        return scores

    engine = AtlasRolloutEngine(console=False)
    trainer = build("attach", engine, tmp_path, reward_funcs=failing, eval_dataset=data)
    with pytest.raises(RuntimeError, match="on purpose"):
        getattr(trainer, way)(data)
    trainer.evaluate()
    assert len(rows) == 4, "of two batches each"
    (report,) = engine.reports
    assert report.num_requests == 16
    (logged,) = [row["eval_atlas/num_tokens"] for row in trainer.state.log_history if "eval_atlas/num_tokens" in row]
    assert logged == report.num_tokens == sum(len(row) for batch in rows[2:] for row in batch)


@pytest.mark.parametrize(
    "shared", [{"steps_per_generation": 4}, {"steps_per_generation": 2, "num_iterations": 2}], ids=str
)
def test_the_time_of_a_step_is_that_of_all_steps_that_a_generation_serves(
    shared: dict[str, int], tmp_path: Path
) -> None:
    pause_s = 0.1

    class Pauses(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(pause_s)

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(10 * pause_s)

    engine = AtlasRolloutEngine(console=False)
    trainer = build(
        "attach",
        engine,
        tmp_path,
        gradient_accumulation_steps=1,
        max_steps=5,
        eval_dataset=DATA.select(range(4)),
        eval_strategy="steps",
        eval_steps=3,
        **shared,
    )
    trainer.callback_handler.callbacks.insert(0, Pauses())
    began_s = time.perf_counter()
    trainer.train()
    first, second = [report for report in engine.reports if report.mode == "train"]
    assert (first.step, second.step) == (0, 4)
    assert first.step_s is first.generation_share is first.amdahl_bound is None, "three more steps use its rollouts"
    assert 4 * pause_s + second.generate_s < (second.step_s or 0.0)
    assert (second.step_s or 0.0) < time.perf_counter() - began_s - 11 * pause_s, "without the evaluation and step 0"


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, True),
        ({"model_wrapped": SimpleNamespace(_orig_mod=nn.Linear(1, 1))}, True),  # as torch.compile wraps it
        ({"model_wrapped": SimpleNamespace(_orig_mod=DistributedDataParallel.__new__(DistributedDataParallel))}, False),
        ({"num_processes": 1}, False),
        ({"distributed_type": DistributedType.DEEPSPEED}, False),
        ({"distributed_type": DistributedType.FSDP}, False),
        ({"parallelism_config": SimpleNamespace(tp_enabled=True)}, False),
        ({"is_distributed_loading_by_transformers": True}, False),
    ],
)
def test_only_ranks_that_nothing_brings_together_are_refused(given: dict[str, Any], refused: bool) -> None:
    """`tests/integrations/sharded_ranks.py` has real ones."""
    state = {"num_processes": 2, "distributed_type": DistributedType.MULTI_GPU, "parallelism_config": None} | given
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(**state),
        model_wrapped=state.get("model_wrapped", nn.Linear(1, 1)),
        is_distributed_loading_by_transformers=state.get("is_distributed_loading_by_transformers", False),
    )
    with pytest.raises(RuntimeError, match="2 ranks would train") if refused else nullcontext():
        refuse_ranks_apart(trainer)
