"""Counts what autocast converts: weights, and caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    """Inside, conversions to a lower type are counted.

    Args:
        model: Whose weights are told from other tensors.

    Attributes:
        weights: Conversions of its parameters.
        largest: Numbers of the largest other tensor that was converted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self.weights = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("dtype") in (torch.bfloat16, torch.float16):
            if id(args[0]) in self._parameters:
                self.weights += 1
            else:
                self.largest = max(self.largest, args[0].numel())
        return func(*args, **kwargs)
