"""Packed rows of logits with their drafts and noise keys, checked once: the input of all verification."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A packed batch of drafts; the attributes are the arguments of `atlas_kernels.verify.verify`."""

    logits: torch.Tensor
    draft_token_ids: torch.Tensor
    row_starts: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    temperature: float
    allowed: torch.Tensor | None
    greedy: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.row_starts) - 1

    def checked(self) -> PackedRows:
        """These rows, if the arguments are consistent; `ValueError` otherwise.

        Raises:
            ValueError: A shape, type, device or number does not fit.
        """
        logits, allowed = self.logits, self.allowed
        if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in LOGIT_DTYPES:
            raise ValueError(
                f"logits must be float32, bfloat16 or float16 [rows, vocab], got {logits.dtype} {list(logits.shape)}"
            )
        per_row = {"draft_token_ids": self.draft_token_ids, "keys": self.keys, "positions": self.positions}
        for name, tensor in per_row.items():
            if tensor.shape != logits.shape[:1] or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 [{len(logits)}], one per row, got {tensor.dtype} {list(tensor.shape)}"
                )
        starts = self.row_starts
        if starts.ndim != 1 or len(starts) < 1 or starts.dtype != torch.int64:
            raise ValueError(f"row_starts must be int64 [batch + 1], got {starts.dtype} {list(starts.shape)}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature}")
        if allowed is not None and (allowed.shape != logits.shape or allowed.dtype != torch.bool):
            raise ValueError(
                f"allowed must be bool {list(logits.shape)} like logits, got {allowed.dtype} {list(allowed.shape)}"
            )
        greedy = self.greedy
        if greedy is not None and (greedy.shape != logits.shape[:1] or greedy.dtype != torch.bool):
            raise ValueError(
                f"greedy must be bool [{len(logits)}], one per row, got {greedy.dtype} {list(greedy.shape)}"
            )
        optional = {name: each for name, each in (("allowed", allowed), ("greedy", greedy)) if each is not None}
        for name, tensor in (per_row | {"row_starts": starts} | optional).items():
            if tensor.device != logits.device:
                raise ValueError(f"{name} is on {tensor.device} and logits on {logits.device}: move them together")
        return self

    def contiguous(self) -> PackedRows:
        """The same rows in the kernels' layout: any stride between the rows of `logits`, contiguous otherwise."""
        return replace(
            self,
            logits=self.logits if self.logits.stride(1) == 1 else self.logits.contiguous(),
            draft_token_ids=self.draft_token_ids.contiguous(),
            row_starts=self.row_starts.contiguous(),
            keys=self.keys.contiguous(),
            positions=self.positions.contiguous(),
            allowed=None if self.allowed is None else self.allowed.contiguous(),
            greedy=None if self.greedy is None else self.greedy.contiguous(),
        )
