"""Makes a device CUDA's current one.

Operations of torch run on the device of their tensors. Triton's launches and CUDA graphs do not: they go to the current
device, wherever the tensors are. So code that runs a policy's kernels enters `on_device` first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context in which `device` is the current one; does nothing unless it is a CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
