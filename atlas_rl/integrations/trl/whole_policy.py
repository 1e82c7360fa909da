"""Makes a trainer's policy whole on every rank for one generation call, and restores it afterwards.

TRL's own `unwrap_model_for_generation` leaves DeepSpeed's hooks and gradient checkpointing off if generation raises,
and lets FSDP gather layer by layer in every forward. It re-enables checkpointing by a method of transformers that
registers another hook on the embeddings each time.

Engines with weights of their own get the policy in parts, by TRL's iteration; `reach_all_weights` repairs it for FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from trl.distributed import DistributedBackend
from trl.models.utils import add_hooks, remove_hooks

from atlas_rl.policy.sharded import gathered, is_sharded, shard_again


def shards(trainer: Any) -> str:
    """What shards the policy's weights: "DeepSpeed ZeRO-3", "FSDP1" or "FSDP2"; empty if nothing does."""
    backend = _backend_of(trainer)
    if backend.is_zero3:
        return "DeepSpeed ZeRO-3"
    if backend.is_fsdp:
        return f"FSDP{backend.fsdp_version}"
    return "FSDP" if is_sharded(trainer.model_wrapped) else ""


def _backend_of(trainer: Any) -> Any:
    """TRL's name for the backend that distributes the trainer over ranks; not every trainer has one."""
    kept = getattr(trainer, "_dist", None)
    return DistributedBackend(trainer.accelerator) if kept is None else kept


@contextmanager
def whole_policy(trainer: Any) -> Iterator[Any]:
    """Context with the trainer's model, unwrapped and with whole weights on this rank; its forwards do not communicate.

    Gathering is collective: all ranks must enter equally often.
    """
    wrapped = trainer.model_wrapped
    model = trainer.accelerator.unwrap_model(wrapped)
    with _without_checkpointing(model), _of_zero3(trainer), gathered(wrapped):
        yield model


def reach_all_weights(generation: Any, trainer: Any) -> None:
    """Let TRL's `VLLMGeneration` send all weights of a policy that FSDP shards; all ranks call it before each sending.

    The object keeps the model that the trainer was built with, and gathers by the FSDP1 wrappers inside of it. FSDP1's
    outermost wrapper is made later, around that model. It holds what is outside of layers: embeddings, last norm, head.

    Of FSDP2 it reads shards, and fails on weights that an evaluation has left whole.
    """
    wrapped = trainer.model_wrapped
    shard_again(wrapped)
    if generation.model is wrapped or not isinstance(wrapped, FullyShardedDataParallel):
        return
    generation.model = wrapped
    # The wrapper that gathers first takes itself for the outermost, and training fails. TRL gathers layers first.
    with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False):
        pass


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Context without activation checkpointing."""
    flagged: list[Any] = [module for module in model.modules() if vars(module).get("gradient_checkpointing")]
    try:
        for module in flagged:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = True


@contextmanager
def _of_zero3(trainer: Any) -> Iterator[None]:
    """Context in which weights sharded by ZeRO-3 are whole and DeepSpeed's hooks, which would reshard them, are off."""
    if not _backend_of(trainer).is_zero3:
        yield
        return
    import deepspeed

    engine = trainer.model_wrapped
    with deepspeed.zero.GatheredParameters(engine.parameters()), _without_start_of_forward(engine):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


@contextmanager
def _without_start_of_forward(engine: Any) -> Iterator[None]:
    """Context in which a forward of the whole model does not synchronise its start with other ranks.

    TRL's `remove_hooks` leaves this one hook of DeepSpeed's. Ranks run their own forwards here, so they would deadlock.
    """
    offload: Any = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    handle: Any = getattr(offload, "fwd_pre_hook", None)
    hooks: Any = {} if handle is None else offload.module._forward_pre_hooks
    hook = None if handle is None else hooks.pop(handle.id, None)
    try:
        yield
    finally:
        if hook is not None:
            hooks[handle.id] = hook
            hooks.move_to_end(handle.id, last=False)  # before the hooks that gather layers
