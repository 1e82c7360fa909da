"""Attention over a ragged batch: packed queries, one cache row per request.

transformers looks attention functions up by name and leaves masks to implementations it has no mask builder for. So one
registered function is all it takes to run unchanged model code on a packed batch `[1, num_tokens]`: linear layers see no
padding at all, the function below writes the new keys and values into the cache rows and attends row by row.

Query heads that share a key/value head are folded into the query length: `[batch, kv_heads, group * len, dim]` against
`[batch, kv_heads, context, dim]`. The cache is then read once and never expanded to the number of query heads.

The cache is one tensor per layer, read in place, and grows with use: it has the rows that run, of the cells that the longest
of them needs and a margin. What texts might come to costs nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AttentionInterface

from atlas_rl.policy.attention_backends import attend
from atlas_rl.policy.autocast import as_attended, autocast_type
from atlas_rl.policy.base import Segments, roomy

NAME = "atlas_ragged"


def _plenty() -> int:
    return 1 << 62


@dataclass(slots=True)
class RaggedBatch:
    """Where the packed tokens of one forward go, and the cache they go to.

    Attributes:
        num_rows, capacity: Most rows, and most tokens of a row.
        honour_softcap: Whether the policy's own attention applies `softcap` (transformers' SDPA path does not).
        free_bytes: Bytes that caches may take now, beyond those that they have.
        keys, values: Per layer `[held_rows, kv_heads, held_cells, dim]`; none until the layer's first call tells the shape.
        held_rows, held_cells: Rows, and cells of each, that every tensor has; asked for, as long as there is none.
        autocast: The type that autocast had in the latest forward; None where it was off.
        tight: Whether the first tensors did not fit; the next ones are as small as can be.
        copied_bytes: Copied so far in order to grow.
    """

    num_rows: int
    capacity: int
    honour_softcap: bool
    free_bytes: Callable[[], int] = _plenty
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    held_rows: int = 0
    held_cells: int = 0
    copied_bytes: int = 0
    autocast: torch.dtype | None = None
    tight: bool = False
    budget_bytes: int | None = None  # what was free when first asked, and is not exceeded when more becomes free
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
        last_row = self.first_row + self.batch - 1 if rows is None else int(rows.max())
        self._grow(last_row + 1, self.context)
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
            self._begin(layer, key, value)
        self.keys[layer][self.token_rows, :, self.token_positions] = key[0].transpose(0, 1)
        self.values[layer][self.token_rows, :, self.token_positions] = value[0].transpose(0, 1)
        rows: slice | torch.Tensor = slice(self.first_row, self.first_row + self.batch)
        if self.rows is not None:
            rows = self.rows
        return self.keys[layer][rows, :, : self.context], self.values[layer][rows, :, : self.context]

    def _begin(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make the tensors of a layer, in the first forward."""
        rows, cells = self.held_rows, self.held_cells
        try:
            self.keys[layer] = _allocated(key, rows, key.shape[1], cells, key.shape[3]).zero_()
            self.values[layer] = _allocated(value, rows, value.shape[1], cells, value.shape[3]).zero_()
        except MemoryError:
            # No row is complete yet. What the layers before have taken goes, so that fewer rows can be tried.
            self.keys, self.values, self.held_rows, self.held_cells, self.tight = {}, {}, 0, 0, True
            raise

    def copy_rows(self, source: int, targets: np.ndarray, length: int) -> None:
        """Give rows `targets` (int64 `[n]`) the first `length` cells of row `source`."""
        if len(targets):
            self._grow(int(targets.max()) + 1, length)
        for store in (self.keys, self.values):
            for cache in store.values():
                cache[torch.from_numpy(targets).to(cache.device), :, :length] = cache[source, :, :length]

    @property
    def cell_bytes(self) -> int:
        """Bytes of one token in all layers; 0 before the first forward."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for s in (self.keys, self.values) for t in s.values())

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for store in (self.keys, self.values) for tensor in store.values())

    def cells_that_fit(self, cell_bytes: int) -> int:
        """Tokens that memory allows now over all rows; `cell_bytes` is what one takes, as far as it is not known."""
        held, free = self.num_bytes, self.free_bytes()
        if self.budget_bytes is None:
            self.budget_bytes = held + free
        return min(self.budget_bytes, held + free) // max(1, self.cell_bytes or cell_bytes)

    def reserve(self, num_rows: int, length: int, most_cells: int | None = None) -> None:
        """Hold `num_rows` rows of `length` cells; where that takes new tensors, rows beyond them are dropped.

        Args:
            num_rows: Rows that are needed.
            length: Cells of each that are needed, by rows that there are as well: of what they have beyond, some may go.
                Texts grow, so that a row gets more at once (`roomy`), where there is memory for it.
            most_cells: Cells, over all rows, to stay below unless more are needed.

        Raises:
            IndexError: More rows or cells than the cache may have.
            MemoryError: No memory is left. The first `num_rows` rows have what they need of what they had; `held_rows` and
                `held_cells` say what there is.
        """
        if num_rows <= self.held_rows and length <= self.held_cells:
            return
        most = self.capacity if most_cells is None else min(self.capacity, most_cells // num_rows)
        self._resize(num_rows, length, most)

    def _grow(self, num_rows: int, length: int) -> None:
        """Hold `num_rows` rows of `length` cells, and everything that there is."""
        if num_rows > self.held_rows or length > self.held_cells:
            most = self.capacity if length > self.held_cells else self.held_cells
            self._resize(max(num_rows, self.held_rows), max(length, self.held_cells), most)

    def _resize(self, num_rows: int, length: int, most: int) -> None:
        """Hold `num_rows` rows of `length` cells, or of more, up to `most`, where memory takes that."""
        cells = length if self.tight and not self.keys else roomy(length, most)
        if num_rows > self.num_rows or cells > self.capacity:
            raise IndexError(f"{num_rows} rows of {cells} tokens in a cache for {self.num_rows} of {self.capacity}")
        try:
            self._resize_all(num_rows, cells)
        except MemoryError:
            if cells == length:
                raise
            self._resize_all(num_rows, length)

    def _resize_all(self, num_rows: int, cells: int) -> None:
        tensors = [(store, layer) for store in (self.keys, self.values) for layer in store]
        try:
            for store, layer in tensors:  # one by one: no more than one tensor is there twice
                store[layer] = self._resized(store[layer], num_rows, cells)
        finally:  # it may have ended at any of them
            self.held_rows = min((store[layer].shape[0] for store, layer in tensors), default=num_rows)
            self.held_cells = min((store[layer].shape[2] for store, layer in tensors), default=cells)

    def _resized(self, old: torch.Tensor, num_rows: int, cells: int) -> torch.Tensor:
        if (old.shape[0], old.shape[2]) == (num_rows, cells):
            return old
        new = _allocated(old, num_rows, old.shape[1], cells, old.shape[3])
        rows, filled = min(num_rows, old.shape[0]), min(cells, old.shape[2])
        new[:rows, :, :filled] = old[:rows, :, :filled]
        # Zeros, not empty: a masked cell still enters 0 * value, and stale memory may hold NaN.
        new[:rows, :, filled:] = 0
        new[rows:] = 0
        self.copied_bytes += old[:rows, :, :filled].numel() * old.element_size()
        return new

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


class _ThisThread(threading.local):
    batch: RaggedBatch | None = None


_this_thread = _ThisThread()


@contextmanager
def active(batch: RaggedBatch) -> Iterator[None]:
    """Inside, attention calls of this thread read and write `batch`."""
    previous = _this_thread.batch
    try:
        _this_thread.batch = batch
        yield
    finally:
        _this_thread.batch = previous


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
    batch = _this_thread.batch
    if batch is None:
        raise RuntimeError(f"attention '{NAME}' runs only inside a generation session of atlas_rl")
    if s_aux is not None:
        raise ValueError("attention sinks (s_aux) are not supported in process: use a policy without them")
    if attention_mask is not None and attention_mask.ndim > 2:
        raise ValueError("the policy builds a mask of its own for this batch, which a ragged batch cannot be given")
    layer: int = module.layer_idx  # type: ignore[assignment]
    batch.autocast = autocast_type(query.device)
    query, key, value = as_attended(query, key, value)
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
        out = attend(queries, keys, values, scale=scaling, causal=True, grouped=group > 1)
        out = out.view(rows, kv_heads, group * length, -1)
    else:
        out = attend(folded, keys, values, scale=scaling, mask=batch.mask(group, window))
    out = out.view(rows, kv_heads, group, length, -1).permute(0, 3, 1, 2, 4).reshape(rows * length, heads, -1)
    if batch.unpad_index is not None:
        out = out.index_select(0, batch.unpad_index)
    return out.view(1, num_tokens, heads, -1), None


def _allocated(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory of the kind of `like`; `MemoryError` where there is none."""
    try:
        return like.new_empty(shape)
    except RuntimeError as error:  # the only one that this call has, under several names
        gib = math.prod(shape) * like.element_size() / 2**30
        raise MemoryError(
            f"the attention cache needs {gib:.2f} GiB more, and there is no memory for it: lower max_batch_size or "
            "max_new_tokens, or leave more memory free"
        ) from error


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
