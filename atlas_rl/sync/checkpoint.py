"""Saves the drafters' state beside a trainer's checkpoint: one safetensors file, never a pickle.

Drafters index by numbers from this file, so its content is signed with a checksum: a file that a disk or a copy damaged is
refused as a whole. Each drafter checks its own part again when it loads it (`speculators/saved_state.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from atlas_rl.checks import path as checked_path
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.saved_state import saved_part
from atlas_rl.whole_files import save_whole

logger = logging.getLogger(__name__)

FILE_NAME = "atlas_rl.safetensors"
_OF_RANKS = "atlas_rl.rank*.safetensors"
_FORMAT = "atlas_rl.speculators.2"  # 1 had no checksum
_SEPARATOR = "/"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested mappings of arrays, tensors, numbers and strings; either the whole file or nothing.

    Raises:
        OSError: The write failed; nothing is left behind.
        TypeError: A value of another type.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    _flatten(state, "", tensors, values)
    described = json.dumps(values)
    save_whole(path, tensors, {"format": _FORMAT, "values": described, "checksum": _checksum(tensors, described)})


def file_to_write(path: Any) -> Path:
    """Check a path for saving drafters; `ValueError` if it is no path, or a folder."""
    file = checked_path("path", path, "the file to write")
    if file.is_dir():
        raise ValueError(f"path='{file}' is a folder: name the file in it, such as '{file / FILE_NAME}'")
    return file


def file_to_read(path: Any) -> Path:
    """Check a path of saved drafters; `ValueError` if it is no path, or no file is there."""
    file = checked_path("path", path, "a file that save_drafters() wrote")
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"path='{file}' {found}: give a file that save_drafters() wrote")
    return file


def file_of_rank(folder: Path, rank: int) -> Path:
    """File of a rank's drafters, beside the trainer's checkpoint."""
    return folder / (_OF_RANKS.replace("*", str(rank)) if rank else FILE_NAME)


def file_to_resume(folder: Path, rank: int) -> Path | None:
    """File that a rank resumes from: its own, or another rank's if the training had fewer ranks; None if there is none."""
    own, files = file_of_rank(folder, rank), _files_of_ranks(folder)
    if own.is_file() or not files:
        return own if own.is_file() else None
    return files[sorted(files)[rank % len(files)]]


def drop_ranks(folder: Path, num_ranks: int) -> None:
    """Remove files of an earlier training with more ranks from a checkpoint's folder."""
    for rank, file in _files_of_ranks(folder).items():
        if rank >= num_ranks:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _files_of_ranks(folder: Path) -> dict[int, Path]:
    found = {0: folder / FILE_NAME} if (folder / FILE_NAME).is_file() else {}
    for file in folder.glob(_OF_RANKS):
        number = file.name.split(".")[1].removeprefix("rank")
        if number.isdecimal():
            found[int(number)] = file
    return found


def load_state(path: Path) -> dict[str, Any]:
    """The content written by `save_state`; arrays return as numpy arrays or tensors, as they were saved.

    Raises:
        ValueError: The file is of another kind or format version, cannot be read, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"'{path}' holds no drafter state of this version (format {metadata.get('format')!r}, expected "
                    f"{_FORMAT!r})"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is no file that save_drafters() wrote, or is damaged ({error})") from error
    described = metadata.get("values", "")
    if metadata.get("checksum") != _checksum(tensors, described):
        raise ValueError(f"'{path}' is damaged (its checksum does not fit its content)")
    return _nested(path, tensors, described)


def restore(speculators: Mapping[str, Speculator], state: Mapping[str, Any], *, strict: bool) -> None:
    """Restore each speculator's part of a state; an empty part restores nothing.

    Args:
        speculators: By name.
        state: Parts by name.
        strict: If False, a part that cannot be restored only gives a warning, and its speculator starts afresh.

    Raises:
        ValueError: With `strict`: a part is damaged, or its speculator does not exist.
    """
    state = {name: part for name, part in state.items() if not (isinstance(part, Mapping) and not part)}
    missing = sorted(str(name) for name in state if name not in speculators)
    if missing:
        message = f"the state has speculators {missing} that this engine lacks; it has {sorted(speculators)}"
        if strict:
            raise ValueError(message)
        logger.warning("atlas_rl: %s: left out", message)
    for name, speculator in speculators.items():
        if name not in state:
            continue
        try:
            speculator.load_state_dict(saved_part(state[name]))
        except Exception as error:  # user-written speculators included: training never stops for a drafter
            if strict:
                raise
            logger.warning(
                "atlas_rl: the saved state of the drafter '%s' is ignored: %s. It starts afresh", name, error
            )


def _checksum(tensors: Mapping[str, torch.Tensor], described: str) -> str:
    digest = hashlib.sha256(described.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flatten(state: Mapping[str, Any], prefix: str, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    for name, value in state.items():
        key = prefix + name
        if isinstance(value, Mapping):
            values[key] = {}  # keeps empty mappings
            _flatten(value, key + _SEPARATOR, tensors, values)
        elif isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().contiguous()
        elif isinstance(value, np.ndarray):
            # torch lacks arithmetic on some unsigned types, but safetensors stores them; `values` keeps the dtype.
            tensors[key], values[key] = torch.from_numpy(np.ascontiguousarray(value)), value.dtype.str
        elif isinstance(value, str | int | float | bool | None):
            values[key] = value
        elif isinstance(value, np.generic):
            values[key] = value.item()
        else:
            raise TypeError(f"drafter state '{key}' is a {type(value).__name__}, which cannot be saved")


def _nested(path: Path, tensors: Mapping[str, torch.Tensor], described: str) -> dict[str, Any]:
    """Rebuild the mapping that `_flatten` took apart. A forged file may have a valid checksum: `ValueError` too."""
    state: dict[str, Any] = {}
    try:
        values = json.loads(described)
        for key, value in values.items():
            if key not in tensors:
                _put(state, key, value)
        for key, tensor in tensors.items():
            _put(state, key, tensor if values.get(key) is None else _array(tensor, values[key]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged ({error})") from error
    return state


def _array(tensor: torch.Tensor, name: str) -> np.ndarray:
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of type {name}")
    return tensor.numpy().astype(dtype, copy=False)


def _put(state: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(_SEPARATOR)
    for parent in parents:
        state = state.setdefault(parent, {})
    if isinstance(value, dict):
        state.setdefault(name, {})
    else:
        state[name] = value
