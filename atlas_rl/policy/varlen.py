"""Attention of packed queries over cache rows by variable-length flash attention: no mask, no padding.

torch's operator takes the start and the number of each sequence's keys, so that a row of the cache is read only as far
as it is filled. `torch.nn.attention.varlen` wraps the same operator, but takes these arguments only from torch 2.12 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from atlas_rl.policy.attention_sinks import share_of_cells

_TYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256  # dimensions, of flash attention
_LEAST_CAPABILITY = (8, 0)  # likewise


@dataclass(frozen=True, slots=True)
class Packing:
    """Which queries attend to which cells.

    Attributes:
        query_starts: int32 `[sequences + 1]`, start of each sequence among the packed queries.
        key_starts: int32 `[sequences + 1]`, start of each sequence among the cells of all rows; the last one is not
            read.
        key_lengths: int32 `[sequences]`, cells of each; a sequence's last query sees all of them.
        max_queries: Most queries of a sequence.
        max_keys: Most cells of a sequence, or more.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    key_lengths: torch.Tensor
    max_queries: int
    max_keys: int


def takes(query: torch.Tensor, value_dim: int) -> bool:
    """Whether the operator accepts such queries."""
    return refusal(query, value_dim) is None


def refusal(query: torch.Tensor, value_dim: int) -> str | None:
    """Why the operator does not accept such queries; None if it does.

    Values must have the size of keys, which those of latent attention (DeepSeek) do not.
    """
    dim = query.shape[-1]
    if not query.is_cuda:
        return "its attention is not on a GPU"
    if query.dtype not in _TYPES:
        return f"its attention is computed in {query.dtype}, and flash attention takes bfloat16 and float16"
    if dim > _LARGEST_HEAD or dim % 8 or dim != value_dim:
        return f"its heads have keys of {dim} and values of {value_dim} numbers, which flash attention does not take"
    return _lacking(query.device)


def _lacking(device: torch.device) -> str | None:
    """Why the operator cannot run on a GPU; None if it can."""
    if not torch.backends.cuda.is_flash_attention_available() or not _reads_rows():
        return f"torch {torch.__version__} has no flash attention over rows of any length"
    if torch.version.hip is not None:
        return "torch's flash attention over rows of any length has not been tried on AMD's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return "flash attention needs a GPU of compute capability 8.0, and this one has {}.{}".format(*capability)
    return None


@cache
def _reads_rows() -> bool:
    """Whether this torch's operator reads rows up to their lengths."""
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    return any(argument.name == "seqused_k" for argument in arguments)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every sequence's queries, which are its last ones, to its cells.

    Args:
        query: `[num_tokens, heads, dim]`.
        keys: `[rows, cells, kv_heads, dim]`, contiguous; `kv_heads` divides `heads`.
        values: Like `keys`.
        packing: Which queries attend to which cells.
        scale: Factor on the scores; None is `dim ** -0.5`.
        window: Most cells that a query sees, its own included; None is all up to its own.
        sinks: `[heads]`, one more logit in each softmax, whose share goes to no cell.

    Returns:
        `[num_tokens, heads, dim]`.
    """
    attended: Any = flash if takes(query, values.shape[-1]) else reference
    out, log_sums = attended(query, keys, values, packing, scale, window)
    if sinks is not None:
        out = (out * share_of_cells(log_sums.T, sinks)[..., None]).to(out.dtype)
    return out


def flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` without sinks by torch's flash attention (Dao, arXiv 2307.08691).

    Returns:
        Attention's output, and the log-sum-exp of each query's scores, float32 `[heads, num_tokens]`.
    """
    kv_heads, dim = keys.shape[2:]
    # One query per sequence sees exactly its cells, and a causal flag would only keep torch from splitting long ones.
    one = packing.max_queries == 1
    left = None if window is None else window - 1
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
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
    )
    return out, log_sums


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash`, sequence by sequence: the reference in tests and the fallback on a CPU."""
    kv_heads, dim = keys.shape[2:]
    flat_keys, flat_values = keys.view(-1, kv_heads, dim), values.flatten(0, 1)
    starts, out, log_sums = packing.query_starts.tolist(), [], []
    for begin, end, first, length in zip(
        starts, starts[1:], packing.key_starts.tolist(), packing.key_lengths.tolist(), strict=False
    ):
        cell = torch.arange(length, device=query.device)[None]
        newest = torch.arange(length - (end - begin), length, device=query.device)[:, None]
        seen = cell <= newest if window is None else (cell <= newest) & (cell > newest - window)
        queries = query[begin:end].transpose(0, 1)
        row_keys, row_values = (flat[first : first + length].transpose(0, 1) for flat in (flat_keys, flat_values))
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, row_keys, row_values, attn_mask=seen, scale=scale, enable_gqa=True
        )
        out.append(attended.transpose(0, 1))
        own = row_keys.repeat_interleave(len(queries) // kv_heads, dim=0)
        scores = queries.float() @ own.float().transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
        log_sums.append(scores.masked_fill(~seen, float("-inf")).logsumexp(-1))
    return torch.cat(out), torch.cat(log_sums, dim=-1)
