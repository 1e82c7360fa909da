"""Whether drafts are made on one thread or over rows in parallel threads: as the run's own drafts were faster.

Beginning a parallel region costs nothing if one has just ended, 30 to 50 microseconds if the threads have gone to sleep, and
milliseconds if other processes hold the cores. None of this can be measured beforehand. So both forms are timed where they
are used, for each amount of work. The slower one is tried again from time to time, and all trials together may lose a
twentieth of the time of drafting.
"""

from __future__ import annotations

import os
from collections import deque

import numba

from atlas_kernels.openmp import share_threads

share_threads()  # before a parallel kernel is compiled

ONE, PARALLEL = 0, 1
"""Forms of a draft."""

_MOST_THREADS = 8
_TRY_EVERY = 8  # drafts of an amount of work, at least, between two trials of the slower form
_TRIAL_SHARE = 0.05  # of the time of drafting
_RECENT = 9  # drafts of an amount of work that a form is judged by

# numba's OpenMP layer ends a process that was forked from one with threads.
_IMPORTED_BY = os.getpid()


def usable_threads() -> int:
    """Threads that drafts may use here, at least 1.

    They are the cores of the process, divided among the ranks of its node, and within `OMP_NUM_THREADS` and
    `NUMBA_NUM_THREADS`. `torch.set_num_threads` has no influence. One thread in a forked process, and with numba's
    `workqueue` layer, which ends a process whose threads use it at the same time.
    """
    if os.getpid() != _IMPORTED_BY or numba.threading_layer() == "workqueue":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [_MOST_THREADS, numba.config.NUMBA_NUM_THREADS, cores // _number("LOCAL_WORLD_SIZE", 1)]
    return max(1, min(*limits, _number("OMP_NUM_THREADS", _MOST_THREADS)))


def _number(variable: str, default: int) -> int:
    """Positive number in an environment variable; `OMP_NUM_THREADS` may be a list, of which the first counts."""
    text = os.environ.get(variable, "").split(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else default


class _Times:
    """Recent seconds of both forms per row and token, for one amount of work.

    Other processes interrupt both forms, and a parallel one waits for its last thread as well. So one thread is judged by
    its median, and the parallel form by its mean.
    """

    def __init__(self) -> None:
        self.recent: tuple[deque[float], deque[float]] = deque(maxlen=_RECENT), deque(maxlen=_RECENT)
        self.expected = [0.0, 0.0]
        self.since_trial = 0

    @property
    def faster(self) -> int:
        """The form to use; one thread until both were timed."""
        return PARALLEL if all(self.recent) and self.expected[PARALLEL] < self.expected[ONE] else ONE

    def add(self, form: int, seconds: float) -> None:
        """Add the newest time of a form."""
        recent = self.recent[form]
        recent.append(seconds)
        self.expected[form] = sorted(recent)[len(recent) // 2] if form == ONE else sum(recent) / len(recent)


class Forms:
    """Chooses a form for every draft and learns from its seconds.

    Args:
        threads: Threads of the parallel form; with one thread nothing is timed and nothing tried.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._times: dict[int, _Times] = {}
        self._drafting_s, self._lost_s = 0.0, 0.0

    def choose(self, work: int) -> int:
        """Form of the next draft of `work` tokens at most, over all rows."""
        times = self._times.setdefault(work.bit_length(), _Times())
        faster = times.faster
        if not times.recent[ONE]:
            return ONE
        due = not times.recent[PARALLEL] or times.since_trial >= _TRY_EVERY
        return 1 - faster if due and self._lost_s <= _TRIAL_SHARE * self._drafting_s else faster

    def took(self, work: int, form: int, seconds: float) -> None:
        """Learn from a draft in a form that `choose` gave for this work."""
        times = self._times[work.bit_length()]
        faster = times.faster
        if form == faster:
            times.since_trial += 1
        else:
            times.since_trial = 0
            self._lost_s += max(0.0, seconds - times.expected[faster] * work)
        times.add(form, seconds / work)
        self._drafting_s += seconds
