"""Attention over a ragged batch: packed queries, one cache row per request.

transformers looks up attention functions by name, and builds no mask for those without a registered mask builder. So
one registered function is enough to run unchanged model code on a packed batch `[1, num_tokens]`: linear layers see no
padding at all, and the function below writes the new keys and values into the cache rows and attends row by row.

Rows are padded to a rectangle (`rectangle.py`). Two ways read every row as far as it is filled, without padding and
without a mask: variable-length flash attention on a GPU, in half precision (`varlen.py`), and a compiled kernel for
decode steps on a CPU, in float32 (`short_rows.py`).

The cache is one tensor per layer, read in place, and grows with use: it has as many rows as run, each with the cells
that the longest of them needs and a margin. Possible future lengths take no memory. A layer that attends to the keys
and values of an earlier one (Gemma 3n, Gemma 4) reads those in the cache, and has no tensor of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from atlas_kernels.attend_cpu import Cache, attend_rows
from atlas_kernels.dispatch import implementation_on
from atlas_kernels.layer import store as store_tokens
from atlas_rl.policy import short_rows, varlen
from atlas_rl.policy.autocast import as_attended, autocast_type
from atlas_rl.policy.base import Segments, roomy
from atlas_rl.policy.memory import allocated
from atlas_rl.policy.parts import ListedModules
from atlas_rl.policy.placement import Placement, place
from atlas_rl.policy.rectangle import attend_padded
from atlas_rl.policy.recurrent_rows import Recurrence, RecurrentRows
from atlas_rl.policy.short_rows import attend_short, takes_short

NAME = "atlas_ragged"


def _plenty() -> int:
    return 1 << 62


@dataclass(slots=True)
class RaggedBatch:
    """Where the packed tokens of one forward go, and the cache that holds them.

    Attributes:
        num_rows, capacity: Most rows, and most tokens of a row.
        honour_softcap: Whether the policy's own attention applies `softcap` (transformers' SDPA path does not).
        varlen: Whether to use variable-length attention even where torch's operator for it does not run.
        free_bytes: Returns the bytes that caches may take now, beyond those that they have.
        keys, values: Per layer `[held_rows, held_cells, kv_heads, dim]`; none before the layer's first call, which sets
            the shape, and none for layers that read those of another.
        sources: For each layer, the one whose keys and values it attends to: itself, or an earlier one.
        held_rows, held_cells: Rows, and cells per row, of every tensor; the requested ones, while there is no tensor.
        autocast: Autocast type of the latest forward; None if it was off.
        tight: Whether the first tensors did not fit; the next ones are then as small as possible.
        copied_bytes: Bytes copied so far in order to grow.
        generation: How often the tensors have changed their addresses.
        placement: Placement of the present or latest forward.
        attended: Which forms of attention were used: variable-length (True), another one (False).
        refusal: Why another one was used, if it was.
        steps: Decode steps of fixed shapes over this cache, freed with it.
        recurrent: Recurrent layers' states of the rows; None if the policy has no such layers.
        parts: Modules of the policy, listed when it first runs over this cache.
    """

    num_rows: int
    capacity: int
    honour_softcap: bool
    free_bytes: Callable[[], int] = _plenty
    varlen: bool = False
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    sources: dict[int, int] = field(default_factory=dict)
    held_rows: int = 0
    held_cells: int = 0
    copied_bytes: int = 0
    autocast: torch.dtype | None = None
    tight: bool = False
    budget_bytes: int | None = None  # bytes free at the first query; a limit even if more becomes free
    generation: int = 0
    placement: Placement | None = None
    attended: set[bool] = field(default_factory=set)
    refusal: str | None = None
    steps: Any = None  # a StepGraphs, which runs over this cache
    recurrent: RecurrentRows | None = None
    parts: ListedModules | None = None

    def place(self, segments: Segments, device: torch.device, *also: np.ndarray) -> list[torch.Tensor]:
        """Prepare the next forward: room in the cache, and indices on the device.

        Args:
            segments: Tokens that will be run.
            device: Device of the cache.
            also: Further arrays that the forward needs on the device.

        Returns:
            Copies of `also` on the device.
        """
        rows = segments.rows
        last_row = segments.first_row + len(segments.lengths) - 1 if rows is None else int(rows.max())
        self.grow(last_row + 1, int((segments.starts + segments.lengths).max()))
        self.placement, there = place(segments, self.held_cells, device, also)
        if self.recurrent is not None:
            self.recurrent.place(segments, device)
        return there

    @property
    def placed(self) -> Placement:
        """The placement of the running forward."""
        assert self.placement is not None, "attention before place()"
        return self.placement

    @property
    def takes_steps(self) -> bool:
        """Whether all layers take packed tokens without padding, so that a step may have a fixed shape."""
        return bool(self.keys) and self.why_no_steps is None

    @property
    def why_no_steps(self) -> str | None:
        """What keeps a step from having a fixed shape; None if nothing does, or if nothing has run."""
        return self.refusal if self.recurrent is None else "it has recurrent layers"

    def source(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> int:
        """The layer whose tensors hold `[1, kv_heads, num_tokens, dim]`: `layer`, or an earlier one that stored them."""
        source = self.placed.handed_on.first_layer(layer, key, value)
        if self.sources.setdefault(layer, source) != source:
            raise RuntimeError(
                f"layer {layer} attends to the keys of layer {source}, and attended to those of {self.sources[layer]} before"
            )
        if source not in self.keys:
            self._begin(source, *as_attended(key, value))
        return source

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> int:
        """Write `[1, kv_heads, num_tokens, dim]` into the rows, unless an earlier layer has written them.

        Returns:
            The layer whose tensors hold them.
        """
        source = self.source(layer, key, value)
        if source == layer:
            if self.autocast is not None:
                key, value = as_attended(key, value)
            rows, cells = self.placed.token_rows, self.placed.token_positions
            new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
            store_tokens(
                self.keys[layer], self.values[layer], new_keys, new_values, rows, cells, implementation_on(key.device)
            )
        return source

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the running rows, `[batch, kv_heads, context, dim]`; views if the rows are consecutive."""
        placed = self.placed
        rows: slice | torch.Tensor | None = placed.padding().rows
        if rows is None:
            rows = slice(placed.first_row, placed.first_row + placed.batch)
        keys, values = (store[layer][rows, : placed.context] for store in (self.keys, self.values))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _begin(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Allocate the tensors of a layer, in the first forward."""
        rows, cells = self.held_rows, self.held_cells
        try:
            self.keys[layer] = allocated(key, rows, cells, key.shape[1], key.shape[3]).zero_()
            self.values[layer] = allocated(value, rows, cells, value.shape[1], value.shape[3]).zero_()
            self.generation += 1
        except MemoryError:
            self._drop()
            raise

    def recur(self, layer: int, inputs: torch.Tensor, recurrence: Recurrence) -> torch.Tensor:
        """Run a recurrent layer, `[num_tokens, inputs]` to `[num_tokens, outputs]`, and update its states."""
        assert self.recurrent is not None, "a recurrent layer over a cache for attention alone"
        begun = layer in self.recurrent
        try:
            return self.recurrent.run(layer, inputs, self.held_rows, recurrence)
        except MemoryError:
            if not begun:
                self._drop()
            raise

    def _drop(self) -> None:
        """Free the tensors of the first layers after an allocation failed, so that fewer rows can be tried."""
        self.keys, self.values, self.held_rows, self.held_cells, self.tight = {}, {}, 0, 0, True
        if self.recurrent is not None:
            self.recurrent.clear()

    def copy_rows(self, source: int, targets: np.ndarray, length: int) -> None:
        """Give rows `targets` (int64 `[n]`) the first `length` cells of row `source`: all layers at once."""
        if not len(targets):
            return
        self.grow(int(targets.max()) + 1, length)
        if self.recurrent is not None:
            self.recurrent.copy_rows(source, targets, length)
        caches = [cache for store in (self.keys, self.values) for cache in store.values()]
        if not caches:  # nothing has run yet
            return
        to = [cache[target, :length] for cache in caches for target in targets.tolist()]
        torch._foreach_copy_(to, [cache[source, :length] for cache in caches for _ in targets])

    @property
    def cell_bytes(self) -> int:
        """Bytes of one token in all layers; 0 before the first forward."""
        return sum(t.shape[2] * t.shape[3] * t.element_size() for s in (self.keys, self.values) for t in s.values())

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        states = 0 if self.recurrent is None else self.recurrent.num_bytes
        return states + sum(tensor.nbytes for store in (self.keys, self.values) for tensor in store.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's recurrent state; 0 before the first forward."""
        return 0 if self.recurrent is None else self.recurrent.row_bytes

    def cells_that_fit(self, cell_bytes: int) -> int:
        """Tokens that memory allows now over all rows; `cell_bytes` is the size of one if it is not known yet."""
        held, free = self.num_bytes, self.free_bytes()
        if self.budget_bytes is None:
            self.budget_bytes = held + free
        return min(self.budget_bytes, held + free) // max(1, self.cell_bytes or cell_bytes)

    def reserve(self, num_rows: int, length: int, most_cells: int | None = None) -> None:
        """Allocate `num_rows` rows of `length` cells; if that takes new tensors, further rows are dropped.

        Args:
            num_rows: Rows that are needed.
            length: Cells needed per row, present rows included; their cells beyond that may be dropped. Texts grow, so
                rows get more at once (`roomy`) if memory allows.
            most_cells: Limit on cells over all rows, exceeded only if more are needed.

        Raises:
            IndexError: More rows or cells than the cache may have.
            MemoryError: No memory is left. The first `num_rows` rows keep the content that they need; `held_rows` and
                `held_cells` are the present size.
        """
        if num_rows <= self.held_rows and length <= self.held_cells:
            return
        most = self.capacity if most_cells is None else min(self.capacity, most_cells // num_rows)
        self._resize(num_rows, length, most)

    def grow(self, num_rows: int, length: int) -> None:
        """Allocate `num_rows` rows of `length` cells and keep everything that there is."""
        if num_rows > self.held_rows or length > self.held_cells:
            most = self.capacity if length > self.held_cells else self.held_cells
            self._resize(max(num_rows, self.held_rows), max(length, self.held_cells), most)

    def _resize(self, num_rows: int, length: int, most: int) -> None:
        """Allocate `num_rows` rows of `length` cells, or more, up to `most`, if memory allows."""
        cells = length if self.tight and not self.keys else self._roomy(length, most)
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
            for store, layer in tensors:  # one by one: at most one tensor exists twice
                store[layer] = self._resized(store[layer], num_rows, cells)
            if self.recurrent is not None:
                self.recurrent.resize(num_rows)
        finally:  # the loop may have ended at any of them
            held = [store[layer].shape[0] for store, layer in tensors]
            held += [] if self.recurrent is None else self.recurrent.held_rows
            self.held_rows = min(held, default=num_rows)
            self.held_cells = min((store[layer].shape[1] for store, layer in tensors), default=cells)

    def _resized(self, old: torch.Tensor, num_rows: int, cells: int) -> torch.Tensor:
        if old.shape[:2] == (num_rows, cells):
            return old
        self.generation += 1
        new = allocated(old, num_rows, cells, *old.shape[2:])
        rows, filled = min(num_rows, old.shape[0]), min(cells, old.shape[1])
        new[:rows, :filled] = old[:rows, :filled]
        # Zeros, not empty: a masked cell still enters 0 * value, and stale memory may hold NaN.
        new[:rows, filled:] = 0
        new[rows:] = 0
        self.copied_bytes += old[:rows, :filled].numel() * old.element_size()
        return new

    def _roomy(self, length: int, most: int) -> int:
        """Cells to allocate if `length` are needed. On a GPU copies are cheap; new addresses cost captured steps."""
        captured = any(cache.is_cuda for cache in self.keys.values())
        return max(length, min(most, 2 * length)) if captured else roomy(length, most)


class _ThisThread(threading.local):
    batch: RaggedBatch | None = None


_this_thread = _ThisThread()


@contextmanager
def active(batch: RaggedBatch) -> Iterator[None]:
    """Context in which attention calls of this thread read and write `batch`."""
    previous = _this_thread.batch
    try:
        _this_thread.batch = batch
        yield
    finally:
        _this_thread.batch = previous


def short_cache(module: Any) -> Cache | None:
    """Cache and places of a layer's new tokens, for the compiled kernel; None if it is not for them."""
    batch, layer = _this_thread.batch, module.layer_idx
    # The long way looks at the policy's first tokens, and begins the layer's cache, unless it is handed those of another.
    if batch is None or not batch.refusal or layer not in batch.keys or batch.placed.query_len > short_rows.MOST_TOKENS:
        return None
    placed = batch.placed
    places = placed.token_rows, placed.token_positions, placed.packing.query_starts
    return Cache(batch.keys[layer], batch.values[layer], *places, placed.context)


def attend_tokens(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """`ragged_attention` of a layer that has made its own keys and values, by token, in float32 on a CPU.

    Args:
        module: The attention layer.
        query: `[num_tokens, heads, dim]`, contiguous.
        key: `[num_tokens, kv_heads, dim]`, contiguous; `value` likewise.
        value: See `key`.
        scaling: Factor on the scores.
        window: Most cells that a query sees, its own included; None is all up to its own.

    Returns:
        `[num_tokens, heads, dim]`.
    """
    cache = short_cache(module)
    if cache is not None:
        return attend_rows(query, key, value, *cache, scaling, window, checked=False)
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    return ragged_attention(module, query, key, value, None, scaling=scaling, sliding_window=window)[0][0]


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
    if attention_mask is not None and attention_mask.ndim > 2:
        raise ValueError("the policy builds a mask of its own for this batch, which a ragged batch cannot be given")
    layer: int = module.layer_idx  # type: ignore[assignment]
    batch.autocast = autocast_type(query.device)
    if batch.autocast is not None:
        (query,) = as_attended(query)
    packed = query[0].transpose(0, 1)  # [num_tokens, heads, dim]
    if not batch.honour_softcap:
        softcap = None
    refusal = None if batch.varlen else varlen.refusal(packed, value.shape[-1])
    if softcap is not None:
        refusal = "its attention caps scores, which flash attention does not"
    batch.attended.add(refusal is None)
    if refusal is not None:
        batch.refusal = refusal
        if takes_short((query, key, value), batch.placed, softcap, s_aux):
            layer = batch.source(layer, key, value)
            cache = batch.keys[layer], batch.values[layer]
            return attend_short(query, key, value, *cache, batch.placed, scaling, sliding_window), None
    layer = batch.store(layer, key, value)
    if refusal is not None:
        keys, values = batch.read(layer)
        return attend_padded(packed, keys, values, batch.placed, scaling, sliding_window, softcap, s_aux)[None], None
    # Some tensors may have more cells than others, after a growth that ran out of memory; the extra cells are not used.
    keys, values = (store[layer][:, : batch.held_cells].contiguous() for store in (batch.keys, batch.values))
    return varlen.attend(packed, keys, values, batch.placed.packing, scaling, sliding_window, s_aux)[None], None


AttentionInterface.register(NAME, ragged_attention)
