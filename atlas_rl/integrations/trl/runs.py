"""Notices that a trainer begins another run, which counts its steps anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunCallback(TrainerCallback):
    """Counts the runs of a trainer: the calls of `trainer.train`.

    A step's number does not tell which policy it has: another run begins at 0 again, or at the step of a checkpoint.

    Args:
        began_again: Called when a run begins after an earlier one that has changed the policy.

    Attributes:
        number: Earlier runs that began at step 0. A run that resumes has the number of the run before it.
    """

    def __init__(self, began_again: Callable[[], None]) -> None:
        self.number = 0
        self._began_again = began_again
        self._has_stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count this run, if an earlier one made a step."""
        if self._has_stepped:
            self._has_stepped = False
            self.number += int(state.global_step == 0)
            self._began_again()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that the policy has changed."""
        self._has_stepped = True
