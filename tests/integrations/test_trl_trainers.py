"""Every trainer of TRL that samples, a few steps each: what it trains on is a plain generation with the same seed."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig, SFTTrainer
from trl.distributed import DistributedBackend

from atlas_rl import AtlasRolloutEngine
from atlas_rl.integrations.trl.kinds import kind_of
from tests.other_trainers import CHAT, KINDS, Pair, build_other, expected_rows, policy, trained_rows
from tests.teacher_server import scoring
from tests.trainers import PAD, word_tokenizer


def attach(trainer: Any, **options: Any) -> AtlasRolloutEngine:
    return AtlasRolloutEngine(console=False, **options).attach(trainer)


def without_padding(rows: list[Pair]) -> list[Pair]:
    """IW-OPD takes padding tokens at the end of a completion for padding, whoever drew them."""
    stripped = []
    for prompt, completion in rows:
        kept = list(completion)
        while kept and kept[-1] == PAD:
            kept.pop()
        stripped.append((prompt, tuple(kept)))
    return stripped


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    """The address of a teacher."""
    with scoring(policy(2)) as address:
        yield address


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_trainer_trains_on_is_a_plain_generation(kind: str, teacher: str, tmp_path: Path) -> None:
    if kind == "server_distillation" and find_spec("vllm") is None:
        pytest.skip("TRL's client of a teacher needs vLLM: make setup-vllm")
    trainer = build_other(kind, tmp_path, **({"teacher_model_server_url": teacher} if "server" in kind else {}))
    trained, own = trained_rows(trainer), trainer.model.generate
    engine = attach(trainer)
    expected = expected_rows(engine)
    trainer.train()
    assert len(expected) == 2
    for rows, drawn in zip(trained, expected, strict=True):
        clean = without_padding if kind == "iw_opd" else list
        assert sorted(clean(rows)) == sorted(clean(drawn))
    told = [(report.step, report.policy_version, report.mode) for report in engine.reports]
    assert told == [(0, 0, "train"), (1, 1, "train")]
    assert sum(sum(report.drafted.values()) for report in engine.reports) > 0
    logged = [entry["atlas/tokens_per_s"] for entry in trainer.state.log_history if "atlas/tokens_per_s" in entry]
    assert logged == pytest.approx([report.tokens_per_s for report in engine.reports])
    assert trainer.model.generate == own, "the policy is as it was"


def test_an_adapter_in_a_subclass(tmp_path: Path) -> None:
    turns = []

    def subclass(of_trl: type) -> type:
        class Watching(of_trl):  # type: ignore[misc, valid-type]
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                turns.append(self.state.global_step)
                return super().training_step(*args, **kwargs)

        return Watching

    trainer = build_other("gkd", tmp_path, subclass=subclass, peft=True, gradient_checkpointing=True)
    trained = trained_rows(trainer)
    engine = attach(trainer)
    expected = expected_rows(engine)
    trainer.train()
    assert turns == [0, 1]
    assert [sorted(rows) for rows in trained] == [sorted(rows) for rows in expected]
    assert len(engine.reports) == 2


def test_an_evaluation_has_seeds_and_a_report_of_its_own(tmp_path: Path) -> None:
    trainer = build_other("a2po", tmp_path, evaluates=True, eval_strategy="steps", eval_steps=1)
    trained = trained_rows(trainer)
    engine = attach(trainer)
    expected = expected_rows(engine)
    trainer.train()
    assert [report.mode for report in engine.reports] == ["train", "eval", "train", "eval"]
    assert [sorted(rows) for rows in trained] == [sorted(rows) for rows in expected]
    assert any("eval_atlas/tokens_per_s" in entry for entry in trainer.state.log_history)
    trainer.evaluate()  # by itself, after the training
    assert [report.mode for report in engine.reports][4:] == ["eval"]
    assert "generate" not in vars(trainer.model)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = build_other("online_dpo", tmp_path, **options)
    rows = trained_rows(whole)
    attach(whole)
    whole.train()
    resumed = build_other("online_dpo", tmp_path, **options)
    again = trained_rows(resumed)
    engine = attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again == rows[1:]
    assert [(report.step, report.policy_version) for report in engine.reports] == [(1, 1)]
    assert engine.state_dict()["history"], "the drafters were saved and restored"


def test_steps_without_rollouts_are_no_sign_of_a_bypass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_other("gkd", tmp_path, max_steps=1, lmbda=0.0)
    engine = attach(trainer)
    trainer.train()
    assert not engine.reports
    assert "without asking the engine" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "online_dpo",
            {"generation_kwargs": {"num_beams": 2}},
            "OnlineDPOTrainer cannot generate in process.*num_beams=2",
        ),
        ("sdft", {"generation_kwargs": {"bad_words_ids": [[3]]}}, r"bad_words_ids=\[\[3\]\]"),
        ("sdpo", {"generation_kwargs": {"stop_strings": ["b"]}}, "stop_strings"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = build_other(kind, tmp_path, **options)
    before = trainer.train
    with pytest.raises(ValueError, match=message):
        attach(trainer)
    assert trainer.train == before


def test_what_the_policy_asks_for_counts_too(tmp_path: Path) -> None:
    model = policy()
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ValueError, match="no_repeat_ngram_size=2"):
        attach(build_other("gkd", tmp_path, model=model))


def test_a_subclass_that_generates_by_itself_is_refused(tmp_path: Path) -> None:
    def subclass(of_trl: type) -> type:
        class Own(of_trl):  # type: ignore[misc, valid-type]
            @staticmethod
            def generate_on_policy_outputs(model: Any, inputs: Any, config: Any) -> Any:
                return inputs["prompts"], inputs["prompt_attention_mask"], inputs["prompts"]

        return Own

    with pytest.raises(ValueError, match="Own generates in a generate_on_policy_outputs of its own"):
        attach(build_other("gkd", tmp_path, subclass=subclass))


def test_engines_and_wrappers_are_told_apart(tmp_path: Path) -> None:
    trainer = build_other("gkd", tmp_path)
    with pytest.raises(ValueError, match=r"GKDTrainer has no vLLM.*use_vllm=False"):
        attach(trainer, backend="vllm")
    trainer._dist = DistributedBackend(trainer.accelerator)
    trainer._dist.fsdp_version = 2
    with pytest.raises(
        ValueError, match=r"GKDTrainer calls model.generate.*sharded by FSDP2: train with DDP or ZeRO-2"
    ):
        attach(trainer)
    del trainer._dist
    trainer.model.generate = random.random
    with pytest.raises(ValueError, match="has a generate of its own"):
        attach(trainer)
    del trainer.model.generate
    attach(trainer)
    with pytest.raises(ValueError, match="another engine: build a new trainer"):
        attach(trainer)


def test_trainers_that_never_sample_are_told_so(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=policy(),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=CHAT,
        processing_class=word_tokenizer(),
    )
    with pytest.raises(ValueError, match="SFTTrainer never samples: it trains on the completions of its dataset"):
        attach(trainer)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("trl", "DPOTrainer", "never samples"),
        ("trl", "KTOTrainer", "never samples"),
        ("trl", "RewardTrainer", "never samples"),
        ("trl.experimental.tpo", "TPOTrainer", "never samples"),
        ("trl.experimental.cpo", "CPOTrainer", "samples only to log completions"),
        ("trl.experimental.orpo", "ORPOTrainer", "samples only to log completions"),
        ("trl.experimental.async_grpo", "AsyncGRPOTrainer", "generates in a vLLM server.*vllm-serve"),
        ("trl.experimental.async_distillation", "AsyncDistillationTrainer", "generates in a vLLM server"),
    ],
)
def test_each_of_the_others_has_its_sentence(module: str, name: str, message: str) -> None:
    of_trl = getattr(importlib.import_module(module), name)
    derived = type("Mine", (of_trl,), {})
    with pytest.raises(ValueError, match=f"{name} {message}"):
        kind_of(object.__new__(of_trl))
    with pytest.raises(ValueError, match=f"Mine derives from {name}, which {message}"):
        kind_of(object.__new__(derived))
