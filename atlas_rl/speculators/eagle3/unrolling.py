"""Unrolls an EAGLE-3 head as it drafts, with gradients (Li et al., arXiv 2503.01840, section 3.2).

When a head drafts, it reads its own outputs of earlier steps. So training runs several steps from every position: the
first reads the policy's features, each later one the head's own output along the chain that starts there. Attention in
step j sees the policy's features up to the chain's start, and the chain's own steps after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from atlas_rl.speculators.eagle3.head import Eagle3Head

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Maps the policy's final hidden states `[n, hidden]` to its logits over the head's tokens, `[n, draft_vocab]`."""


@dataclass(slots=True)
class Stretch:
    """Consecutive positions of some texts, padded at their end.

    Attributes:
        embeddings: `[batch, tokens, hidden]`, of the token after each position.
        features: Per layer `[batch, tokens, hidden]`, of every position.
        starts: int64 `[batch]`, index of the first position in its text.
    """

    embeddings: torch.Tensor
    features: dict[int, torch.Tensor]
    starts: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """int64 `[batch, tokens]`."""
        return self.starts[:, None] + torch.arange(self.embeddings.shape[1], device=self.starts.device)


@dataclass(slots=True)
class Batch:
    """Chains to learn from: one starts at every position of `rows`.

    Attributes:
        rows: The positions.
        drawn_from: `[batch, tokens, hidden]`: hidden state that the token at each position was drawn from.
        drawn: bool `[batch, tokens]`, whether the token at each position was drawn by the policy.
        before: Positions before `rows` in their texts, padded at the end; None for none. No gradient flows into it.
        known: bool `[batch, tokens]`, which positions of `before` exist.
    """

    rows: Stretch
    drawn_from: torch.Tensor
    drawn: torch.Tensor
    before: Stretch | None = None
    known: torch.Tensor | None = None


@dataclass(slots=True)
class UnrolledStep:
    """One unrolled step at the positions where it predicts a token that the policy drew.

    Attributes:
        features: `[n, hidden]`; `head.logits` turns them into predictions.
        drawn_from: `[n, hidden]`, hidden states that the predicted tokens were drawn from.
        valid: bool `[batch, tokens]`, which positions these are.
    """

    features: torch.Tensor
    drawn_from: torch.Tensor
    valid: torch.Tensor


def unrolled(head: Eagle3Head, batch: Batch, unroll: int) -> Iterator[UnrolledStep]:
    """Run `unroll` steps from every position."""
    rows, chain = batch.rows, _Chain(batch.rows.positions)
    if batch.before is not None and batch.known is not None:
        chain.read(head, batch.before, batch.known)
    features = head.fuse(rows.features)
    for step in range(unroll):
        embeddings = shifted(rows.embeddings, step).to(features.dtype)
        features = head(embeddings, features, rows.positions + step, chain)
        valid = shifted(batch.drawn, step + 2)
        yield UnrolledStep(features[valid], shifted(batch.drawn_from, step + 2)[valid], valid)


def cross_entropy(
    head: Eagle3Head, batch: Batch, logits_of: Logits, unroll: int, step_weight: float, temperature: float = 1.0
) -> torch.Tensor | None:
    """Cross-entropy with the policy's distribution over the head's tokens, weighted over the unrolled steps.

    Args:
        head: Gets the gradients.
        batch: Chains to learn from.
        logits_of: Gives the policy's logits.
        unroll: Number of steps.
        step_weight: Weight of each step relative to the one before.
        temperature: Temperature of both distributions.

    Returns:
        A scalar; None if the texts are too short for any step.
    """
    losses, weights = [], []
    for number, step in enumerate(unrolled(head, batch, unroll)):
        if len(step.features):
            with torch.no_grad():
                target = (logits_of(step.drawn_from) / temperature).softmax(dim=-1)
            log_q = (head.logits(step.features) / temperature).log_softmax(dim=-1)
            per_position = -(target * log_q).sum(dim=-1)
            losses.append(per_position.mean() * step_weight**number)
            weights.append(step_weight**number)
    return torch.stack(losses).sum() / sum(weights) if losses else None


class _Chain:
    """Attention of chains: step 0 is causal; in step j each position also sees its own chain's steps 1 to j."""

    def __init__(self, positions: torch.Tensor) -> None:
        num_tokens = positions.shape[1]
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=positions.device).tril()
        self._seen = causal[None, None]
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, head: Eagle3Head, before: Stretch, known: torch.Tensor) -> None:
        """Cache the keys and values of `before`; positions that are not `known` are masked."""

        def keep(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self._before = key, value
            return torch.zeros_like(query).transpose(1, 2)

        with torch.no_grad():
            features = head.fuse(before.features)
            head(before.embeddings.to(features.dtype), features, before.positions, keep)
        num_tokens = self._seen.shape[-1]
        seen = self._seen.expand(len(known), 1, num_tokens, num_tokens)
        self._seen = torch.cat([known[:, None, None].expand(-1, 1, num_tokens, -1), seen], dim=-1)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        if self._before is not None and not self._keys:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self._before, (key, value), strict=True))
        self._keys.append(key.repeat_interleave(group, dim=1))
        self._values.append(value.repeat_interleave(group, dim=1))
        scale = query.shape[-1] ** -0.5
        scores = (query @ self._keys[0].transpose(-1, -2) * scale).masked_fill(~self._seen, float("-inf"))
        own = [(query * k).sum(dim=-1, keepdim=True) * scale for k in self._keys[1:]]
        weights = torch.cat([scores, *own], dim=-1).softmax(dim=-1)
        num_seen = scores.shape[-1]
        out = weights[..., :num_seen] @ self._values[0]
        for index, v in enumerate(self._values[1:]):
            out = out + weights[..., num_seen + index, None] * v
        return out.transpose(1, 2)


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """`x` moved `by` places towards the front of dimension 1, zero-padded at the end."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)
