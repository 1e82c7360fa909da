"""Brings every rank's rollouts to every rank after an optimizer step, as token ids.

With N ranks each sees one prompt in N, and a prompt that comes back in the next epoch goes to another rank most of the time.
An index of this rank's rollouts alone would know little of it. A step's rollouts are a few MB at most. Rollouts of
evaluations stay where they are: an evaluation's prompts come back to the same rank.
"""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl.core import Sequences
from atlas_rl.sync.refresh import RolloutExchange


class ExchangeCallback(TrainerCallback, RolloutExchange):
    """Exchanges rollouts at the end of every optimizer step, which all ranks reach equally often.

    Args:
        trainer: Whose ranks exchange.
    """

    def __init__(self, trainer: Any) -> None:
        self._accelerator = trainer.accelerator
        self._own: list[Sequences] = []
        self._others: list[Sequences] = []
        self._seconds = 0.0

    def put(self, sequences: Sequences) -> None:
        self._own.append(sequences)

    def take(self) -> tuple[list[Sequences], float]:
        taken = self._others, self._seconds
        self._others, self._seconds = [], 0.0
        return taken

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep an evaluation's rollouts to this rank."""
        self._own = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send what this rank finished since the last step, and keep what the others did."""
        if self._accelerator.num_processes == 1:
            return
        began = time.perf_counter()
        rank, own = int(self._accelerator.process_index), [each.trimmed() for each in self._own]
        self._own = []
        for sender, sequences in gather_object([(rank, own)]):
            if sender != rank:
                self._others += sequences
        self._seconds += time.perf_counter() - began
