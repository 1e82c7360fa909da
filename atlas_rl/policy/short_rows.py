"""Attention of decode steps on a CPU, a few new tokens per row, by a compiled kernel instead of a padded rectangle.

The kernel stores the tokens as well. It takes float32 without softcaps and sinks, for plain steps and for drafts. Prompts
have more tokens per row: torch multiplies them as matrices, which then gains more than padding costs.
"""

from __future__ import annotations

import torch

from atlas_kernels.attend_cpu import attend_rows
from atlas_rl.policy.placement import Placement

MOST_TOKENS = 17
"""Most new tokens of a row: those of a verified step with the longest drafts, and one.

With as many in every row, torch's matrix products take less time; ragged rows take less here.
"""


def takes_short(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    placed: Placement,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> bool:
    """Whether the kernel takes these queries, keys and values; not under autocast, where queries are in half precision."""
    return (
        placed.query_len <= MOST_TOKENS
        and softcap is None
        and sinks is None
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in new)
    )


def attend_short(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    placed: Placement,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Store `key` and `value`, `[1, kv_heads, num_tokens, dim]`, and attend.

    If an earlier layer has stored these very tensors, storing them again changes nothing.

    Args:
        query: `[1, heads, num_tokens, dim]`.
        key: New keys; `value` likewise, with its own `dim`.
        value: See `key`.
        keys: The layer's cache, `[rows, cells, kv_heads, dim]`.
        values: Likewise.
        placed: Row and position of each token.
        scaling: Factor on the scores; None is `dim ** -0.5`.
        window: Most cells that a query sees, its own included; None is all up to its own.

    Returns:
        `[1, num_tokens, heads, value_dim]`.
    """
    query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    places = placed.token_rows, placed.token_positions, placed.packing.query_starts
    return attend_rows(query, key, value, keys, values, *places, placed.context, scale, window)[None]
