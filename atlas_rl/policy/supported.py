"""Decides by configuration which policies can run rows of different lengths together, and up to which length.

A ragged forward is right if a token's logits depend only on the tokens before it in its own row, and on its position.
Some policies depend on more: on the length of the longest text in the batch, on chunks, on a running state. Policies
that cannot be run are refused here, by name. Policies that can be run up to some length get a `Reach`; longer requests
are refused before any work is done.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

REMEDY = "generate with the trainer's own engine, or with vLLM if it knows the policy"
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
_MLP_TYPES = frozenset({"dense", "sparse"})  # some configurations list kinds of MLPs under the same name
_MLP_ALONE_TYPES = frozenset({"mlp", "moe"})  # Nemotron-H: layers with nothing else
_BOTH = "hybrid"  # Falcon-H1: attention and a recurrence side by side


@dataclass(frozen=True, slots=True)
class Reach:
    """Longest row for which a ragged forward equals a plain one.

    Attributes:
        tokens: Most tokens of a row.
        reason: What differs beyond, to follow "beyond that," in a message.
    """

    tokens: int
    reason: str

    def check(self, tokens: int, name: str) -> None:
        """Raise `ValueError` if a row of a policy `name` may not reach `tokens`."""
        if tokens > self.tokens:
            raise ValueError(
                f"{name} can be run in process up to {self.tokens} tokens of prompt and completion; beyond that, "
                f"{self.reason}. Requests here may reach {tokens}: lower max_new_tokens (a trainer's "
                f"max_completion_length) or shorten the prompts, or {REMEDY}"
            )


def nearest(reaches: Iterable[Reach | None]) -> Reach | None:
    """The shortest reach of several."""
    return min((reach for reach in reaches if reach is not None), key=lambda reach: reach.tokens, default=None)


def field_of(config: Any, name: str) -> Any:
    """A field of the first layer, as it may differ between layers (Gemma 4); None if the configuration has none."""
    return getattr(config.per_layer_config[0] if _differs(config, name) else config, name, None)


def fields_of(config: Any, name: str) -> list[Any]:
    """The distinct values of a field over the layers."""
    if not _differs(config, name):
        return [getattr(config, name, None)]
    values: list[Any] = []
    for layer in config.per_layer_config:
        if (value := getattr(layer, name, None)) not in values:
            values.append(value)
    return values


def _differs(config: Any, name: str) -> bool:
    return name in (getattr(config, "per_layer_attributes", None) or ())


def _kinds_of(config: Any) -> list[str]:
    """The type of each layer; empty if the configuration does not say."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return [str(kind) for kind in kinds]


def refuse_layers(config: Any, name: str, recurrent: Container[int] = ()) -> None:
    """Raise `ValueError` for a policy `name` with layers of a type that cannot run over ragged rows.

    Args:
        config: Its text configuration.
        name: Name of its class.
        recurrent: Numbers of the recurrent layers that can be run (`policy/recurrent_layers.py`).
    """
    known = _ATTENTION_TYPES | _MLP_TYPES | _MLP_ALONE_TYPES
    other = sorted(
        {kind for layer, kind in enumerate(_kinds_of(config)) if kind not in known and layer not in recurrent}
    )
    if other:
        raise ValueError(
            f"{name} has layers of type {', '.join(map(repr, other))}: in process only 'full_attention' and "
            "'sliding_attention' layers, and the recurrent ones of LFM2, Qwen3-Next, Qwen3.5, Bamba, Falcon-H1, Granite 4 H "
            f"and Nemotron-H, can run rows of different lengths together; {REMEDY}"
        )


def layers_that_attend(config: Any, num_layers: int, recurrent: Container[int]) -> set[int]:
    """Numbers of the layers with attention, according to the configuration."""
    kinds = dict(enumerate(_kinds_of(config)))
    return {
        layer
        for layer in range(num_layers)
        if kinds.get(layer) not in _MLP_ALONE_TYPES and (layer not in recurrent or kinds.get(layer) == _BOTH)
    }


def refuse_modules(model: nn.Module) -> None:
    """Raise `ValueError` for a policy whose weights are elsewhere or spread out, or whose modules are compiled."""
    name = type(model).__name__
    away = next((key for key, weight in model.named_parameters() if weight.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{name} has weights that are not in memory ({away} is on device 'meta'): it was offloaded by accelerate, or "
            "they were never loaded. Load it without offloading (no device_map that puts layers on 'cpu' or 'disk')"
        )
    devices = _devices_of(model)
    if len(devices) > 1:
        raise ValueError(
            f"{name} is spread over several devices ({', '.join(devices)}): in process a policy runs on one, with one "
            "attention cache. Load it onto one (device_map={'': 0}, or no device_map and .to('cuda')), or generate with "
            "vLLM, which splits policies (tensor_parallel_size)"
        )
    scripted = next((key for key, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ValueError(
            f"{name} has a module compiled by torch.jit ({scripted or 'itself'}), whose mode and forward cannot be changed "
            "for the time of a call: use the module that it was made from"
        )


def _devices_of(model: nn.Module) -> list[str]:
    """Devices of a policy's weights, and where accelerate has put its layers (`device_map`)."""
    # Sharding leaves empty weights behind, on any device.
    devices = {str(weight.device) for weight in model.parameters() if weight.numel()}
    placed = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    return sorted(placed if len(placed) > 1 else devices)


def reach_of(config: Any) -> Reach | None:
    """Length up to which a policy is independent of its neighbours' lengths (configuration); None: unlimited."""
    return nearest([_chunk_reach(config), *(_rope_reach(config, rope) for rope in rope_settings(config))])


def rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """Rotary settings by kind of layer, in new (`rope_parameters`) or old (`rope_scaling`) form."""
    found: list[Mapping[str, Any]] = []
    for settings in fields_of(config, "rope_parameters") + fields_of(config, "rope_scaling"):
        if isinstance(settings, Mapping):
            nested = [value for value in settings.values() if isinstance(value, Mapping)]
            found += [rope for rope in nested or [settings] if rope not in found]
    return found


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_reach(config: Any, rope: Mapping[str, Any]) -> Reach | None:
    """Reach by rotary type: transformers recomputes some for the longest text of a batch (`dynamic_rope_update`)."""
    kind, positions = _rope_type(rope), getattr(config, "max_position_embeddings", None)
    if kind in ("longrope", "su"):
        own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        positions = own or positions
    elif "dynamic" not in kind:
        return None
    return Reach(
        int(positions or 0),
        f"its rope type '{kind}' depends on the length of the batch's longest text, so that a row's distribution would "
        "change with its neighbours and cached keys would be wrong",
    )


def _chunk_reach(config: Any) -> Reach | None:
    kinds = getattr(config, "layer_types", None)
    sizes = [int(size) for size in fields_of(config, "attention_chunk_size") if size]
    if not sizes or (kinds is not None and "chunked_attention" not in kinds):
        return None
    return Reach(min(sizes), f"its chunked attention (attention_chunk_size={min(sizes)}) hides earlier chunks")


def context_of(model: nn.Module, config: Any) -> int | None:
    """Longest text that a policy can run, in tokens; None if unlimited.

    A table of learned positions ends at its last row. Rotary positions have no end: transformers goes on past
    `max_position_embeddings` with a warning. Here a request ends there or, with rope scaling by a factor f, at f times
    as many positions. Checkpoints disagree whether `max_position_embeddings` counts before or after scaling (linear and
    dynamic: before; yarn: either; llama3: after). The larger reading is used, so that no request ends that transformers
    would continue; `max_new_tokens` ends it in any case.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:  # XLNet says -1
        return None
    if _has_position_table(model, positions):
        return int(positions)
    factors = [float(rope.get("factor") or 1) for rope in rope_settings(config) if _rope_type(rope) != "longrope"]
    return int(positions * max([1.0, *factors]))


def _has_position_table(model: nn.Module, positions: int) -> bool:
    """Whether positions are embeddings from a table. OPT-like tables have two rows more than positions."""
    return any(
        isinstance(module, nn.Embedding)
        and ("pos" in name.rpartition(".")[2] or name.endswith("wpe"))
        and positions <= module.num_embeddings <= positions + 2
        for name, module in model.named_modules()
    )
