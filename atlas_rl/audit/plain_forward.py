"""Runs one forward pass of the policy as its trainer does, and observes the precision it computes in.

The pass goes through PEFT wrappers and accelerate's mixed precision, because the trainer's does. The engine runs the
causal LM inside of them, so whatever the wrappers change shows as a difference. Rounding is not a fault. The rounding
to allow for follows from the types that the layers return under the policy's own autocast and quantisation, not from
the weights' type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from atlas_rl.policy.attention_backends import without_cudnn
from atlas_rl.policy.calling import accepted_by, for_all_tokens, logits_of
from atlas_rl.policy.compiled import uncompiled
from atlas_rl.policy.threads import watched_forwards
from atlas_rl.policy.unwrap import unwrap_policy, without_parallel_wrappers


@dataclass(slots=True)
class PlainLogits:
    """Logits of a plain forward.

    Attributes:
        logits: `[rows, vocab]`, in the type that the policy returned.
        full_precision: Whether weights and all layers' outputs were float32.
    """

    logits: torch.Tensor
    full_precision: bool


def plain_logits(model: nn.Module, token_ids: torch.Tensor, places: torch.Tensor) -> PlainLogits:
    """Logits of one sequence at some positions.

    Args:
        model: The policy, or a wrapper of it, in the desired mode (training or evaluation).
        token_ids: int64 `[num_tokens]`, on the policy's device.
        places: int64 `[rows]`, ascending positions in `token_ids`.

    Raises:
        ValueError: The policy returns logits neither for these positions nor for all.
    """
    policy: Any = without_parallel_wrappers(model)  # each rank has its own sequences
    inner = unwrap_policy(policy)
    options: dict[str, Any] = {"use_cache": False} if accepted_by(inner.forward)("use_cache") else {}
    if _keeps_positions(inner):
        options["logits_to_keep"] = places
    seen = _Seen()
    with torch.no_grad(), uncompiled(policy), without_cudnn(), _watched(inner, seen):
        logits = logits_of(policy(input_ids=token_ids[None], **options))[0]
    if hasattr(inner, "get_output_embeddings"):  # a user's own wrapper may not have it
        logits = for_all_tokens(logits, len(inner.get_output_embeddings().weight))
    if len(logits) == len(token_ids):
        logits = logits[places] if len(places) != len(token_ids) else logits
    elif len(logits) != len(places):
        raise ValueError(f"{type(inner).__name__} returned {len(logits)} logits for {len(places)} positions")
    return PlainLogits(logits, seen.full_precision and _holds_float32(inner) and _multiplies_float32(token_ids.device))


def _keeps_positions(model: Any) -> bool:
    """Whether `logits_to_keep` may be positions, as in transformers. In other models it is a count, or is ignored."""
    forward = inspect.unwrap(getattr(model.forward, "__func__", model.forward))
    return forward.__module__.startswith("transformers.") and "logits_to_keep" in inspect.signature(forward).parameters


@dataclass(slots=True)
class _Seen:
    """Output types of the layers."""

    types: set[torch.dtype] = field(default_factory=set)

    @property
    def full_precision(self) -> bool:
        return all(kind.itemsize >= 4 for kind in self.types)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.types.add(output.dtype)
        return output


def _watched(model: nn.Module, seen: _Seen) -> AbstractContextManager[None]:
    """Context in which the outputs of the innermost layers are observed."""
    return watched_forwards({module: seen for module in model.modules() if not list(module.children())})


def _holds_float32(model: nn.Module) -> bool:
    """Whether all weights are plain float32, neither quantised nor of a lower type."""
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    weights = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.dim() > 1)]
    # The types of torch and torchao hide the type of their content.
    if any(type(part).__module__.startswith(("torch.ao.", "torchao.")) for part in (*model.modules(), *weights)):
        return False
    # Packed weights are bytes or 32-bit words; masks are bool, and positions are int64.
    types = {weight.dtype for weight in weights} - {torch.bool}
    return torch.int32 not in types and all(kind.itemsize >= 4 for kind in types)


def _multiplies_float32(device: torch.device) -> bool:
    """Whether products of float32 matrices are computed in float32 rather than TF32 (ten bits of mantissa)."""
    backends: Any = torch.backends
    backend = backends.cuda if device.type == "cuda" else backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")
