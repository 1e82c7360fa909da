"""Attention of drafted blocks over the rows of a cache: one block per row, behind the context that the row holds."""

from __future__ import annotations

import torch

from atlas_rl.policy.attention_backends import attend
from atlas_rl.policy.autocast import as_attended, autocast_type
from atlas_rl.policy.ragged_attention import RaggedBatch
from atlas_rl.speculators.dflash.config import Span


class BlockAttention:
    """Attention of the blocks that were placed in a cache last (`RaggedBatch.place`), all of one length.

    Query heads that share a key/value head are folded into the query length, as in `policy/rectangle.py`. Rows of the
    cache are read where they are. Masks are made once for all layers with the same span.

    Args:
        cache: Holds the context's keys and values in the cells before each block.
        spans: What the queries see, per layer.
    """

    def __init__(self, cache: RaggedBatch, spans: tuple[Span, ...]) -> None:
        self._cache, self._spans = cache, spans
        self._masks: dict[Span, torch.Tensor] = {}

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write `[1, kv_heads, tokens, dim]` of the placed tokens into their cells."""
        self._cache.autocast = autocast_type(key.device)
        self._cache.store(layer, key, value)

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of a layer.

        Args:
            layer: Number of the layer in the head.
            query: `[1, heads, tokens, dim]`, rotated, block by block.
            key: `[1, kv_heads, tokens, dim]`, rotated.
            value: Like `key`.

        Returns:
            `[1, tokens, heads, dim]`.
        """
        self.keep(layer, key, value)
        (query,) = as_attended(query)
        keys, values = self._cache.read(layer)
        rows, length = self._cache.placed.batch, self._cache.placed.query_len
        heads, kv_heads, dim = query.shape[1], keys.shape[1], query.shape[3]
        group = heads // kv_heads
        folded = query[0].transpose(0, 1).reshape(rows, length, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(rows, kv_heads, group * length, dim)
        out = attend(folded, keys, values, scale=None, mask=self._mask(self._spans[layer], group))
        out = out.view(rows, kv_heads, group, length, dim).permute(0, 3, 1, 2, 4)
        return out.reshape(1, rows * length, heads, dim)

    def _mask(self, span: Span, group: int) -> torch.Tensor:
        """bool `[rows, 1, group * length, context]`: which cells a query sees."""
        mask = self._masks.get(span)
        if mask is None:
            queries = self._cache.placed.padding().queries[:, :, None]
            cell = torch.arange(self._cache.placed.context, device=queries.device)[None, None]
            seen = cell <= (queries if span.causal else queries[:, -1:])
            if span.window is not None:
                seen = seen & (cell > queries - span.window) & (cell < queries + span.window)
            mask = seen.expand(-1, queries.shape[1], -1).repeat(1, group, 1)[:, None]
            self._masks[span] = mask
        return mask
