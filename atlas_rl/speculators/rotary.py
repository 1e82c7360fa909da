"""Rotary tables that stay in float32, whatever number format the head around them is moved to.

`Module.to(torch.bfloat16)` would round the frequencies as well, and far into a text the angles would differ from those
in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn


class RotaryTables(nn.Module):
    """A rotary embedding of transformers whose buffers keep their number format.

    Args:
        rotary: Gives `(cos, sin)` for `[batch, tokens, ...]` states and int64 `[batch, tokens]` positions.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, states: torch.Tensor, positions: torch.Tensor) -> Any:
        """See `rotary`; the result has the states' number format."""
        return self.rotary(states, positions)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        tables = {(module, name): table for module in self.modules() for name, table in module._buffers.items()}
        super()._apply(fn, recurse)
        for (module, name), table in tables.items():
            moved = module._buffers[name]
            if table is not None and moved is not None and moved.dtype != table.dtype:
                module._buffers[name] = table.to(moved.device)
        return self
