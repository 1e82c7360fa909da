"""Runs a DFlash head on many blocks of a text at once, with gradients (arXiv 2602.06036, section 4.2).

When it drafts, a head sees the policy's features up to the newest token. So in training a block stands at every chosen
token of a text, its anchor: its queries see the features of the positions before the anchor, and the block itself.
Blocks do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from atlas_rl.speculators.dflash.head import DFlashHead


@dataclass(slots=True)
class BlockBatch:
    """Blocks to learn from.

    Attributes:
        features: Per layer `[batch, tokens, hidden]`, of the policy at every position of the texts.
        anchors: int64 `[batch, blocks]`, positions of the blocks' first tokens, at least 1.
        embeddings: `[batch, blocks, block_size, hidden]`, of the anchors and the mask tokens.
        before: int64 `[batch, blocks, block_size - 1]`, for each token to predict the one before it.
        drawn_from: `[batch, blocks, block_size - 1, hidden]`: hidden states that the tokens behind each anchor were drawn
            from.
        valid: bool `[batch, blocks, block_size - 1]`, which of these tokens the policy drew.
    """

    features: dict[int, torch.Tensor]
    anchors: torch.Tensor
    embeddings: torch.Tensor
    before: torch.Tensor
    drawn_from: torch.Tensor
    valid: torch.Tensor


def run_blocks(head: DFlashHead, batch: BlockBatch) -> torch.Tensor:
    """Inputs of the LM head at the mask tokens, `[batch, blocks, block_size - 1, hidden]`.

    The head must have no windows and no causal layers, like every newly made one.
    """
    assert all(span.window is None and not span.causal for span in head.config.spans), "not a head of this training"
    features = head.fuse(batch.features)
    texts, blocks, size, hidden = batch.embeddings.shape
    within = torch.arange(size, device=batch.anchors.device)
    own = (batch.anchors[:, :, None] + within).view(texts, blocks * size)
    positions = torch.arange(features.shape[1], device=own.device)[None].expand(texts, -1)
    attention = _BlocksOfTexts(batch.anchors, size, features.shape[1])
    head.read(features, positions, attention.keep)
    embeddings = batch.embeddings.reshape(texts, blocks * size, hidden).to(features.dtype)
    out = head(embeddings, own, attention)
    return out.view(texts, blocks, size, hidden)[:, :, 1:]


class _BlocksOfTexts:
    """Attention of blocks: every query sees the text before its anchor, and its own block.

    Args:
        anchors: int64 `[batch, blocks]`.
        size: Tokens of a block.
        num_tokens: Tokens of the texts.
    """

    def __init__(self, anchors: torch.Tensor, size: int, num_tokens: int) -> None:
        self._size = size
        seen = torch.arange(num_tokens, device=anchors.device) < anchors[:, :, None]
        self._seen = seen.repeat_interleave(size, dim=1)[:, None]  # [batch, 1, blocks * size, tokens]
        self._context: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._context[layer] = key, value

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        known_keys, known_values, key, value = (
            states.repeat_interleave(group, dim=1) for states in (*self._context[layer], key, value)
        )
        scale = query.shape[-1] ** -0.5
        before = (query @ known_keys.transpose(-1, -2) * scale).masked_fill(~self._seen, float("-inf"))
        query, key, value = (states.unflatten(2, (-1, self._size)) for states in (query, key, value))
        beside = (query @ key.transpose(-1, -2) * scale).flatten(2, 3)  # [batch, heads, blocks * size, size]
        weights = functional.softmax(torch.cat([before, beside], dim=-1), dim=-1)
        num_known = before.shape[-1]
        out = weights[..., :num_known] @ known_values
        out = out + (weights[..., num_known:].unflatten(2, (-1, self._size)) @ value).flatten(2, 3)
        return out.transpose(1, 2)
