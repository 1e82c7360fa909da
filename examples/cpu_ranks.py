"""Makes accelerate use gloo ranks on a CPU, to try ZeRO and FSDP without a GPU.

accelerate supports DeepSpeed and FSDP on accelerators only. With this, torch's FSDP and DeepSpeed's ZeRO themselves
run.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

import torch


def asked_for() -> str:
    """The configuration of `accelerate launch`: "ddp", "zero", "fsdp1" or "fsdp2"."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "zero"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return "ddp"


def pretend(wrapper: str) -> None:
    """Call this before creating anything with accelerate. `wrapper` as in `asked_for`, optionally with ZeRO's stage."""
    if wrapper == "ddp":
        return
    from accelerate import state
    from accelerate.utils import DistributedType

    kind = DistributedType.MULTI_CPU if wrapper.startswith("zero") else DistributedType.MULTI_GPU

    def backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        return "gloo", kind

    def device(self: Any) -> None:
        self.device = torch.device("cpu")

    state.PartialState._prepare_backend = backend
    state.PartialState.set_device = device
    if wrapper == "fsdp1":
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        # The method frees the device's weights once they are on the CPU; here it would free its own result.
        FlatParamHandle.to_cpu = lambda self: nullcontext()  # type: ignore[method-assign]
    if wrapper.startswith("zero"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
        from deepspeed import comm

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles for minutes
        if not comm.is_initialized():
            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
