"""Writes files whole or not at all: an interruption or a full disk leaves the previous content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; either the whole file or nothing.

    Raises:
        OSError: The write failed; nothing is left behind.
    """
    from safetensors.torch import save_file

    with _replacing(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"'{path}' cannot be written: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8; either the whole file or nothing.

    Raises:
        OSError: The write failed; nothing is left behind.
    """
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which it then replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
