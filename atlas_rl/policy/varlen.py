"""Attention of packed queries to rows of a cache by flash attention over sequences of any length: no mask, no padding.

torch's operator takes where a sequence's keys begin and how many of them there are, so that a row of the cache is read as
far as it is filled. `torch.nn.attention.varlen` wraps the same operator, and lets callers say that only from torch 2.12 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_TYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256  # dimensions, of flash attention


@dataclass(frozen=True, slots=True)
class Packing:
    """Which queries attend to which cells.

    Attributes:
        query_starts: int32 `[sequences + 1]`, of each sequence among the packed queries.
        key_starts: int32 `[sequences + 1]`, of each sequence among the cells of all rows; the last one is not read.
        key_lengths: int32 `[sequences]`, cells of each; a sequence's last query sees all of them.
        max_queries: Most queries of a sequence.
        max_keys: Most cells of a sequence, or more.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    key_lengths: torch.Tensor
    max_queries: int
    max_keys: int


def takes(query: torch.Tensor) -> bool:
    """Whether the operator takes such queries: on a GPU, in half precision, heads that are not too large."""
    return query.is_cuda and query.dtype in _TYPES and query.shape[-1] <= _LARGEST_HEAD and query.shape[-1] % 8 == 0


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of every sequence's queries, which are its last ones, to its cells.

    Args:
        query: `[num_tokens, heads, dim]`.
        keys: `[rows, cells, kv_heads, dim]`, contiguous; `kv_heads` divides `heads`.
        values: Like `keys`.
        packing: Who attends to what.
        scale: Of the scores; None is `dim ** -0.5`.
        window: Most cells that a query sees, its own included; None is all up to its own.

    Returns:
        `[num_tokens, heads, dim]`.
    """
    attended: Any = flash if takes(query) else reference
    out: torch.Tensor = attended(query, keys, values, packing, scale, window)
    return out


def flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """`attend` by torch's flash attention (Dao, arXiv 2307.08691)."""
    kv_heads, dim = keys.shape[2:]
    # One query per sequence sees exactly its cells, and a causal flag would only keep torch from splitting long ones.
    one = packing.max_queries == 1
    left = None if window is None else window - 1
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query,
        keys.view(-1, kv_heads, dim),
        values.view(-1, kv_heads, dim),
        packing.query_starts,
        packing.key_starts,
        packing.max_queries,
        packing.max_keys,
        0.0,
        not one and window is None,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=None if window is None else 0,
        seqused_k=packing.key_lengths,
    )[0]
    return out


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """`attend`, sequence by sequence: what the operator is tested against, and what stands in for it on a CPU."""
    kv_heads, dim = keys.shape[2:]
    flat_keys, flat_values = keys.view(-1, kv_heads, dim), values.view(-1, kv_heads, dim)
    starts, out = packing.query_starts.tolist(), []
    for begin, end, first, length in zip(
        starts, starts[1:], packing.key_starts.tolist(), packing.key_lengths.tolist(), strict=False
    ):
        cell = torch.arange(length, device=query.device)[None]
        newest = torch.arange(length - (end - begin), length, device=query.device)[:, None]
        seen = cell <= newest if window is None else (cell <= newest) & (cell > newest - window)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1),
            flat_keys[first : first + length].transpose(0, 1),
            flat_values[first : first + length].transpose(0, 1),
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )
        out.append(attended.transpose(0, 1))
    return torch.cat(out)
