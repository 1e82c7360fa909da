"""Shared parts of benchmarks: machine, versions, commit, quantiles. Fails rather than write "unknown"."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
_MEMORY_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
_PACKAGES = ("atlas-rl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numba", "numpy")


def environment(packages: Sequence[str] = _PACKAGES, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit of a measurement.

    Args:
        packages: Packages whose versions to include.
        commit: The measured commit, if the code was copied to a machine without git.

    Returns:
        `machine` (CPU model, cores, memory, GPU), `versions` of Python and of the packages that matter, `commit` and
        `dirty` (whether the checkout, results aside, differs from that commit).

    Raises:
        RuntimeError: A value cannot be determined; a figure without its origin is not written.
    """
    origin = {"commit": commit} if commit else {"commit": _git("rev-parse", "HEAD"), "dirty": _dirty()}
    return {"machine": machine(), "versions": versions(packages), **origin}


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, torch threads, memory, settings of its allocators, and GPU."""
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(terse=True),
        "memory_settings": {name: os.environ[name] for name in _MEMORY_SETTINGS if name in os.environ},
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that affect the figures."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise RuntimeError(
                f"{package} is not installed; run benchmarks in the environment of `make setup`"
            ) from error
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """`median`, `p10` and `p90` of repeated measurements (linear interpolation)."""
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"quantiles need at least one value and only finite ones, got {values}")
    p10, median, p90 = np.quantile(np.asarray(values, dtype=np.float64), [0.1, 0.5, 0.9])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def saved(name: str, model: Any, tokenizer: Any) -> str:
    """Save a policy to a folder that stays the same, because vLLM compiles for minutes for a new one."""
    folder = ROOT / "runs" / "policies" / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_result(path: str | Path, payload: dict[str, Any]) -> Path:
    """Write `payload` as JSON atomically: an interrupted run leaves the previous result in place.

    Raises:
        ValueError: A number in `payload` is not finite.
    """
    path = Path(path)
    text = json.dumps(payload, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def result_and_folder(description: str | None) -> tuple[dict[str, Any], Path]:
    """The arguments of a command that plots a recorded result: the content of its file, and the folder for the pictures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a file of benchmarks/results/")
    parser.add_argument("folder", type=Path, help="gets the pictures")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    return json.loads(args.result.read_text()), args.folder


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    if platform.processor():
        return platform.processor()
    raise RuntimeError("the CPU model cannot be determined on this machine")


def _dirty() -> bool:
    # Untracked source files count: a figure from unpublished code is as unrepeatable as one from edited code.
    return bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results"))


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"git {' '.join(arguments)} failed, so the commit is unknown: {result.stderr.strip()}")
    return result.stdout.strip()
