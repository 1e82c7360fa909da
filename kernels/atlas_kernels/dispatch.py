"""Chooses the implementation of a call: the kernel on CUDA, the reference elsewhere."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

Implementation = Literal["auto", "triton", "reference"]


def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels can run on `device`: it is a CUDA device, and Triton is installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def implementation_on(device: torch.device) -> Implementation:
    """Name of the implementation on `device`, "triton" or "reference", for callers that work without kernels."""
    return "triton" if kernels_run_on(device) else "reference"


def use_triton(tensor: torch.Tensor, implementation: Implementation) -> bool:
    """Whether a call on `tensor` runs the kernel.

    Args:
        tensor: The largest argument of the call.
        implementation: "auto" takes the kernel for CUDA tensors; "triton" and "reference" force one of the two.

    Raises:
        ValueError: The implementation is unknown, or Triton is requested where it cannot run.
    """
    if implementation not in ("auto", "triton", "reference"):
        raise ValueError(f"implementation must be 'auto', 'triton' or 'reference', got {implementation!r}")
    if implementation == "reference" or (implementation == "auto" and tensor.device.type != "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the kernels need Triton: `pip install triton` (Linux), or pass implementation='reference'")
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"Triton does not run on {tensor.device.type}: move the tensors to CUDA, pass implementation='reference', "
            "or set TRITON_INTERPRET=1 before Triton is first imported (slow; for tests)"
        )
    return True
