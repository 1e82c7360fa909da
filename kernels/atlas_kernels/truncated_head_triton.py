"""`draft_head` with truncation: a row's logits must be complete before a token is drawn.

Each token takes five launches: `advance` and `score` of the draft head, here for its logits alone, then `truncate` and
`draw`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import triton

from atlas_kernels import draft_head_triton as head
from atlas_kernels.draw_call import DrawCall
from atlas_kernels.draw_triton import draw_among
from atlas_kernels.head_call import HeadCall
from atlas_kernels.truncate_triton import truncate_triton

_ALIGNED = 4  # in float32 numbers, so that the logits of every step begin at a multiple of 16 bytes


def draft_head_triton(call: HeadCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The fields of `atlas_kernels.draft_head.HeadDraft`, for a call with truncation."""
    assert call.truncation is not None
    (batch, size), tokens, num_steps = call.state.shape, len(call.weights.token_ids), call.num_tokens
    device = call.state.device
    states = torch.empty(num_steps + 1, batch, size, device=device, dtype=torch.float32)
    states[0] = call.state
    stored = torch.empty(
        num_steps, triton.cdiv(batch * tokens, _ALIGNED) * _ALIGNED, device=device, dtype=torch.float32
    )
    logits = stored[:, : batch * tokens].unflatten(1, (batch, tokens))
    indices = torch.empty(num_steps, batch, dtype=torch.int64, device=device)
    confidence = torch.empty(num_steps, batch, device=device, dtype=torch.float32)
    token_ids, newest = call.weights.token_ids.contiguous(), call.newest.contiguous()
    arguments = _arguments(call)
    for step in range(num_steps if batch else 0):
        _launch_logits(arguments, states[step:], newest, logits[step])
        truncate_triton(logits[step], call.truncation, call.temperature, logits[step])
        drawing = DrawCall(logits[step], call.keys, call.positions, 1.0, call.stream, token_ids)
        draw_among(drawing, token_ids, indices[step], confidence[step], step)
        newest = indices[step]
    probs = logits.softmax(dim=-1).transpose(0, 1) if call.with_probs else None
    return indices.T, confidence.T, probs


def _arguments(call: HeadCall) -> dict[str, Any]:
    """Arguments of `advance` and `score` at every step, by name."""
    weights, (batch, size), device = call.weights, call.state.shape, call.state.device
    tile, compute = head.tile_on(device, weights)
    splits, tiles_per_split = head.split_tokens(batch, len(weights.token_ids), tile, device, whole=False)
    return tile | {
        **{field.name: getattr(weights, field.name).contiguous() for field in fields(weights)},
        "keys": call.keys.contiguous(),
        "positions": call.positions.contiguous(),
        "scores": torch.empty(1, batch, splits, dtype=torch.float64, device=device),
        "tokens": torch.empty(1, batch, splits, dtype=torch.int32, device=device),
        "sums": torch.empty(1, batch, splits, 2, device=device, dtype=torch.float32),
        "temperature": 1.0,
        "batch": batch,
        "size": size,
        "num_tokens": len(weights.token_ids),
        "num_steps": 1,
        "splits": splits,
        "tiles_per_split": tiles_per_split,
        "ELEMENT": head.element_of(weights),
        "COMPUTE": compute,
        "STREAM": int(call.stream),
        "GREEDY": True,  # its choice is not used, so no noise is drawn
        "SCALED": False,
        "WITH_PROBS": True,
        "SPLITS": head.SPLITS,
        **dict.fromkeys(("row_tile", "unit_tile", "split", "step"), 0),
        "CALLED": False,
    }


def _launch_logits(arguments: dict[str, Any], states: torch.Tensor, newest: torch.Tensor, logits: torch.Tensor) -> None:
    """The state `states[1]` from `states[0]` and the newest token, and its logits float32 `[batch, tokens]`."""
    of_step = arguments | {"states": states, "newest": newest, "probs": logits}
    row_tiles = triton.cdiv(of_step["batch"], of_step["ROWS"])
    head.launch(head.advance, (row_tiles, triton.cdiv(of_step["size"], of_step["UNITS"])), of_step)
    head.launch(head.score, (row_tiles, of_step["splits"]), of_step)
