"""Trains a DFlash head (arXiv 2602.06036) to predict every token of a block from the policy's features before it.

The blocks are in `anchored_blocks.py`, the training loop in `loop.py`. The head has neither an embedding nor an LM head of
its own: it learns to draft with the policy's, as they are when it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atlas_rl.policy.logit_form import LogitForm
from atlas_rl.policy.upload import uploaded
from atlas_rl.policy.view import PolicyView
from atlas_rl.replay.record import Recorded
from atlas_rl.speculators.dflash.config import DFlashConfig
from atlas_rl.speculators.dflash.head import DFlashHead
from atlas_rl.training.anchored_blocks import BlockBatch, run_blocks
from atlas_rl.training.head_shape import dflash_config
from atlas_rl.training.loop import HELD_OUT, Lesson, means_of, run, split_calls
from atlas_rl.training.padded import PaddedTexts
from atlas_rl.training.state import SAVE_EVERY_S

NUM_LAYERS = 5  # of a head, as in z-lab's


@dataclass(frozen=True, slots=True)
class DFlashSettings:
    """Training settings of a head.

    Attributes:
        layers: Decoder layers of the policy that the head reads, ascending, from 1 on.
        mask_token_id: Token that stands for a position to be drafted; its embedding must not be zero.
        num_layers: Layers of the head.
        block_size: Positions of a block; one less is the longest draft.
        intermediate_size: Size of the head's MLPs; None takes the policy's.
        markov_rank: Rank of DSpark's Markov head, with which a draft token depends on the one before it; 0 for none.
        blocks_per_text: Most blocks that are learned from in a text and pass over the data, at random places.
        epochs: Passes over the data.
        batch_size: Sequences per optimizer step.
        learning_rate: Peak, reached after a twentieth of the steps and then annealed to a tenth.
        step_weight: Weight of each position of a draft relative to the one before: later tokens count only if all before
            them are accepted.
        held_out: Share of the calls that is held out of training.
        seed: Seed of the initial weights and of the order of the data.
    """

    layers: tuple[int, ...]
    mask_token_id: int
    num_layers: int = NUM_LAYERS
    block_size: int = 8
    intermediate_size: int | None = None
    markov_rank: int = 0
    blocks_per_text: int = 32
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-3
    step_weight: float = 0.8
    held_out: float = HELD_OUT
    seed: int = 0


def default_dflash_layers(num_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Policy layers that a new head reads: evenly spaced, as in z-lab's code; fewer if the policy has fewer.

    z-lab counts the layers whose outputs are read, from the second to the third-last; here it is the layers whose inputs
    are. Empty for a policy of one layer, which has no input between layers.
    """
    first, last = 2, num_layers - 2
    if last <= first:
        return tuple(range(1, num_layers))[-num_draft_layers:]
    if num_draft_layers == 1:
        return (num_layers // 2 + 1,)
    step = (last - first) / (num_draft_layers - 1)
    return tuple(sorted({round(first + number * step) for number in range(num_draft_layers)}))


def shape_for(policy: PolicyView, settings: DFlashSettings) -> DFlashConfig:
    """Shape of a new head for `policy`.

    Raises:
        ValueError: No head fits the policy, its mask token has no embedding, or its logits are no scaled or capped output
            of its LM head.
    """
    token, table = settings.mask_token_id, policy.input_table
    if not 0 <= token < len(table):
        raise ValueError(f"the mask token {token} has no embedding: the policy has those of {len(table)} tokens")
    if not bool(table[token].any()):
        raise ValueError(f"the embedding of the mask token {token} is zero: give another token, --mask-token-id")
    if policy.form is None:
        raise ValueError(
            "the policy's logits are no scaled or capped output of its LM head: no DFlash head can learn them"
        )
    return dflash_config(
        policy,
        settings.layers,
        num_layers=settings.num_layers,
        block_size=settings.block_size,
        mask_token_id=token,
        intermediate_size=settings.intermediate_size,
        markov_rank=settings.markov_rank,
    )


def new_dflash_head(policy: PolicyView, settings: DFlashSettings) -> DFlashHead:
    """Make a head for `policy`; `ValueError` as for `shape_for`."""
    config = shape_for(policy, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = DFlashHead(config)
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    return head.to(policy.device)


def train_dflash(
    policy: PolicyView,
    calls: Sequence[Path],
    output: Path,
    settings: DFlashSettings,
    say: Callable[[str], None] = print,
    save_every_s: float = SAVE_EVERY_S,
) -> DFlashHead:
    """Train a head, or resume an interrupted training in `output`.

    Args:
        policy: Provides embeddings and LM head; only read.
        calls: Recorded calls with the layers of `settings`.
        output: See `loop.run`, as for `say` and `save_every_s`.
        settings: Training settings.
        say: Receives lines of progress.
        save_every_s: Seconds of training that an interruption may lose.

    Raises:
        ValueError: No head fits the policy, too few calls, completions too short to learn from, calls without the layers,
            or a saved state of a training with other settings.
    """
    held_out, trained = split_calls(calls, settings.held_out)
    head = new_dflash_head(policy, settings)
    run(DFlashLesson(policy, head, settings), held_out, trained, output, say, save_every_s)
    return head


class DFlashLesson(Lesson):
    """What a DFlash head learns: the policy's distribution of every token of a block.

    Args:
        policy: Provides embeddings and LM head.
        head: The head.
        settings: Training settings.
    """

    head: DFlashHead
    settings: DFlashSettings

    def __init__(self, policy: PolicyView, head: DFlashHead, settings: DFlashSettings) -> None:
        super().__init__(head, settings)
        self._policy = policy
        rows, biases = policy.output_rows(torch.arange(policy.vocab_size, device=policy.device))
        self._rows, self._biases = rows.detach().float(), biases.detach().float()
        self._form = policy.form or LogitForm()

    def batch(self, recorded: Recorded, requests: np.ndarray, order: np.random.Generator | None) -> BlockBatch:
        """A batch whose blocks stand at random tokens, or evenly spaced ones for measuring."""
        device, size = self._policy.device, self.settings.block_size
        texts = PaddedTexts.of(recorded, requests, device)
        anchors = self._anchors(texts, order)
        starts = uploaded(anchors, device)
        behind = starts[:, :, None] + torch.arange(1, size, device=device)
        within = behind < texts.token_ids.shape[1]
        # A text of few tokens repeats its last anchor, from which nothing is learned again.
        repeated = np.diff(anchors, axis=1, prepend=-1) == 0
        behind = behind.clamp(max=texts.token_ids.shape[1] - 1)
        row = torch.arange(len(requests), device=device)[:, None, None]
        valid = texts.drawn[row, behind] & within & ~uploaded(repeated, device)[:, :, None]
        tokens = torch.full((*anchors.shape, size), self.settings.mask_token_id, device=device, dtype=torch.int64)
        tokens[:, :, 0] = texts.token_ids.gather(1, starts)
        embeddings = self._policy.embed(tokens).detach()
        before = texts.token_ids[row, behind - 1]
        return BlockBatch(texts.features, starts, embeddings, before, texts.drawn_from[row, behind], valid)

    def _anchors(self, texts: PaddedTexts, order: np.random.Generator | None) -> np.ndarray:
        """int64 `[batch, blocks]`, ascending: from the prompt's last token to the last but one, none at position 0."""
        firsts, ends = np.maximum(texts.prompt_lengths - 1, 1), texts.lengths - 1
        counts = np.maximum(ends - firsts, 0)
        most = max(1, min(self.settings.blocks_per_text, int(counts.max())))
        anchors = np.empty((len(counts), most), np.int64)
        for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
            if order is not None and count > most:
                chosen = np.sort(order.choice(count, most, replace=False))
            else:
                chosen = np.unique(np.linspace(0, max(count - 1, 0), most).astype(np.int64))
            anchors[row] = first + np.append(chosen, np.full(most - len(chosen), chosen[-1]))
        return np.minimum(anchors, np.maximum(texts.lengths - 1, 0)[:, None])

    def loss(self, batch: BlockBatch) -> torch.Tensor | None:
        if not bool(batch.valid.any()):
            return None
        with torch.no_grad():
            target = self._logits(batch.drawn_from[batch.valid]).softmax(dim=-1)
        log_q = self._drafted(run_blocks(self.head, batch)[batch.valid], batch.before[batch.valid]).log_softmax(dim=-1)
        depth = torch.arange(self.settings.block_size - 1, device=batch.valid.device)
        weights = (self.settings.step_weight**depth).expand(batch.valid.shape)[batch.valid]
        return -(weights * (target * log_q).sum(dim=-1)).sum() / weights.sum()

    def evaluate(self, batches: Iterator[BlockBatch]) -> dict[str, list[float | None]]:
        overlap, same, count = np.zeros((3, self.settings.block_size - 1))
        for batch in batches:
            out = run_blocks(self.head, batch)
            for depth in range(self.settings.block_size - 1):
                valid = batch.valid[:, :, depth]
                p = self._logits(batch.drawn_from[:, :, depth][valid]).softmax(dim=-1)
                q = self._drafted(out[:, :, depth][valid], batch.before[:, :, depth][valid]).softmax(dim=-1)
                overlap[depth] += float(torch.minimum(p, q).sum())
                same[depth] += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
                count[depth] += len(p)
        return means_of(overlap, same, count)

    def _drafted(self, states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The head's logits `[n, vocab]` from its outputs `[n, hidden]` and the tokens before, int64 `[n]`."""
        logits = self._logits(states)
        return logits if self.head.markov_head is None else logits + self.head.markov_head(before)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """The policy's logits `[n, vocab]` of inputs of its LM head, with gradients, which `PolicyView.logits` has not."""
        return self._form(functional.linear(states.float(), self._rows, self._biases))
