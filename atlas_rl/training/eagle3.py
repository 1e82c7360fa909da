"""Trains an EAGLE-3 head with test-time unrolling (Li et al., arXiv 2503.01840, section 3.2).

The unrolled head and its loss are in `speculators/eagle3/unrolling.py`. The data are recorded generation calls of the
policy (`replay/replay.py`): tokens, hidden states, and the state that every token was drawn from, which gives the policy's
exact distribution.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl import progress
from atlas_rl.policy.view import PolicyView
from atlas_rl.replay.record import Recorded
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.unrolling import Batch, Stretch, cross_entropy, shifted, unrolled
from atlas_rl.training.head_shape import head_config
from atlas_rl.training.state import SAVE_EVERY_S, Pace, Progress, TrainingState

HELD_OUT = 0.1  # share of the calls


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Training settings of a head.

    Attributes:
        layers: Decoder layers of the policy that the head reads, ascending.
        draft_vocab_size: Most tokens that the head can propose; the most used tokens of the data are taken.
        intermediate_size: Size of the head's MLP; None takes the policy's.
        unroll: Steps of test-time unrolling.
        epochs: Passes over the data.
        batch_size: Sequences per optimizer step.
        learning_rate: Peak, reached after a twentieth of the steps and then annealed to a tenth.
        step_weight: Weight of each unrolled step relative to the one before.
        held_out: Share of the calls that is held out of training.
        seed: Seed of the initial weights and of the order of the data.
    """

    layers: tuple[int, ...]
    draft_vocab_size: int = 4096
    intermediate_size: int | None = None
    unroll: int = 4
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-3
    step_weight: float = 0.8
    held_out: float = HELD_OUT
    seed: int = 0


def new_head(policy: PolicyView, settings: TrainSettings, token_ids: np.ndarray) -> Eagle3Head:
    """Make a head for `policy` over `token_ids` (sorted int64); its output layer starts as the policy's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = Eagle3Head(head_config(policy, settings.layers, len(token_ids), settings.intermediate_size))
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    ids = torch.from_numpy(token_ids)
    head.set_vocabulary(ids)
    with torch.no_grad():
        head.lm_head.weight.copy_(policy.rows_of(token_ids)[1])
    return head.to(policy.device)


def num_held_out(num_calls: int, share: float = HELD_OUT) -> int:
    """Number of recorded calls that are held out of training, at least one."""
    return max(1, round(share * num_calls))


def most_used_tokens(calls: Sequence[Path], vocab_size: int, size: int) -> np.ndarray:
    """The most used tokens of the completions: sorted int64 ids, at most `size`."""
    counts = np.zeros(vocab_size, np.int64)
    for path in calls:
        sequences = Recorded.load(path).sequences
        for request in range(len(sequences.lengths)):
            counts += np.bincount(sequences.completion(request), minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")[:size]
    return np.sort(order[counts[order] > 0])


def train(
    policy: PolicyView,
    calls: Sequence[Path],
    output: Path,
    settings: TrainSettings,
    say: Callable[[str], None] = print,
    save_every_s: float = SAVE_EVERY_S,
) -> Eagle3Head:
    """Train a head, or resume an interrupted training in `output`.

    Args:
        policy: Provides embeddings and output layer; only read.
        calls: Recorded calls with the layers of `settings`.
        output: Gets the training's state and log after every epoch, and its state at intervals within one.
        settings: Training settings.
        say: Receives lines of progress. On a terminal, a bar shows the batches instead.
        save_every_s: Seconds of training that an interruption may lose.

    Raises:
        ValueError: Too few calls, completions too short to learn from, calls without the layers, or a saved state of a
            training with other settings.
    """
    first = num_held_out(len(calls), settings.held_out)
    if len(calls) <= first:
        raise ValueError(f"{len(calls)} recorded calls are too few to hold one out: generate from more prompts")
    held_out, trained = list(calls[:first]), list(calls[first:])
    if not any(map(_num_targets, trained)):
        raise ValueError(
            "no completion reaches the third position, the first that a head predicts: give longer prompts"
        )
    head = new_head(policy, settings, most_used_tokens(trained, policy.vocab_size, settings.draft_vocab_size))
    counts = [int(sum((s := Recorded.load(p).sequences).lengths - s.prompt_lengths)) for p in (*held_out, *trained)]
    log = Progress(asdict(settings), sum(counts[first:]), sum(counts[:first]))
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    state = TrainingState(output, head, optimizer, log)
    state.resume()
    num_batches = math.ceil(sum(len(Recorded.load(path).sequences.lengths) for path in trained) / settings.batch_size)
    pace = Pace(num_batches * settings.epochs, num_batches * len(log.epochs) + state.begun.batches)
    if 0 < pace.done < pace.total:
        say(f"goes on at epoch {len(log.epochs) + 1}/{settings.epochs}, batch {state.begun.batches + 1}/{num_batches}")
    for epoch in range(len(log.epochs), settings.epochs):
        batches = _batches(policy, trained, settings, np.random.default_rng((settings.seed, epoch)))
        _train_epoch(state, policy, batches, settings, num_batches, pace, say, save_every_s)
        begun = state.begun
        row: dict[str, Any] = {"loss": float(np.mean(begun.losses)), "seconds": begun.seconds}
        row |= evaluate(head, policy, _batches(policy, held_out, settings, None), settings)
        say(f"epoch {epoch + 1}/{settings.epochs} | loss {row['loss']:.3f} | held-out acceptance by position "
            + " ".join("-" if value is None else f"{value:.2f}" for value in row["acceptance"]))  # fmt: skip
        state.end_epoch(row)
    return head


def _train_epoch(
    state: TrainingState,
    policy: PolicyView,
    batches: Iterator[Batch],
    settings: TrainSettings,
    num_batches: int,
    pace: Pace,
    say: Callable[[str], None],
    save_every_s: float,
) -> None:
    """Run the rest of an epoch. Progress is shown as a bar on a terminal, else as a line at intervals."""
    epoch, begun = len(state.log.epochs), state.begun
    name = f"epoch {epoch + 1}/{settings.epochs}"
    saved, before_s = time.perf_counter(), begun.seconds
    began = saved
    with progress.bar(name, num_batches, "batch", done=begun.batches) as bar:
        for batch in islice(batches, begun.batches, None):
            state.optimizer.param_groups[0]["lr"] = _learning_rate(settings, epoch + begun.batches / num_batches)
            loss = _train_step(state.head, policy, batch, state.optimizer, settings)
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


def _train_step(
    head: Eagle3Head, policy: PolicyView, batch: Batch, optimizer: torch.optim.Optimizer, settings: TrainSettings
) -> float | None:
    """Take one optimizer step; returns its loss, or None for a batch without anything to predict."""

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        return policy.logits(states, head.token_ids)

    loss = cross_entropy(head, batch, logits_of, settings.unroll, settings.step_weight)
    if loss is None:
        return None
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
    optimizer.step()
    return float(loss.detach())


def evaluate(
    head: Eagle3Head, policy: PolicyView, batches: Iterator[Batch], settings: TrainSettings
) -> dict[str, list[float | None]]:
    """`acceptance` and `agreement` per unrolled position, see `Progress`; None for positions without completions."""
    overlap, same, count = np.zeros(settings.unroll), np.zeros(settings.unroll), np.zeros(settings.unroll)
    with torch.no_grad():
        for batch in batches:
            for number, step in enumerate(unrolled(head, batch, settings.unroll)):
                if not len(step.features):
                    continue
                whole, q = policy.logits(step.drawn_from), head.logits(step.features).softmax(dim=-1)
                # The policy's mass outside the reduced vocabulary can never be matched.
                p = whole.softmax(dim=-1)[:, head.token_ids]
                overlap[number] += float(torch.minimum(p, q).sum())
                same[number] += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
                count[number] += len(p)
    means = {"acceptance": overlap, "agreement": same}
    return {
        name: [float(s / n) if n else None for s, n in zip(sums, count, strict=True)] for name, sums in means.items()
    }


def _num_targets(path: Path) -> int:
    """Number of tokens of a recorded call that the head predicts: those from the third position on."""
    sequences = Recorded.load(path).sequences
    return int(np.maximum(sequences.lengths - np.maximum(sequences.prompt_lengths, 2), 0).sum())


def _batches(
    policy: PolicyView, calls: Sequence[Path], settings: TrainSettings, order: np.random.Generator | None
) -> Iterator[Batch]:
    """Batches of whole sequences: calls in random order, sequences of a call sorted by length to pad little."""
    paths = list(calls)
    if order is not None:
        order.shuffle(paths)
    for path in paths:
        recorded = Recorded.load(path)
        missing = sorted(set(settings.layers) - set(recorded.layers))
        if missing:
            raise ValueError(f"'{path}' has no hidden states of layers {missing}: record them anew")
        by_length = np.argsort(recorded.sequences.lengths)
        groups = [by_length[i : i + settings.batch_size] for i in range(0, len(by_length), settings.batch_size)]
        if order is not None:
            order.shuffle(groups)
        for group in groups:
            yield _batch(policy, recorded, group)


def _batch(policy: PolicyView, recorded: Recorded, requests: np.ndarray) -> Batch:
    sequences = recorded.sequences
    lengths, prompts = sequences.lengths, sequences.prompt_lengths
    layers_at, last_at = np.cumsum(lengths - 1) - (lengths - 1), np.cumsum(lengths - prompts) - (lengths - prompts)
    size, width, hidden = len(requests), int(lengths[requests].max()), recorded.head_inputs.shape[1]
    token_ids = torch.zeros(size, width, dtype=torch.int64)
    drawn_from = torch.zeros(size, width, hidden)
    drawn = torch.zeros(size, width, dtype=torch.bool)
    features = {layer: torch.zeros(size, width, hidden) for layer in recorded.layers}
    for row, request in enumerate(requests):
        n, prompt = int(lengths[request]), int(prompts[request])
        token_ids[row, :n] = torch.from_numpy(sequences.token_ids[request, :n].astype(np.int64))
        drawn_from[row, prompt:n] = recorded.head_inputs[last_at[request] : last_at[request] + n - prompt].float()
        drawn[row, prompt:n] = True
        for layer, states in recorded.layers.items():
            features[layer][row, : n - 1] = states[layers_at[request] : layers_at[request] + n - 1].float()
    device = policy.device
    features = {layer: states.to(device) for layer, states in features.items()}
    embeddings = policy.embed(shifted(token_ids, 1).to(device)).detach()
    starts = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(Stretch(embeddings, features, starts), drawn_from.to(device), drawn.to(device))


def _learning_rate(settings: TrainSettings, epoch: float) -> float:
    share = epoch / settings.epochs
    if share < 0.05:
        return settings.learning_rate * share / 0.05
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95)))
