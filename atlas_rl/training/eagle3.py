"""Trains an EAGLE-3 head with test-time unrolling (Li et al., arXiv 2503.01840, section 3.2).

The unrolled head and its loss are in `speculators/eagle3/unrolling.py`, the training loop in `loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atlas_rl.policy.view import PolicyView
from atlas_rl.replay.record import Recorded
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.unrolling import Batch, Stretch, cross_entropy, shifted, unrolled
from atlas_rl.training.head_shape import head_config
from atlas_rl.training.loop import HELD_OUT, Lesson, means_of, run, split_calls
from atlas_rl.training.padded import PaddedTexts
from atlas_rl.training.state import SAVE_EVERY_S


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
        output: See `loop.run`, as for `say` and `save_every_s`.
        settings: Training settings.
        say: Receives lines of progress.
        save_every_s: Seconds of training that an interruption may lose.

    Raises:
        ValueError: Too few calls, completions too short to learn from, calls without the layers, or a saved state of a
            training with other settings.
    """
    held_out, trained = split_calls(calls, settings.held_out)
    head = new_head(policy, settings, most_used_tokens(trained, policy.vocab_size, settings.draft_vocab_size))
    run(Eagle3Lesson(policy, head, settings), held_out, trained, output, say, save_every_s)
    return head


class Eagle3Lesson(Lesson):
    """What an EAGLE-3 head learns: the policy's distribution along chains of its own outputs.

    Args:
        policy: Provides embeddings and the policy's logits.
        head: The head.
        settings: Training settings.
    """

    head: Eagle3Head
    settings: TrainSettings

    def __init__(self, policy: PolicyView, head: Eagle3Head, settings: TrainSettings) -> None:
        super().__init__(head, settings)
        self._policy = policy

    def batch(self, recorded: Recorded, requests: np.ndarray, order: np.random.Generator | None) -> Batch:
        texts = PaddedTexts.of(recorded, requests, self._policy.device)
        embeddings = self._policy.embed(shifted(texts.token_ids, 1)).detach()
        starts = texts.token_ids.new_zeros(len(requests))
        return Batch(Stretch(embeddings, texts.features, starts), texts.drawn_from, texts.drawn)

    def loss(self, batch: Batch) -> torch.Tensor | None:
        settings = self.settings
        return cross_entropy(self.head, batch, self._logits_of, settings.unroll, settings.step_weight)

    def evaluate(self, batches: Iterator[Batch]) -> dict[str, list[float | None]]:
        head, overlap, same, count = self.head, *np.zeros((3, self.settings.unroll))
        for batch in batches:
            for number, step in enumerate(unrolled(head, batch, self.settings.unroll)):
                if not len(step.features):
                    continue
                whole, q = self._policy.logits(step.drawn_from), head.logits(step.features).softmax(dim=-1)
                # The policy's mass outside the reduced vocabulary can never be matched.
                p = whole.softmax(dim=-1)[:, head.token_ids]
                overlap[number] += float(torch.minimum(p, q).sum())
                same[number] += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
                count[number] += len(p)
        return means_of(overlap, same, count)

    def _logits_of(self, states: torch.Tensor) -> torch.Tensor:
        return self._policy.logits(states, self.head.token_ids)
