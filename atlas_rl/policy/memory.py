"""Memory for caches: how much may be taken, and its allocation."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

_SHARE = {"cuda": 0.6, "cpu": 0.3}
_CGROUP = Path("/sys/fs/cgroup")  # version 2; a container sees its own


def free_bytes(device: torch.device) -> int:
    """Bytes that caches on `device` may take now without starving the rest of the process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + held) * _SHARE["cuda"])
    return int(_host_bytes() * _SHARE["cpu"])


def allocated(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Allocate a cache tensor of the type and device of `like`; `MemoryError` if it does not fit."""
    try:
        return like.new_empty(shape)
    except RuntimeError as error:  # the only error of this call, under several names
        gib = math.prod(shape) * like.element_size() / 2**30
        raise MemoryError(
            f"the attention cache needs {gib:.2f} GiB more, and there is no memory for it: lower max_batch_size or "
            "max_new_tokens, or leave more memory free"
        ) from error


def _host_bytes() -> int:
    """Available memory of the machine or container; reclaimable file cache counts as available."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))  # "max" if there is none
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        files = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
        reclaimable = int(files[files.index("inactive_file") + 1])
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used + reclaimable))
