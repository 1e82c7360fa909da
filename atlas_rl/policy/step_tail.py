"""Work on a decode step's logits that belongs to the step: on a GPU it is captured in the graph of the forward.

The policy does not know what that work is (it is verification, `sampling/queued.py`); it knows where its inputs are to
lie and when it is to run. Steps that are not of fixed shapes leave it undone, and whoever wanted it does it afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import numpy as np
import torch


class StepTail(ABC):
    """What one decode step queues behind its forward.

    Attributes:
        key: Equal for tails whose `run` queues the same kernels for the same shapes: a graph of one serves the other.
        result: What `run` gave for this step, on the device; the next step may overwrite it. None if it has not run.
    """

    key: Hashable
    result: torch.Tensor | None = None

    @abstractmethod
    def inputs(self, size: int) -> np.ndarray:
        """The inputs of this step, padded to `size` tokens: int64 `[n]`, where n depends on `size` alone."""

    @abstractmethod
    def run(self, logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Queue the work, without waiting for the device.

        Args:
            logits: float32 `[size, vocab]`, of every packed token and of the padding. To be left unchanged.
            inputs: int64 `[n]` on their device: `inputs(size)`.
        """
