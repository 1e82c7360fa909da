"""The checked arguments of `draw`, for its reference and its kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atlas_kernels.noise import Stream
from atlas_kernels.rows import LOGIT_DTYPES


@dataclass(frozen=True, slots=True)
class DrawCall:
    """One call; the attributes are the arguments of `atlas_kernels.draw.draw`."""

    logits: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    temperature: float
    stream: Stream
    token_ids: torch.Tensor | None

    def checked(self) -> DrawCall:
        """This call, if its arguments are consistent; `ValueError` otherwise.

        Raises:
            ValueError: A shape, type, device or number does not fit.
        """
        logits = self.logits
        if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in LOGIT_DTYPES:
            raise ValueError(
                f"logits must be float32, bfloat16 or float16 [rows, tokens], got {logits.dtype} {list(logits.shape)}"
            )
        rows, tokens = logits.shape
        for name, tensor, count, per in (
            ("keys", self.keys, rows, "row"),
            ("positions", self.positions, rows, "row"),
            ("token_ids", self.token_ids, tokens, "column"),
        ):
            if tensor is None:
                continue
            if tensor.shape != (count,) or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 [{count}], one per {per} of logits, got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != logits.device:
                raise ValueError(f"{name} is on {tensor.device} and logits on {logits.device}: move them together")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature}")
        return self
