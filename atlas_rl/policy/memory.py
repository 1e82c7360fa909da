"""Memory that caches may take: what is free now, less a share for everything else."""

from __future__ import annotations

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


def _host_bytes() -> int:
    """Memory of the machine, or of the container, that can be had: files that the system only keeps at hand do not count."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        files = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
        reclaimable = int(files[files.index("inactive_file") + 1])
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used + reclaimable))
