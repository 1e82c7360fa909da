"""Sends every rank's rollouts to all ranks after an optimizer step, as token ids, and sums what drafters learned.

Each of N ranks sees one prompt in N, and in the next epoch a prompt usually goes to another rank. An index of one
rank's own rollouts would rarely contain it. A step's rollouts are a few MB at most. Rollouts of evaluations are not
sent: an evaluation's prompts always come back to the same rank.

A network learns from hidden states, which are too large to send. Instead, ranks sum its learned parts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas_rl.core import Sequences
from atlas_rl.integrations.trl.together import of_all_ranks
from atlas_rl.speculators.base import Speculator
from atlas_rl.sync.refresh import RolloutExchange


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others: its rollouts, the sizes of its speculators' parts, and whether one was refreshed."""

    sequences: list[Sequences]
    sizes: dict[str, int]
    fresh: bool


class ExchangeCallback(TrainerCallback, RolloutExchange):
    """Exchanges rollouts at the end of every optimizer step, which all ranks reach equally often.

    Args:
        trainer: Trainer whose ranks exchange.
    """

    def __init__(self, trainer: Any) -> None:
        self._accelerator = trainer.accelerator
        self._own: list[Sequences] = []
        self._others: list[Sequences] = []
        self._speculators: Mapping[str, Speculator] = {}
        self._fresh = False  # whether speculators were refreshed since ranks last summed
        self._seconds = 0.0

    def put(self, sequences: Sequences) -> None:
        self._own.append(sequences)

    def take(self) -> tuple[list[Sequences], float]:
        taken = self._others, self._seconds
        self._others, self._seconds = [], 0.0
        return taken

    def refreshed(self, speculators: Mapping[str, Speculator]) -> None:
        self._speculators, self._fresh = speculators, True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep an evaluation's rollouts on this rank."""
        self._own = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send this rank's finished rollouts, receive those of the others, and learn from them."""
        if self._accelerator.num_processes == 1:
            return
        began = time.perf_counter()
        own, self._own = self._own, []
        parts: dict[str, torch.Tensor] = {}

        def tell() -> _Told:
            for name, speculator in self._speculators.items():
                part = speculator.shared()
                if part is not None:
                    parts[name] = part.to(self._accelerator.device)
            sizes = {name: len(part) for name, part in parts.items()}
            return _Told([each.trimmed() for each in own], sizes, self._fresh)

        everyone = of_all_ranks(self._accelerator, "collecting what its drafters share", tell)
        for rank, told in enumerate(everyone):
            if rank != int(self._accelerator.process_index):
                self._others += told.sequences
        if any(told.fresh for told in everyone):
            self._add_up(parts, [told.sizes for told in everyone])
        self._fresh = False
        self._seconds += time.perf_counter() - began

    def _add_up(self, parts: Mapping[str, torch.Tensor], sizes: Sequence[Mapping[str, int]]) -> None:
        """Sum each speculator's part over the ranks that have it, in a fixed order, if their sizes are equal.

        All ranks take part in a sum. One without the part adds zeros: in a group that generates together one rank drafts.
        No speculator takes its sum before all sums are there: one that raised would leave the others waiting.
        """
        sums = {}
        for name in sorted({name for told in sizes for name in told}):
            known = {told[name] for told in sizes if name in told}
            if len(known) == 1:
                part = parts[name] if name in parts else torch.zeros(known.pop(), dtype=torch.float32, device="cpu")
                sums[name] = reduce(part.to(self._accelerator.device), reduction="sum")
        for name in parts:
            if name in sums:
                self._speculators[name].take_shared(sums[name])
