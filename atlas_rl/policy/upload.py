"""Moves arrays between host and device in bulk: up without waiting, down with one wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(bool): torch.bool,
}
_DTYPES: dict[torch.dtype, Any] = {there: here for here, there in _TYPES.items()}
_ALIGNED = 16  # bytes, alignment of each array


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies on `device`, in the shapes and types of `arrays` (int64, int32, float32 or bool).

    On a CPU they may share memory with the arrays. Elsewhere it is one copy from pinned memory: the host does not wait,
    and work that it queues afterwards sees the values.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays])
    starts = [0, *ends[:-1].tolist()]
    staged = _staging((int(ends[-1]),), torch.uint8)
    bytes_of = staged.numpy()
    for array, start in zip(arrays, starts, strict=True):
        bytes_of[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = staged.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def uploaded(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`upload` of a single array."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    staged = _staging(array.shape, _TYPES[array.dtype])
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


def upload_into(target: torch.Tensor, array: np.ndarray) -> None:
    """`upload` of an array of the shape and type of `target`, into that: no kernel is launched."""
    if target.device.type == "cpu":
        target.copy_(torch.from_numpy(array))
        return
    staged = _staging(array.shape, target.dtype)
    staged.numpy()[...] = array
    target.copy_(staged, non_blocking=True)


def _staging(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Pinned memory to copy from; torch keeps it until the copy is done."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


def download(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Copies on the host of `tensors`, which are on one device; the host waits once."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    return _split(_packed(tensors).cpu(), tensors)


def begin_download(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """`download` in two parts: the copy is queued now, and the returned function waits for it.

    It does not wait for work that is queued after the copy.
    """
    if tensors[0].device.type == "cpu":
        return partial(list, [tensor.numpy() for tensor in tensors])
    packed = _packed(tensors)
    here = _staging(packed.shape, packed.dtype)
    here.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[np.ndarray]:
        arrived.synchronize()
        return _split(here, tensors)

    return wait


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of tensors, one after the other."""
    bytes_of = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(bytes_of) if len(bytes_of) > 1 else bytes_of[0]


def _split(here: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """`_packed(tensors)`, which is on the host now, as arrays."""
    ends = np.cumsum([tensor.nbytes for tensor in tensors]).tolist()
    return [
        here.numpy()[start:end].copy().view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
        for tensor, start, end in zip(tensors, [0, *ends[:-1]], ends, strict=True)
    ]
