"""Where the training of a head stands: on disk, so that an interruption costs minutes, and how long the rest will take."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_rl.sync.checkpoint import load_state, save_state

SAVE_EVERY_S = 300.0
_STATE = "training.safetensors"
_LOG = "training.json"
_FIRST_STEPS = 5  # whose time is the first estimate


@dataclass(slots=True)
class Progress:
    """What a training has come to; written to `training.json` after every epoch.

    Attributes:
        settings: It was made with.
        num_train_tokens, num_held_out_tokens: Drawn tokens of the calls that are trained on, and of the others.
        epochs: Per epoch: `loss`, `seconds`, and on held-out calls per unrolled position `acceptance` (`sum_x min(p, q)`,
            what noise-coupled drafts are accepted with but for a few points) and `agreement` (the likeliest tokens agree).
    """

    settings: dict[str, Any]
    num_train_tokens: int
    num_held_out_tokens: int
    epochs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Begun:
    """The epoch that is under way.

    Attributes:
        batches: That are done.
        losses: Of its optimizer steps.
        seconds: That it has taken.
    """

    batches: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class TrainingState:
    """Weights, the optimizer's moments and progress, and the folder that keeps them.

    Args:
        output: The folder.
        head: Is trained.
        optimizer: Of its parameters.
        log: Of a training that begins.

    Attributes:
        begun: The epoch that is under way.
    """

    def __init__(self, output: Path, head: Any, optimizer: torch.optim.Optimizer, log: Progress) -> None:
        self.output, self.head, self.optimizer, self.log = output, head, optimizer, log
        self.begun = Begun()

    def save(self) -> None:
        """Write all of it; what was there stays whole until it is written."""
        head: nn.Module = self.head
        moments = {str(index): dict(values) for index, values in self.optimizer.state_dict()["state"].items()}
        kept = {"log": json.dumps(asdict(self.log)), "begun": json.dumps(asdict(self.begun))}
        save_state(self.output / _STATE, {"head": dict(head.state_dict()), "optimizer": moments, **kept})

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Keep what an epoch came to."""
        self.log.epochs.append(row)
        self.begun = Begun()
        self.save()
        (self.output / _LOG).write_text(json.dumps(asdict(self.log), indent=2) + "\n")

    def resume(self) -> None:
        """Go on from what `save` left, if anything; `ValueError` where that is of other settings or data."""
        if not (self.output / _STATE).is_file():
            return
        state = load_state(self.output / _STATE)
        saved, log = json.loads(state["log"]), self.log
        if (
            saved["settings"] != json.loads(json.dumps(log.settings))
            or saved["num_train_tokens"] != log.num_train_tokens
        ):
            raise ValueError(
                f"'{self.output}' holds a training with other settings or data: give another --output, or delete it"
            )
        self.head.load_state_dict(state["head"])
        described = self.optimizer.state_dict()
        described["state"] = {int(index): values for index, values in state["optimizer"].items()}
        self.optimizer.load_state_dict(described)
        log.epochs = saved["epochs"]
        self.begun = Begun(**json.loads(state.get("begun", "{}")))


class Pace:
    """How long the rest of a training will take, by the time that its batches took since it began or went on.

    Args:
        total: Batches of all epochs.
        done: Of them before now.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._began, self._first = time.perf_counter(), done

    def step(self) -> bool:
        """A batch is done; whether this makes the first estimate that is worth saying."""
        self.done += 1
        return self.done - self._first == _FIRST_STEPS

    @property
    def left(self) -> str:
        """Time that the rest will take, in words."""
        seconds = (time.perf_counter() - self._began) / max(1, self.done - self._first) * (self.total - self.done)
        return f"about {lasting(seconds)}"


def lasting(seconds: float) -> str:
    """A time in its natural unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
