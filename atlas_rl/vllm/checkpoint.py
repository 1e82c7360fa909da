"""Reads checkpoint folders, and checks whether one can replace the weights that are served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F64", "F32", "BF16", "F16")  # interchangeable: trainers may save in another precision than engines run in
_NAMED = 5  # most tensors named in an error


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor of a checkpoint: its shape, and its type in safetensors' notation."""

    shape: tuple[int, ...]
    dtype: str


def describe(folder: str | Path) -> dict[str, Described]:
    """Every tensor of a checkpoint by name, from the headers of its files.

    Raises:
        ValueError: The folder does not exist, has no weights, or has missing or damaged files.
    """
    found: dict[str, Described] = {}
    for path in _files(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    found[name] = Described(tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path}' is damaged or cannot be read ({error})") from error
    if not found:
        raise ValueError(f"'{folder}' holds no tensors")
    return found


def served_folder(model: str, revision: str | None) -> Path:
    """Folder of the weights that an engine was started with: a local folder or one in the Hub's cache.

    Raises:
        ValueError: The weights are in neither place.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"'{model}' is no folder and not in the cache of the Hub") from error


def check(folder: str | Path, expected: Mapping[str, Described], dtype: torch.dtype) -> None:
    """Raise `ValueError` if a checkpoint cannot replace the expected one. Reads all of it.

    Args:
        folder: Folder of the checkpoint.
        expected: Description of the checkpoint that is being served.
        dtype: Type that the engine runs in; all values must be finite in it.
    """
    found = describe(folder)
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(unknown)} besides"] * bool(unknown)
        raise ValueError(f"'{folder}' is no checkpoint of this policy: it {' and '.join(parts)}")
    for name, own in found.items():
        known = expected[name]
        if own.shape != known.shape:
            raise ValueError(f"'{folder}' has {name} of shape {own.shape}, the policy's is {known.shape}")
        if own.dtype != known.dtype and not (own.dtype in _FLOATS and known.dtype in _FLOATS):
            raise ValueError(f"'{folder}' has {name} of type {own.dtype}, the policy's is {known.dtype}")
    for name, tensor in tensors(folder):
        check_finite(name, tensor, dtype)


def check_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise `ValueError` if a weight is not finite in the type that the engine runs in."""
    if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.to(dtype).isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite in {dtype}")


def tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over all tensors of a checkpoint.

    Raises:
        ValueError: See `describe`.
    """
    for path in _files(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path}' is damaged or cannot be read ({error})") from error


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}' that this server can read")
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{index}' is damaged ({error})") from error
        files = [folder / str(name) for name in names]
    else:
        single = folder / _SINGLE
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"'{folder}' holds no *.safetensors: save the policy there with save_pretrained")
    for file in files:
        if not file.is_file():
            raise ValueError(f"'{folder}' lacks {file.name}, which its index names")
    return files


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
