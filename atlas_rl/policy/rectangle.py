"""Attention of packed queries as a padded rectangle with masked cells.

Query heads that share a key/value head are folded into the query length: `[batch, kv_heads, group * len, dim]` against
`[batch, kv_heads, context, dim]`. The cache is then read once and never expanded to the number of query heads.

torch's attention supports neither softcaps nor attention sinks. Attention with these is computed by its formula, for so
few queries at a time that their scores take little memory. So does a mask: if that of all queries would be large, as for
a long prompt, they attend part by part.
"""

from __future__ import annotations

import torch

from atlas_rl.policy.attention_backends import attend
from atlas_rl.policy.attention_sinks import share_of_cells
from atlas_rl.policy.placement import Placement

_SCORE_BYTES = 1 << 26
_MASK_BYTES = 1 << 26


def attend_padded(
    packed: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    placed: Placement,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of every row's new tokens to its cells.

    Args:
        packed: Queries, `[num_tokens, heads, dim]`.
        keys: `[batch, kv_heads, context, dim]`, of the running rows.
        values: `[batch, kv_heads, context, value_dim]`.
        placed: Row and position of each token.
        scaling: Factor on the scores; None is `dim ** -0.5`.
        sliding_window: Most cells that a query sees, its own included; None is all up to its own.
        softcap: Scores are squashed to `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118).
        sinks: `[heads]`, one more logit in each softmax, whose share goes to no cell (gpt-oss, arXiv 2309.17453).

    Returns:
        `[num_tokens, heads, value_dim]`.
    """
    padding = placed.padding()
    heads, kv_heads, rows, length = packed.shape[1], keys.shape[1], placed.batch, placed.query_len
    group = heads // kv_heads
    if padding.pad is not None:
        packed = packed.index_select(0, padding.pad)
    queries = packed.reshape(rows, length, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    window = sliding_window if sliding_window is not None and placed.context > sliding_window else None
    if placed.fresh and window is None and softcap is None and sinks is None:
        # Right-padded prompts from position 0: plain causal attention, and no mask of context squared bytes.
        flat = queries.reshape(rows, heads, length, -1)
        out = attend(flat, keys, values, scale=scaling, causal=True, grouped=group > 1)
        out = out.view(rows, kv_heads, group, length, -1)
    else:
        step = max(1, _MASK_BYTES // (rows * group * placed.context))
        if step >= length:
            # On a GPU torch pads a mask as its kernels need it, and converts it itself.
            converts = queries.is_cuda or softcap is not None or sinks is not None
            mask = placed.mask(group, window) if converts else placed.bias(group, window, queries.dtype)
            out = _masked(queries, keys, values, mask, scaling, softcap, sinks)
        else:
            attended = []
            for part in (slice(begin, min(begin + step, length)) for begin in range(0, length, step)):
                cells = placed.cells_seen(window, part)
                mask = placed.part_of_mask(group, window, part, cells)
                own = keys[:, :, cells], values[:, :, cells]
                attended.append(_masked(queries[:, :, :, part], *own, mask, scaling, softcap, sinks))
            out = torch.cat(attended, dim=3)
    out = out.permute(0, 3, 1, 2, 4).reshape(rows * length, heads, -1)
    return out if padding.unpad is None else out.index_select(0, padding.unpad)


def _masked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of `[batch, kv_heads, group, queries, dim]`, in that shape; `sinks` is `[heads]`."""
    rows, kv_heads, group, length, _ = queries.shape
    folded = queries.reshape(rows, kv_heads, group * length, -1)
    if softcap is None and sinks is None:
        out = attend(folded, keys, values, scale=scaling, mask=mask)
    else:
        if sinks is not None:
            sinks = sinks.view(kv_heads, group).repeat_interleave(length, dim=1)
        out = _by_formula(folded, keys, values, mask, scaling, softcap, sinks)
    return out.view(rows, kv_heads, group, length, -1)


def _by_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of folded queries; `mask` is `[batch, 1, queries, context]`, and `sinks` `[kv_heads, queries]`."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, kv_heads, queries, _ = query.shape
    step = max(1, _SCORE_BYTES // (4 * batch * kv_heads * key.shape[2]))
    out = []
    for part in (slice(begin, begin + step) for begin in range(0, queries, step)):
        scores = query[:, :, part] @ key.transpose(-1, -2)
        scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
        scores = scores.masked_fill(~mask[:, :, part], float("-inf"))
        attended = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
        if sinks is not None:
            left = share_of_cells(scores.float().logsumexp(-1), sinks[:, part])
            attended = (attended * left[..., None]).to(attended.dtype)
        out.append(attended)
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)
