"""Lets accelerate take two gloo ranks on a CPU for two devices.

accelerate knows DeepSpeed and FSDP on accelerators only. What runs then is torch's FSDP and DeepSpeed's ZeRO themselves.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch


def pretend(wrapper: str) -> None:
    """Call this before anything is made with accelerate."""
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

        # It frees the weights on the device once they are on the CPU: here it would free what it returns.
        FlatParamHandle.to_cpu = lambda self: nullcontext()  # type: ignore[method-assign]
    if wrapper.startswith("zero"):
        from deepspeed import comm

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined] # compiles for minutes
        if not comm.is_initialized():
            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def options_of(wrapper: str, *, kept: bool = False) -> dict[str, Any]:
    """Of a trainer's configuration, for "ddp", "zero2", "zero3", "fsdp1" or "fsdp2".

    With `kept`, FSDP keeps weights gathered after a forward, and FSDP2 loads them on rank 0 alone.
    """
    if wrapper == "ddp":
        return {"ddp_backend": "gloo"}
    if wrapper.startswith("zero"):
        stage: dict[str, Any] = {"stage": int(wrapper[-1])}
        if wrapper == "zero3":
            stage |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
        automatic = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
            "gradient_clipping",
        )
        config = {"zero_optimization": stage, **dict.fromkeys(automatic, "auto")}
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return {"use_cpu": False, "deepspeed": config}
    version = int(wrapper[-1])
    config: dict[str, Any] = {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    if version == 1:
        config |= {"use_orig_params": True, "sync_module_states": False}
        config |= {"reshard_after_forward": "SHARD_GRAD_OP"} if kept else {}
    else:
        config |= {"reshard_after_forward": not kept, "cpu_ram_efficient_loading": kept}
    return {"use_cpu": False, "fsdp": True, "fsdp_config": config}
