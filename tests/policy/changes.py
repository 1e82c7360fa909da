"""Ways in which a weight changes within a call."""

from __future__ import annotations

import torch
from torch import nn

IN_PLACE, ANOTHER, BY_DATA = "in place", "another parameter", "by .data"
HOW = (IN_PLACE, ANOTHER, BY_DATA)


def scale_weight(module: nn.Module, how: str) -> None:
    """Multiply a module's weight by 1.5, in one of the ways `HOW`."""
    if how == IN_PLACE:
        with torch.no_grad():
            module.weight.mul_(1.5)
    elif how == BY_DATA:
        module.weight.data.mul_(1.5)
    else:
        module.weight = nn.Parameter(1.5 * module.weight.detach())
