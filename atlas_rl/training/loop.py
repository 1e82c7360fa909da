"""The training of a static head on recorded calls, whatever its kind: epochs, held-out calls, interruptions, progress.

The data are recorded generation calls of the policy (`replay/record.py`): tokens, hidden states, and the state that every
token was drawn from, which gives the policy's exact distribution. What a kind of head adds is its `Lesson`.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl import progress
from atlas_rl.replay.record import Recorded
from atlas_rl.training.state import SAVE_EVERY_S, Pace, Progress, TrainingState

HELD_OUT = 0.1  # share of the calls


class Lesson(ABC):
    """What a head learns from recorded calls.

    Args:
        head: The head; its parameters that require a gradient are trained.
        settings: A dataclass with `layers`, `epochs`, `batch_size`, `learning_rate` and `seed` among its fields.
    """

    def __init__(self, head: nn.Module, settings: Any) -> None:
        self.head, self.settings = head, settings

    @abstractmethod
    def batch(self, recorded: Recorded, requests: np.ndarray, order: np.random.Generator | None) -> Any:
        """One batch: requests (int64 `[n]`) of a recorded call; `order` is None for measuring."""

    @abstractmethod
    def loss(self, batch: Any) -> torch.Tensor | None:
        """A scalar with gradients; None for a batch without anything to predict."""

    @abstractmethod
    def evaluate(self, batches: Iterator[Any]) -> dict[str, list[float | None]]:
        """`acceptance` and `agreement` per draft position, see `Progress`; None for positions without completions."""


def num_held_out(num_calls: int, share: float = HELD_OUT) -> int:
    """Number of recorded calls that are held out of training, at least one."""
    return max(1, round(share * num_calls))


def split_calls(calls: Sequence[Path], share: float) -> tuple[list[Path], list[Path]]:
    """Calls that are held out, and those that are trained on.

    Raises:
        ValueError: Too few calls, or completions too short to learn from.
    """
    first = num_held_out(len(calls), share)
    if len(calls) <= first:
        raise ValueError(f"{len(calls)} recorded calls are too few to hold one out: generate from more prompts")
    if not any(map(_num_targets, calls[first:])):
        raise ValueError(
            "no completion reaches the third position, the first that a head predicts: give longer prompts"
        )
    return list(calls[:first]), list(calls[first:])


def run(
    lesson: Lesson,
    held_out: Sequence[Path],
    trained: Sequence[Path],
    output: Path,
    say: Callable[[str], None],
    save_every_s: float = SAVE_EVERY_S,
) -> None:
    """Train a head, or resume an interrupted training in `output`.

    Args:
        lesson: The head and what it learns.
        held_out: Recorded calls to measure on after every epoch.
        trained: Recorded calls to train on.
        output: Gets the training's state and log after every epoch, and its state at intervals within one.
        say: Receives lines of progress. On a terminal, a bar shows the batches instead.
        save_every_s: Seconds of training that an interruption may lose.

    Raises:
        ValueError: Calls without the layers, or a saved state of a training with other settings.
    """
    settings = lesson.settings
    log = Progress(asdict(settings), *_described(trained, held_out))
    trainable = [parameter for parameter in lesson.head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    state = TrainingState(output, lesson.head, optimizer, log)
    state.resume()
    num_batches = sum(math.ceil(len(Recorded.load(path).sequences.lengths) / settings.batch_size) for path in trained)
    pace = Pace(num_batches * settings.epochs, num_batches * len(log.epochs) + state.begun.batches)
    if 0 < pace.done < pace.total:
        say(f"goes on at epoch {len(log.epochs) + 1}/{settings.epochs}, batch {state.begun.batches + 1}/{num_batches}")
    for epoch in range(len(log.epochs), settings.epochs):
        batches = batches_of(lesson, trained, np.random.default_rng((settings.seed, epoch)))
        _train_epoch(lesson, state, batches, num_batches, pace, say, save_every_s)
        begun = state.begun
        row: dict[str, Any] = {"loss": float(np.mean(begun.losses)), "seconds": begun.seconds}
        with torch.no_grad():
            row |= lesson.evaluate(batches_of(lesson, held_out, None))
        say(f"epoch {epoch + 1}/{settings.epochs} | loss {row['loss']:.3f} | held-out acceptance by position "
            + " ".join("-" if value is None else f"{value:.2f}" for value in row["acceptance"]))  # fmt: skip
        state.end_epoch(row)
    state.write_log()  # an interruption may have come after the last state and before its log


def batches_of(lesson: Lesson, calls: Sequence[Path], order: np.random.Generator | None) -> Iterator[Any]:
    """Batches of whole sequences: calls in random order, sequences of a call sorted by length to pad little.

    Args:
        lesson: Makes the batches.
        calls: Recorded calls.
        order: Source of the random order; None keeps the given one.

    Raises:
        ValueError: A call has no hidden states of a layer that the head reads.
    """
    paths, size = list(calls), lesson.settings.batch_size
    if order is not None:
        order.shuffle(paths)
    for path in paths:
        recorded = Recorded.load(path)
        missing = sorted(set(lesson.settings.layers) - set(recorded.layers))
        if missing:
            raise ValueError(f"'{path}' has no hidden states of layers {missing}: record them anew")
        by_length = np.argsort(recorded.sequences.lengths)
        groups = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        if order is not None:
            order.shuffle(groups)
        for group in groups:
            yield lesson.batch(recorded, group, order)


def means_of(overlap: np.ndarray, same: np.ndarray, count: np.ndarray) -> dict[str, list[float | None]]:
    """The result of `Lesson.evaluate` from sums per draft position, float64 `[n]` each.

    Args:
        overlap: Sums of `sum_x min(p, q)`.
        same: Numbers of equal likeliest tokens.
        count: Numbers of positions.
    """
    sums = {"acceptance": overlap, "agreement": same}
    return {
        name: [float(s / n) if n else None for s, n in zip(total, count, strict=True)] for name, total in sums.items()
    }


def _train_epoch(
    lesson: Lesson,
    state: TrainingState,
    batches: Iterator[Any],
    num_batches: int,
    pace: Pace,
    say: Callable[[str], None],
    save_every_s: float,
) -> None:
    """Run the rest of an epoch. Progress is shown as a bar on a terminal, else as a line at intervals."""
    settings = lesson.settings
    epoch, begun = len(state.log.epochs), state.begun
    name = f"epoch {epoch + 1}/{settings.epochs}"
    saved, before_s = time.perf_counter(), begun.seconds
    began = saved
    with progress.bar(name, num_batches, "batch", done=begun.batches) as bar:
        for batch in islice(batches, begun.batches, None):
            state.optimizer.param_groups[0]["lr"] = _learning_rate(settings, epoch + begun.batches / num_batches)
            loss = _train_step(lesson, batch, state.optimizer)
            begun.losses += [] if loss is None else [loss]
            begun.batches += 1
            now = time.perf_counter()
            begun.seconds = before_s + now - began
            if now - saved >= save_every_s:
                state.save()
                saved = time.perf_counter()
            first_estimate = pace.step()
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(begun.losses[-20:] or [0.0]):.3f}, {pace.left} for all epochs")
            if first_estimate:
                say(f"training takes {pace.left} from here, and measuring on held-out calls after each epoch besides")
            if begun.batches % 20 == 0 and begun.losses and not progress.shown():
                say(f"{name} | batch {begun.batches}/{num_batches} | loss {np.mean(begun.losses[-20:]):.3f} | "
                    f"{pace.left} for all epochs")  # fmt: skip


def _train_step(lesson: Lesson, batch: Any, optimizer: torch.optim.Optimizer) -> float | None:
    """Take one optimizer step; returns its loss, or None for a batch without anything to predict."""
    loss = lesson.loss(batch)
    if loss is None:
        return None
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
    optimizer.step()
    return float(loss.detach())


def _described(trained: Sequence[Path], held_out: Sequence[Path]) -> tuple[int, int, str]:
    """Drawn tokens of the calls to train on and of those held out, and a hash of both.

    The states that tokens were drawn from are hashed too: other weights may well draw the same tokens.
    """
    digest, num_tokens = hashlib.sha256(), [0, 0]
    for part, paths in enumerate((trained, held_out)):
        for path in paths:
            recorded = Recorded.load(path)
            sequences = recorded.sequences
            num_tokens[part] += int((sequences.lengths - sequences.prompt_lengths).sum())
            for array in (sequences.lengths, sequences.completion_tokens(), recorded.head_inputs.numpy()):
                digest.update(np.ascontiguousarray(array).data)
    return num_tokens[0], num_tokens[1], digest.hexdigest()


def _num_targets(path: Path) -> int:
    """Number of tokens of a recorded call that a head predicts: those from the third position on."""
    sequences = Recorded.load(path).sequences
    return int(np.maximum(sequences.lengths - np.maximum(sequences.prompt_lengths, 2), 0).sum())


def _learning_rate(settings: Any, epoch: float) -> float:
    share = epoch / settings.epochs
    if share < 0.05:
        return settings.learning_rate * share / 0.05
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95)))
