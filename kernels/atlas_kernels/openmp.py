"""Keeps numba from changing the settings of the OpenMP runtime that it shares with torch.

numba starts its threads when a process compiles its first parallel function. On GNU's runtime this

- raises torch's number of threads to every core, against OMP_NUM_THREADS (which torchrun sets to 1) and
  `torch.set_num_threads`;
- turns nested parallelism on. After any call of `torch.set_num_threads`, MKL no longer lowers its own number of threads
  inside a parallel region: every product inside torch's attention then starts its own team of threads. An attention of
  0.1 ms took 14 ms on two cores, and a decode step over 8 rows took 490 ms instead of 150.
"""

from __future__ import annotations

import ctypes
import os

import numba
import torch


def share_threads() -> None:
    """Start as many numba threads as torch has now, and restore torch's thread count and nesting."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    # The symbols that numba's own calls are bound to; absent if its threads do not use OpenMP.
    runtime = ctypes.CDLL(None)
    if hasattr(runtime, "omp_set_max_active_levels") and not _asked_for_nesting():
        runtime.omp_set_max_active_levels(1)


def _asked_for_nesting() -> bool:
    return any(name in os.environ for name in ("OMP_NESTED", "OMP_MAX_ACTIVE_LEVELS"))
