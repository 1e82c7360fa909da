"""Which column of a dataset a trainer reads its prompts from, as far as attaching can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_llama
from tests.trainers import DATA, WORDS, arguments, rewards, with_special_tokens, word_tokenizer


def build(folder: Path, *, kind: type = GRPOTrainer, data: Any = DATA, eval_data: Any = None, **options: Any) -> Any:
    return kind(
        model=with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64)),
        reward_funcs=rewards,
        args=arguments(GRPOConfig, folder, **({"max_steps": 1} | options)),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=word_tokenizer(),
    )


class OwnColumn(GRPOTrainer):
    """Reads its prompts from another column."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return super()._generate_and_score_completions([{"prompt": each["question"]} for each in inputs])


class OwnLoader(GRPOTrainer):
    """Renames the column where its rows are loaded."""

    def get_train_dataloader(self) -> Any:
        self.train_dataset = self.train_dataset.rename_column("question", "prompt")
        return super().get_train_dataloader()


class OwnStep(GRPOTrainer):
    """Renames the column in every step."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(model, [{"prompt": each["question"]} for each in inputs], *args, **kwargs)


class OwnBatches(GRPOTrainer):
    """Renames the column where batches are drawn."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        return [[{"prompt": each["question"]} for each in rows] for rows in batches], num_items


def test_a_dataset_without_prompts_is_found(tmp_path: Path) -> None:
    questions = DATA.rename_column("prompt", "question")
    renamed = r"reads the column 'prompt', and the dataset has \['question'\].*rename_column\('question', 'prompt'\)"
    evaluated: list[dict[str, Any]] = [
        {"eval_data": questions, "eval_strategy": "steps"},
        {"eval_data": questions, "eval_on_start": True},
    ]
    for data in ({"data": questions}, *evaluated):
        trainer = build(tmp_path, **data)
        with pytest.raises(ValueError, match=renamed):
            AtlasRolloutEngine(console=False).attach(trainer)
        assert not trainer.use_vllm


def test_a_dataset_that_is_never_read_is_not_looked_at(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_data=DATA.rename_column("prompt", "question"))
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    assert len(engine.reports) == 1


@pytest.mark.parametrize("kind", [OwnColumn, OwnLoader, OwnStep, OwnBatches, GRPOTrainer])
def test_a_trainer_that_reads_another_column_is_served(kind: type, tmp_path: Path) -> None:
    questions = DATA.rename_column("prompt", "question")
    trainer = build(tmp_path, kind=kind, data=questions, remove_unused_columns=False)
    if kind is GRPOTrainer:
        trainer.data_collator = lambda rows: [{"prompt": row["question"]} for row in rows]
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    assert len(engine.reports) == 1
