"""Spreads a trainer over two gloo ranks on a CPU, which accelerate takes for devices (`examples/cpu_ranks.py`)."""

from __future__ import annotations

from typing import Any


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
