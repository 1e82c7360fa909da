"""Saves the state of a head's training, so that an interruption costs only minutes, and estimates the time left."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_rl.sync.checkpoint import load_state, save_state
from atlas_rl.whole_files import write_whole

SAVE_EVERY_S = 300.0
_STATE = "training.safetensors"
_LOG = "training.json"
_DATA = ("num_train_tokens", "num_held_out_tokens", "data")
_FIRST_STEPS = 5  # batches before the first time estimate


@dataclass(slots=True)
class Progress:
    """Progress of a training; written to `training.json` after every epoch.

    Attributes:
        settings: Settings of the training.
        num_train_tokens, num_held_out_tokens: Drawn tokens of the calls that are trained on, and of those held out.
        data: Hash of the calls' tokens and of the states that they were drawn from.
        epochs: Per epoch: `loss`, `seconds`, and on held-out calls per unrolled position `acceptance` (`sum_x min(p, q)`,
            within a few points of the acceptance of noise-coupled drafts) and `agreement` (the likeliest tokens are equal).
    """

    settings: dict[str, Any]
    num_train_tokens: int
    num_held_out_tokens: int
    data: str
    epochs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Begun:
    """The epoch in progress.

    Attributes:
        batches: Batches done.
        losses: Losses of its optimizer steps.
        seconds: Seconds spent so far.
    """

    batches: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class TrainingState:
    """Weights, the optimizer's moments and progress, and the folder that stores them.

    Args:
        output: Folder to save to.
        head: Head that is trained.
        optimizer: Optimizer of the head's parameters.
        log: Initial progress, for a training that starts anew.

    Attributes:
        begun: The epoch in progress.
    """

    def __init__(self, output: Path, head: Any, optimizer: torch.optim.Optimizer, log: Progress) -> None:
        self.output, self.head, self.optimizer, self.log = output, head, optimizer, log
        self.begun = Begun()

    def save(self) -> None:
        """Write the whole state; the previous one stays intact until the new one is written."""
        head: nn.Module = self.head
        moments = {str(index): dict(values) for index, values in self.optimizer.state_dict()["state"].items()}
        kept = {"log": json.dumps(asdict(self.log)), "begun": json.dumps(asdict(self.begun))}
        save_state(self.output / _STATE, {"head": dict(head.state_dict()), "optimizer": moments, **kept})

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Append an epoch's results to the log, and save."""
        self.log.epochs.append(row)
        self.begun = Begun()
        self.save()
        self.write_log()

    def write_log(self) -> None:
        """Write `training.json`, whose absence after an interruption the saved state makes up for."""
        write_whole(self.output / _LOG, json.dumps(asdict(self.log), indent=2) + "\n")

    def resume(self) -> None:
        """Continue from what `save` wrote, if anything; `ValueError` if it has other settings or data."""
        if not (self.output / _STATE).is_file():
            return
        log, state = self.log, _state_in(self.output)
        saved = _log_in(state)
        _check_same(self.output, saved, asdict(log))
        self.head.load_state_dict(state["head"])
        described = self.optimizer.state_dict()
        described["state"] = {int(index): values for index, values in state["optimizer"].items()}
        self.optimizer.load_state_dict(described)
        log.epochs = saved["epochs"]
        self.begun = Begun(**json.loads(state.get("begun", "{}")))


def check_same_training(output: Path, settings: Any) -> None:
    """Raise `ValueError` if a folder holds a training with other settings, a dataclass.

    `TrainingState.resume` compares the data too, which needs them read.
    """
    if (output / _STATE).is_file():
        _check_same(output, _log_in(_state_in(output)), {"settings": asdict(settings)})


def _state_in(output: Path) -> dict[str, Any]:
    """The state that `save` wrote; `ValueError` for a damaged file."""
    try:
        return load_state(output / _STATE)
    except ValueError as error:
        raise ValueError(f"the training in '{output}' cannot go on: {error}. Give another --output") from error


def _log_in(state: dict[str, Any]) -> dict[str, Any]:
    log: dict[str, Any] = json.loads(state["log"])
    return log


def _check_same(output: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    present = json.loads(json.dumps(present))
    was, now = saved["settings"], present["settings"]
    differing = [name for name in {**was, **now} if was.get(name, ...) != now.get(name, ...)]
    differing += [name for name in _DATA if name in present and saved.get(name) != present[name]]
    if differing:
        raise ValueError(
            f"'{output}' holds a training with other {', '.join(differing)}: give another --output or --work, or delete "
            f"{_STATE} and {_LOG} in it to train anew on the same continuations"
        )


class Pace:
    """Estimates the remaining time of a training, from the batches since this process started or resumed it.

    Args:
        total: Batches of all epochs.
        done: Batches done before now.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._began, self._first = time.perf_counter(), done

    def step(self) -> bool:
        """Count a batch; returns whether it completes the first estimate worth printing."""
        self.done += 1
        return self.done - self._first == _FIRST_STEPS

    @property
    def left(self) -> str:
        """Remaining time, in words."""
        seconds = (time.perf_counter() - self._began) / max(1, self.done - self._first) * (self.total - self.done)
        return f"about {lasting(seconds)}"


def lasting(seconds: float) -> str:
    """Format a time in a natural unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
