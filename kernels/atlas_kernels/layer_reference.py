"""`layer` in torch, written as in the layers of transformers."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated layer."""


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, adds_one: bool, rounds_first: bool
) -> torch.Tensor:
    """See `layer.rms_norm`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if adds_one:
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype) if rounds_first else (weight * wide).to(x.dtype)


def rotate_reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layer.rotate`."""
    cos, sin = cos[:, None], sin[:, None]
    return query * cos + _turned(query) * sin, key * cos + _turned(key) * sin


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def gated_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """See `layer.gated`."""
    silu = activation == "silu"
    return (functional.silu(gate) if silu else functional.gelu(gate, approximate="tanh")) * up


def store_reference(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    cells: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layer.store`."""
    keys[rows, cells] = key
    values[rows, cells] = value
    return keys, values


def wider(left: torch.Tensor, right: torch.Tensor) -> torch.dtype:
    """The type in which torch computes a product of two tensors."""
    return torch.promote_types(left.dtype, right.dtype)
