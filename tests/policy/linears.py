"""Linear layers that are large enough for several routes, and how close their results are."""

from __future__ import annotations

import torch
from torch import nn

INPUTS, OUTPUTS = 200, 700  # large enough in bfloat16 as well
BF16, FP16 = torch.bfloat16, torch.float16


def layer_of(bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.is_contiguous() == expected.is_contiguous()
    tolerance = {torch.float32: 1e-5, BF16: 2e-2, FP16: 2e-3}[ours.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
