"""From the host to the device, without a wait for it."""

from __future__ import annotations

import numpy as np
import torch


def uploaded(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on a device.

    A copy from ordinary memory waits until the device has done all that was queued before. From pinned memory it is queued
    behind that, and torch keeps the memory until it is read. On a CPU the array itself is used.
    """
    here = torch.from_numpy(array)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
