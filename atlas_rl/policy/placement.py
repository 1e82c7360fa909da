"""Computes where the packed tokens of one forward go in the cache, and what each of them sees, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from atlas_rl.policy.base import Segments
from atlas_rl.policy.handed_on import HandedOn
from atlas_rl.policy.upload import upload
from atlas_rl.policy.varlen import Packing


@dataclass(slots=True)
class Padding:
    """Packed tokens as a rectangle, for attention that needs padding.

    Attributes:
        rows: int64 `[batch]`, cache rows; None if they are consecutive.
        pad: int64 `[batch * query_len]`, packed index of each padded query; None if there is no padding.
        unpad: int64 `[num_tokens]`, padded index of each packed token; None if there is no padding.
        queries: int64 `[batch, query_len]`, positions.
    """

    rows: torch.Tensor | None
    pad: torch.Tensor | None
    unpad: torch.Tensor | None
    queries: torch.Tensor


@dataclass(slots=True)
class Placement:
    """See the module's docstring.

    Attributes:
        token_rows: int64 `[num_tokens]`, cache row of each packed token.
        token_positions: int64 `[num_tokens]`.
        packing: Input of variable-length attention.
        segments: The tokens that are run; None if they are known only on the device.
        first_row: First cache row, of consecutive ones.
        batch: Number of rows.
        query_len: Most new tokens of a row.
        context: Longest row after the forward.
        fresh: Whether these are the first tokens of all rows.
        handed_on: Keys and values of the layers that have run so far.
    """

    token_rows: torch.Tensor
    token_positions: torch.Tensor
    packing: Packing
    segments: Segments | None = None
    first_row: int = 0
    batch: int = 0
    query_len: int = 0
    context: int = 0
    fresh: bool = False
    handed_on: HandedOn = field(default_factory=HandedOn)
    _padding: Padding | None = None
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def padding(self) -> Padding:
        """The padded form, made on first use, once for all layers."""
        if self._padding is None:
            assert self.segments is not None, "tokens of a step of fixed shape are not padded"
            self._padding = _padding(self.segments, self.query_len, self.token_rows.device)
        return self._padding

    def mask(self, group: int, window: int | None) -> torch.Tensor:
        """bool `[batch, 1, group * query_len, context]`: which cells a query sees (causal, within the window)."""
        mask = self._masks.get((group, window))
        if mask is None:
            mask = self.part_of_mask(group, window, slice(0, self.query_len), slice(0, self.context))
            self._masks[group, window] = mask
        return mask

    def part_of_mask(self, group: int, window: int | None, queries: slice, cells: slice) -> torch.Tensor:
        """`mask` for some queries of each row and some cells, from slices with both ends; it is not kept."""
        query = self.padding().queries[:, queries, None]
        cell = torch.arange(cells.start, cells.stop, device=query.device)[None, None]
        seen = cell <= query
        if window is not None:
            seen &= cell > query - window
        return seen.repeat(1, group, 1)[:, None]

    def cells_seen(self, window: int | None, queries: slice) -> slice:
        """The cells that these queries of any row see; the cells outside are masked for all of them."""
        assert self.segments is not None, "tokens of a step of fixed shape are not padded"
        starts = self.segments.starts
        first = 0 if window is None else max(0, int(starts.min()) + queries.start - window + 1)
        return slice(first, min(self.context, int(starts.max()) + queries.stop))

    def bias(self, group: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`mask` as numbers to add to scores, 0 or -inf. torch's attention would convert the mask anew for every layer."""
        bias = self._biases.get((group, window, dtype))
        if bias is None:
            mask = self.mask(group, window)
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
            self._biases[group, window, dtype] = bias
        return bias


def place(
    segments: Segments, held_cells: int, device: torch.device, also: Sequence[np.ndarray]
) -> tuple[Placement, list[torch.Tensor]]:
    """Place `segments` in rows of `held_cells` cells and copy `also` to the device, in one upload."""
    lengths, starts, rows = segments.lengths, segments.starts, segments.rows
    first_row = segments.first_row
    if rows is not None and (np.diff(rows) == 1).all():  # consecutive after all: read in place
        first_row, rows = int(rows[0]), None
        segments = Segments(segments.token_ids, first_row, starts, lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    all_rows = np.arange(first_row, first_row + len(lengths)) if rows is None else rows
    query_len, context = int(lengths.max()), int((starts + lengths).max())
    token_rows, positions, queries, keys, key_lengths, *rest = upload(
        [
            all_rows[row],
            starts[row] + offset,
            np.append(0, np.cumsum(lengths)).astype(np.int32),
            (np.append(all_rows, all_rows[-1] + 1) * held_cells).astype(np.int32),
            (starts + lengths).astype(np.int32),
            *also,
        ],
        device,
    )
    packing = Packing(queries, keys, key_lengths, query_len, context)
    fresh = not starts.any()
    placement = Placement(token_rows, positions, packing, segments, first_row, len(lengths), query_len, context, fresh)
    return placement, rest


def _padding(segments: Segments, query_len: int, device: torch.device) -> Padding:
    lengths = segments.lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    arrays = {"queries": segments.starts[:, None] + np.arange(query_len)[None]}
    if segments.rows is not None:
        arrays["rows"] = segments.rows
    if not (lengths == query_len).all():
        arrays["unpad"] = row * query_len + offset
        arrays["pad"] = np.zeros(len(lengths) * query_len, np.int64)
        arrays["pad"][arrays["unpad"]] = np.arange(len(row))
    there = dict(zip(arrays, upload(list(arrays.values()), device), strict=True))
    return Padding(there.get("rows"), there.get("pad"), there.get("unpad"), there["queries"])
