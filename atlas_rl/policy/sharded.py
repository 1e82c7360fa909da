"""Gathers a policy whose weights FSDP has sharded, once for all forwards of a call.

FSDP gathers the weights of a layer in that layer's forward, and every gather is a collective. Ranks whose requests need
different numbers of forwards would wait for each other for ever, and each token would cost a transfer of all weights.
So the weights are gathered before the first forward of a call, and forwards bypass FSDP until its end.

How, for each version:

    FSDP2   by its public `unshard` and `reshard`. Its hooks, which would reshard after the first forward, are disabled.
            Weights have the type of its mixed precision, as in training.
    FSDP1   by its public `summon_full_params`. Wrappers inside the policy pass their inputs through. Weights have the
            type that they are stored in, whatever the mixed precision (`rounds_in_training`).

Afterwards everything is sharded and hooked as before, also after errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from atlas_rl.policy.threads import replaced_forwards
from atlas_rl.policy.unwrap import origin_of

_FSDP = "torch.distributed.fsdp."


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards weights of a model."""
    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def rounds_in_training(model: nn.Module) -> bool:
    """Whether training forwards use weights of another type than `gathered` gives: mixed precision of FSDP1."""
    wrappers = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    return any(wrapper.mixed_precision.param_dtype is not None for wrapper in wrappers)


def shard_again(model: nn.Module) -> None:
    """Free whole weights that FSDP2 keeps after a forward; does not communicate.

    A forward without a backward pass leaves the outermost module whole, and every module if it was told to. Then its
    parameters are plain tensors, which is no state to send weights or to prepare another training from.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which the weights of a model are whole, and its forwards do not communicate.

    All ranks must enter it equally often. Weights must not be changed inside. Does nothing if none are sharded.

    Args:
        model: The model as the trainer calls it, FSDP's outermost wrapper included.
    """
    second = [module for module in model.modules() if isinstance(module, FSDPModule)]
    first = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    with ExitStack() as stack:
        if second:
            stack.enter_context(_unsharded(second))
            stack.enter_context(_without_hooks(model))
        if first:
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False))
            stack.enter_context(replaced_forwards(dict.fromkeys(first, _pass_through)))
        yield


@contextmanager
def _unsharded(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """Context in which FSDP2 modules have whole weights."""
    try:
        for module in modules:
            # A forward may have left weights gathered, on some ranks only, or from before the last update.
            module.reshard()
            module.unshard()
        yield
    finally:
        for module in modules:
            module.reshard()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Context in which no module has FSDP2's forward hooks; hooks that others add or remove meanwhile are kept."""
    changed: list[tuple[Any, Mapping[int, Any]]] = []
    try:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                own = {key for key, hook in hooks.items() if origin_of(hook).startswith(_FSDP)}
                if own:
                    changed.append((hooks, dict(hooks)))
                    for key in own:
                        del hooks[key]
        yield
    finally:
        for hooks, before in changed:
            present = dict(hooks)
            hooks.clear()
            # In their old order: it matters which hook comes first.
            hooks.update({key: h for key, h in before.items() if key in present or origin_of(h).startswith(_FSDP)})
            hooks.update(present)


def _pass_through(wrapper: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward of an FSDP1 wrapper whose weights are whole."""
    inside: torch.Tensor = wrapper.module(*args, **kwargs)
    return inside
