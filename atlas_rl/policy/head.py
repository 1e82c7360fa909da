"""Reads the LM head as an affine map, whatever module computes it.

A head may be a linear layer with or without a bias, or one inside an adapter (LoRA and kin, a trained copy). Drafters
need rows of it, because the policy's weights may be sharded away when they learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_ROWS_AT_ONCE = 128


def linear_of(head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a head that computes only `weight @ state + bias`; None if it does more."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        return head.weight, head.bias
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    # A wrapper. It may compute with its `weight` (a trained copy), or add an adapter to it.
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(weight)
    with torch.no_grad():
        same = torch.equal(head(state), functional.linear(state, weight, bias))
    return (weight, bias) if same else None


@torch.inference_mode(False)
def affine_rows(head: nn.Module, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[n, hidden]` and biases `[n]` of the head's affine map for int64 `[n]` tokens; dropout must be off.

    A token's row is the gradient of its output, and its bias is the output for a zero state. This reads any adapter, at
    the cost of a forward and a backward pass of the head over `n` rows.
    """
    plain = linear_of(head)
    if plain is not None:
        weight, bias = plain[0].detach(), plain[1]
        rows = weight[token_ids]
        return rows, rows.new_zeros(len(rows)) if bias is None else bias.detach()[token_ids]
    if not len(token_ids):
        return _zeros(head, 0), _zeros(head, 0)[:, 0]
    found: list[tuple[Any, Any]] = []
    for ids in token_ids.split(_ROWS_AT_ONCE):
        with torch.enable_grad():
            states = _zeros(head, len(ids)).requires_grad_()
            outputs = head(states).gather(1, ids[:, None])[:, 0]
            (rows,) = torch.autograd.grad(outputs.sum(), states)
        found.append((rows, outputs.detach()))
    return torch.cat([rows for rows, _ in found]), torch.cat([biases for _, biases in found])


def _zeros(head: Any, num_rows: int) -> torch.Tensor:
    return torch.zeros(num_rows, head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)
