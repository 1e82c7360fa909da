"""Registers our weight-transfer backends by name, and the drafters to notify about a new policy.

A remote trainer updates a server's weights by `start_weight_update`, `update_weights` and `finish_weight_update`. vLLM
passes these calls only to the engine of the backend that it was started with. So our backends have their own engines
(`transfer_engines.py`), which notify the drafters through this module.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn

NCCL, GLOO = "atlas_nccl", "atlas_gloo"
BACKENDS = (NCCL, GLOO)
"""vLLM's own NCCL engine, and one over gloo, for CPUs. Both tell the drafters."""

_CLASSES = {NCCL: "AtlasNcclEngine", GLOO: "AtlasGlooEngine"}


class Follower(Protocol):
    """Interface of drafters for a model whose weights are updated from outside."""

    weights_are_whole: bool
    """False while an update has changed some weights and not all of them."""

    num_trainers: int
    """How many trainers have connected to send weights, so far. The last one's weights are taken, and no other's."""

    def policy_updated(self, version: int | None) -> dict[str, Any]:
        """The model has new weights: a policy update to `version`; None adds one to the version."""


_FOLLOWERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Follower]] = weakref.WeakKeyDictionary()


def follow(model: nn.Module, follower: Follower) -> None:
    """Notify `follower` of new weights of `model`; keeps neither of them alive."""
    _FOLLOWERS[model] = weakref.ref(follower)


def follower_of(model: nn.Module) -> Follower | None:
    """The follower of a model; None if there is none."""
    found = _FOLLOWERS.get(model)
    return None if found is None else found()


def register_backends() -> None:
    """Register the backends with vLLM in this process; a worker looks up its backend after loading its model."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, class_name in _CLASSES.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, f"{__package__}.transfer_engines", class_name)
