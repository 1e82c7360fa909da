"""What the drafters know, saved beside a trainer's checkpoint: one safetensors file, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FILE_NAME = "atlas_rl.safetensors"
_FORMAT = "atlas_rl.speculators.1"
_SEPARATOR = "/"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested mappings of arrays, tensors, numbers and strings; whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    _flatten(state, "", tensors, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": _FORMAT, "values": json.dumps(values)})
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote: arrays come back as numpy arrays or tensors, as they went.

    Raises:
        ValueError: Not such a file, or a damaged one.
    """
    state: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"'{path}' holds no drafter state (format {metadata.get('format')!r})")
            values, keys = json.loads(metadata["values"]), set(file.keys())
            for key, value in values.items():
                if key not in keys:
                    _put(state, key, value)
            for key in keys:
                tensor = file.get_tensor(key)
                dtype = values.get(key)
                _put(state, key, tensor if dtype is None else tensor.numpy().astype(dtype, copy=False))
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}): delete it to let the drafters start afresh") from error
    return state


def _flatten(state: Mapping[str, Any], prefix: str, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    for name, value in state.items():
        key = prefix + name
        if isinstance(value, Mapping):
            values[key] = {}  # an empty mapping has no other trace
            _flatten(value, key + _SEPARATOR, tensors, values)
        elif isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().contiguous()
        elif isinstance(value, np.ndarray):
            # torch has no arithmetic on some unsigned types, but safetensors stores them; the name says what to return.
            tensors[key], values[key] = torch.from_numpy(np.ascontiguousarray(value)), value.dtype.str
        elif isinstance(value, str | int | float | bool | None):
            values[key] = value
        elif isinstance(value, np.generic):
            values[key] = value.item()
        else:
            raise TypeError(f"drafter state '{key}' is a {type(value).__name__}, which cannot be saved")


def _put(state: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(_SEPARATOR)
    for parent in parents:
        state = state.setdefault(parent, {})
    if isinstance(value, dict):
        state.setdefault(name, {})
    else:
        state[name] = value
