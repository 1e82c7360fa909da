"""Notices LoRA adapters that are loaded into a running engine: a new policy for the drafters."""

from __future__ import annotations

import functools
from typing import Any

from atlas_rl.vllm.internals.transfer import follower_of
from atlas_rl.vllm.internals.version import INSTALLED


def follow_adapters() -> None:
    """Notify a model's drafters of every adapter that a runner of this process loads (`/v1/load_lora_adapter`)."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    original = LoRAModelRunnerMixin.add_lora
    if hasattr(original, INSTALLED):
        return

    @functools.wraps(original)
    def add_lora(runner: Any, lora_request: Any) -> bool:
        added = original(runner, lora_request)
        follower = follower_of(runner.get_model())
        if added and follower is not None:
            follower.policy_updated(None)
        return added

    setattr(add_lora, INSTALLED, True)
    LoRAModelRunnerMixin.add_lora = add_lora
