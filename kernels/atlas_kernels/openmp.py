"""Keeps numba from changing the settings of the OpenMP runtime that it shares with torch.

numba starts its threads with the first parallel function that a process compiles. On GNU's runtime that

- raises torch's number of threads to every core, against OMP_NUM_THREADS (which torchrun sets to 1) and
  `torch.set_num_threads`;
- turns nested parallelism on. As soon as anybody calls `torch.set_num_threads`, MKL no longer lowers its own number inside
  a parallel region: every product inside torch's attention then starts a team of threads of its own. An attention of 0.1 ms
  took 14 ms on two cores, and a decode step over 8 rows 490 ms where 150 were due.
"""

from __future__ import annotations

import ctypes
import os

import numba
import torch


def share_threads() -> None:
    """Start as many numba threads as torch's now, and restore torch's thread count and nesting."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    # The symbols that numba's own calls were bound to; there are none where its threads are not OpenMP's.
    runtime = ctypes.CDLL(None)
    if hasattr(runtime, "omp_set_max_active_levels") and not _asked_for_nesting():
        runtime.omp_set_max_active_levels(1)


def _asked_for_nesting() -> bool:
    return any(name in os.environ for name in ("OMP_NESTED", "OMP_MAX_ACTIVE_LEVELS"))
