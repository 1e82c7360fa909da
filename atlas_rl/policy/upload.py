"""Arrays of the host on the policy's device: together in one copy, for which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}
_ALIGNED = 16  # bytes, of where an array begins


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies on `device`, in the shapes and types of `arrays` (int64, int32 or float32).

    On a CPU they may share memory with the arrays. Elsewhere it is one copy from pinned memory: the host goes on at once,
    and what it queues afterwards sees the numbers.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays])
    starts = [0, *ends[:-1].tolist()]
    staged = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=True)  # torch keeps it until the copy is done
    bytes_of = staged.numpy()
    for array, start in zip(arrays, starts, strict=True):
        bytes_of[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = staged.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
