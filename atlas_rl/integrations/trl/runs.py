"""Notices that a trainer begins another run, which counts its steps anew."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl.policy.sharded import shard_again


class RunCallback(TrainerCallback):
    """Counts the runs of a trainer: the calls of `trainer.train`.

    A step's number does not tell which policy it has: another run begins at 0 again, or at the step of a checkpoint.

    Args:
        begin: Called when a run begins.
        policy_changed: Called when the policy is no longer that of its step: when a run begins after an earlier one that
            has changed it, and when a run has ended by loading its best checkpoint.

    Attributes:
        number: Earlier runs that began at step 0. A run that resumes has the number of the run before it.
    """

    def __init__(self, begin: Callable[[], None], policy_changed: Callable[[], None]) -> None:
        self.number = 0
        self._begin = begin
        self._policy_changed = policy_changed
        self._has_stepped = False
        self._trainer: Any = None

    def follow(self, trainer: Any) -> None:
        """From now on, let `trainer.train` begin with a policy whose weights FSDP2 has sharded again.

        An evaluation leaves some whole, and accelerate cannot prepare those for another training. Each run is then checked
        by `refuse_ranks_apart`.
        """
        self._trainer, train = trainer, trainer.train

        @functools.wraps(train)
        def sharded(*args: Any, **kwargs: Any) -> Any:
            shard_again(trainer.model_wrapped)
            return train(*args, **kwargs)

        trainer.train = sharded

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count this run, if an earlier one made a step."""
        if self._trainer is not None:
            refuse_ranks_apart(self._trainer)
        self._begin()
        if self._has_stepped:
            self._has_stepped = False
            self.number += int(state.global_step == 0)
            self._policy_changed()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that the policy has changed."""
        self._has_stepped = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the trainer has loaded its best checkpoint, which it does before this call."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._policy_changed()


def refuse_ranks_apart(trainer: Any) -> None:
    """Raise `RuntimeError` if ranks would train without exchanging gradients.

    `trainer.evaluate()` before the first `trainer.train()` prepares the policy for evaluation alone. transformers 5.19 then
    trains it without DistributedDataParallel: every rank gets a policy of its own, and nothing says so.
    """
    accelerator = trainer.accelerator
    by_ddp = accelerator.num_processes > 1 and accelerator.distributed_type.startswith("MULTI_")
    parallelism = getattr(accelerator, "parallelism_config", None)
    if getattr(trainer, "is_distributed_loading_by_transformers", False) or getattr(parallelism, "tp_enabled", False):
        return  # spread over ranks in another way
    wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)  # torch.compile is around it
    if by_ddp and not isinstance(wrapped, DistributedDataParallel):
        raise RuntimeError(
            f"{accelerator.num_processes} ranks would train without exchanging gradients, each with its own policy: the "
            "trainer has prepared its model for an evaluation before. Use eval_on_start=True instead of trainer.evaluate() "
            "before the first trainer.train(), or evaluate with another trainer"
        )
