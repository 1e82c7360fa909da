"""Saves the drafters' state with the trainer's checkpoints, and restores it when a run resumes.

Drafters of different ranks have learned different things, so each rank has a file. If the number of ranks changes,
ranks without a file use those of others.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from atlas_rl.integrations.trl.together import on_all_ranks
from atlas_rl.sync.checkpoint import FILE_NAME, drop_ranks, file_of_rank, file_to_resume

if TYPE_CHECKING:
    from atlas_rl.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)


class DrafterStateCallback(TrainerCallback):
    """Keeps the drafters' state in the folders of the trainer's checkpoints.

    Callbacks do not learn which folder a run resumes from, so the argument of `trainer.train` is recorded.

    Args:
        engine: Engine whose drafters' state is saved.
        trainer: Trainer whose checkpoints hold it.
    """

    def __init__(self, engine: RolloutEngine, trainer: Any) -> None:
        self._engine = engine
        self._trainer = trainer
        self._asked: str | Path | bool | None = None

    def follow(self) -> None:
        """From now on, remember which checkpoint `trainer.train` resumes from."""
        train = self._trainer.train

        @functools.wraps(train)
        def noted(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._asked = resume_from_checkpoint
            return train(resume_from_checkpoint, *args, **kwargs)

        self._trainer.train = noted

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the drafters of a resumed run."""
        if self._asked or state.global_step > 0:
            self.restore(args, state)

    def restore(self, args: TrainingArguments, state: TrainerState) -> None:
        """Restore the drafters of a resumed run; warns if their state is missing or damaged. All ranks must call this."""
        on_all_ranks(self._trainer.accelerator, "restoring its drafters", lambda: self._restore(args, state))

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = self._resumed_folder(args, state)
        saved = file_to_resume(folder, int(self._trainer.accelerator.process_index))
        if saved is not None:
            self._load(saved)
        else:
            logger.warning(
                "atlas_rl: the run resumes at step %d, and '%s' holds no drafter state (%s): drafters start afresh",
                state.global_step,
                folder,
                FILE_NAME,
            )

    def _load(self, saved: Path) -> None:
        """Load the drafters; a file that cannot be read gives a warning, because a training never stops for a drafter."""
        try:
            self._engine.load_drafters(saved)
        except ValueError as error:
            logger.warning("atlas_rl: %s. All drafters start afresh", error)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the drafters' state beside the trainer's checkpoint."""
        folder, accelerator = _checkpoint_folder(args, state), self._trainer.accelerator
        file = file_of_rank(folder, int(accelerator.process_index))
        on_all_ranks(accelerator, "saving its drafters", lambda: self._engine.save_drafters(file))
        if accelerator.is_main_process:
            drop_ranks(folder, int(accelerator.num_processes))

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        asked: Any = self._asked
        if asked is True:
            asked = get_last_checkpoint(str(args.output_dir))
        return Path(asked) if asked else _checkpoint_folder(args, state)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder in which the trainer puts the checkpoint of the present step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
