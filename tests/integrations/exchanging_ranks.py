"""One of three ranks that exchange what they learn: `torchrun -m tests.integrations.exchanging_ranks FOLDER`.

Rank 1 generates what rank 0 generates, as in a tensor-parallel group, and has no drafters. Each rank writes what it has
received after three policy updates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from atlas_rl.core import Draft, Rollouts, SamplingParams, Sequences
from atlas_rl.integrations.trl.exchange import ExchangeCallback
from atlas_rl.speculators.base import Speculator
from atlas_rl.sync.refresh import PolicyTracker
from tests.drafters import Stateless

NUM_UPDATES, WITHOUT_DRAFTERS = 3, 1


class Sharing(Stateless):
    """Sums its rank and a count over ranks, and counts the rollouts that come from elsewhere."""

    name = "sharing"

    def __init__(self, rank: int) -> None:
        self.part, self.totals, self.num_elsewhere = torch.tensor([float(rank), 1.0]), [], 0

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        return Draft.empty(len(requests))

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        self.num_elsewhere += len(rollouts.elsewhere)
        return None

    def shared(self) -> torch.Tensor:
        return self.part

    def take_shared(self, total: torch.Tensor) -> None:
        self.totals.append(total.tolist())


def rollouts() -> Rollouts:
    one = np.ones(1, np.int64)
    sampling = SamplingParams(max_new_tokens=2)
    return Rollouts(Sequences(np.ones((1, 3), np.int32), 3 * one, one, one, one.astype(np.uint64), sampling, 8, 0), 1.0)


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, nothing = accelerator.process_index, SimpleNamespace()
    drafter, exchange = Sharing(rank), ExchangeCallback(SimpleNamespace(accelerator=accelerator))
    speculators: dict[str, Speculator] = {} if rank == WITHOUT_DRAFTERS else {drafter.name: drafter}
    tracker = PolicyTracker()
    tracker.exchange = exchange
    arguments: tuple[Any, ...] = (nothing, nothing, nothing)
    for _ in range(NUM_UPDATES):
        if speculators:
            tracker.finished(rollouts())
        exchange.on_step_end(*arguments)
        tracker.advance(speculators, None)
    kept, _ = exchange.take()
    told = {"kept": len(kept), "elsewhere": drafter.num_elsewhere, "totals": drafter.totals}
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
