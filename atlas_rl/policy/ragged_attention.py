"""Attention over a ragged batch: packed queries, one preallocated cache row per request.

transformers looks attention functions up by name and leaves masks to implementations it has no mask builder for. So one
registered function is all it takes to run unchanged model code on a packed batch `[1, num_tokens]`: linear layers see no
padding at all, the function below writes the new keys and values into the cache rows and attends row by row.

Query heads that share a key/value head are folded into the query length: `[batch, kv_heads, group * len, dim]` against
`[batch, kv_heads, context, dim]`. The cache is then read once and never expanded to the number of query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from atlas_rl.policy.base import Segments

NAME = "atlas_ragged"


@dataclass(slots=True)
class RaggedBatch:
    """Where the packed tokens of one forward go, and the cache they go to.

    Attributes:
        keys, values: Per layer `[rows, kv_heads, capacity, dim]`; None until the layer's first call tells the shape.
        num_rows, capacity: Size of the cache.
        honour_softcap: Whether the policy's own attention applies `softcap` (transformers' SDPA path does not).
    """

    num_rows: int
    capacity: int
    honour_softcap: bool
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    first_row: int = 0
    batch: int = 0
    query_len: int = 0
    context: int = 0
    fresh: bool = False
    rows: torch.Tensor | None = None  # [batch] cache rows, unless they are consecutive
    token_rows: torch.Tensor | None = None  # [num_tokens] cache row of each packed token
    token_positions: torch.Tensor | None = None  # [num_tokens]
    pad_index: torch.Tensor | None = None  # [batch * query_len] packed index of each padded query; None if even
    unpad_index: torch.Tensor | None = None  # [num_tokens] padded index of each packed token
    query_positions: torch.Tensor | None = None  # [batch, query_len]
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def place(self, segments: Segments, device: torch.device) -> None:
        """Set the index tensors for the next forward.

        Args:
            segments: What will be run.
            device: Of the cache.
        """
        lengths, starts, rows = segments.lengths, segments.starts, segments.rows
        self.first_row, self.batch = segments.first_row, len(lengths)
        if rows is not None and (np.diff(rows) == 1).all():  # consecutive after all: read in place
            self.first_row, rows = int(rows[0]), None
        self.query_len = int(lengths.max())
        self.context = int((starts + lengths).max())
        self.fresh = not starts.any()
        row = np.repeat(np.arange(self.batch), lengths)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position = starts[row] + offset
        cache_row = row + self.first_row if rows is None else rows[row]
        self.token_rows = torch.from_numpy(cache_row).to(device)
        self.rows = None if rows is None else torch.from_numpy(rows).to(device)
        self.token_positions = torch.from_numpy(position).to(device)
        self.masks.clear()
        if (lengths == self.query_len).all():
            self.pad_index = self.unpad_index = None
        else:
            unpad = row * self.query_len + offset
            pad = np.zeros(self.batch * self.query_len, np.int64)
            pad[unpad] = np.arange(len(row))
            self.pad_index, self.unpad_index = torch.from_numpy(pad).to(device), torch.from_numpy(unpad).to(device)
        queries = starts[:, None] + np.arange(self.query_len)[None]
        self.query_positions = torch.from_numpy(queries).to(device)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[1, kv_heads, num_tokens, dim]` into the rows; return views of the rows' filled prefix."""
        if layer not in self.keys:
            shape = (self.num_rows, key.shape[1], self.capacity)
            # Zeros, not empty: a masked cell still enters 0 * value, and stale memory may hold NaN.
            self.keys[layer] = key.new_zeros(*shape, key.shape[3])
            self.values[layer] = value.new_zeros(*shape, value.shape[3])
        self.keys[layer][self.token_rows, :, self.token_positions] = key[0].transpose(0, 1)
        self.values[layer][self.token_rows, :, self.token_positions] = value[0].transpose(0, 1)
        rows: slice | torch.Tensor = slice(self.first_row, self.first_row + self.batch)
        if self.rows is not None:
            rows = self.rows
        return self.keys[layer][rows, :, : self.context], self.values[layer][rows, :, : self.context]

    def copy_rows(self, source: int, targets: np.ndarray, length: int) -> None:
        """Give rows `targets` (int64 `[n]`) the first `length` cells of row `source`."""
        for store in (self.keys, self.values):
            for cache in store.values():
                cache[torch.from_numpy(targets).to(cache.device), :, :length] = cache[source, :, :length]

    def mask(self, group: int, window: int | None) -> torch.Tensor:
        """bool `[batch, 1, group * query_len, context]`: which cells a query sees (causal, within the window)."""
        mask = self.masks.get((group, window))
        if mask is None:
            assert self.query_positions is not None
            query = self.query_positions[:, :, None]
            cell = torch.arange(self.context, device=query.device)[None, None]
            seen = cell <= query
            if window is not None:
                seen &= cell > query - window
            mask = seen.repeat(1, group, 1)[:, None]
            self.masks[group, window] = mask
        return mask


_current: RaggedBatch | None = None


@contextmanager
def active(batch: RaggedBatch) -> Iterator[None]:
    """Inside, attention calls read and write `batch`."""
    global _current
    previous, _current = _current, batch
    try:
        yield
    finally:
        _current = previous


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[1, heads, num_tokens, dim]` in, `[1, num_tokens, heads, dim]` out."""
    batch = _current
    if batch is None:
        raise RuntimeError(f"attention '{NAME}' runs only inside a generation session of atlas_rl")
    if s_aux is not None:
        raise ValueError("attention sinks (s_aux) are not supported in process: use a policy without them")
    if attention_mask is not None and attention_mask.ndim > 2:
        raise ValueError("the policy builds a mask of its own for this batch, which a ragged batch cannot be given")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = batch.store(layer, key, value)
    heads, kv_heads, num_tokens = query.shape[1], key.shape[1], query.shape[2]
    group, rows, length = heads // kv_heads, batch.batch, batch.query_len

    packed = query[0].transpose(0, 1)  # [num_tokens, heads, dim]
    if batch.pad_index is not None:
        packed = packed.index_select(0, batch.pad_index)
    folded = packed.reshape(rows, length, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, kv_heads, group * length, -1)
    window = sliding_window if sliding_window is not None and batch.context > sliding_window else None
    if softcap is not None and batch.honour_softcap:
        out = _softcapped(folded, keys, values, batch.mask(group, window), scaling, softcap)
    elif batch.fresh and window is None:
        # Right-padded prompts from position 0: plain causal attention, and no mask of context squared bytes.
        queries = folded.view(rows, heads, length, -1)
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=group > 1)
        out = out.view(rows, kv_heads, group * length, -1)
    else:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=batch.mask(group, window), scale=scaling)
    out = out.view(rows, kv_heads, group, length, -1).permute(0, 3, 1, 2, 4).reshape(rows * length, heads, -1)
    if batch.unpad_index is not None:
        out = out.index_select(0, batch.unpad_index)
    return out.view(1, num_tokens, heads, -1), None


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are squashed to `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(NAME, ragged_attention)
