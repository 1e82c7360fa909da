"""Seconds of a replay: the live run's for steps, this thread's for what speculators do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from atlas_rl.speculators.base import Speculator


class LiveClock:
    """The live run's time for replayed speculators: steps take their live time, refreshes the time of this thread.

    So each arm gets the refresh budgets of the live run, whatever else runs on this machine.

    Args:
        slower: In refreshes the clock runs so many times slower, so that they learn so many times longer.
    """

    def __init__(self, slower: float = 1.0) -> None:
        self.slower = slower
        self._told_s = 0.0
        self._began_s: float | None = None  # when the refresh began

    def __call__(self) -> float:
        if self._began_s is None:
            return self._told_s
        return self._told_s + (time.thread_time() - self._began_s) / self.slower

    def pass_(self, seconds: float) -> None:
        """Advance by the time of a step."""
        self._told_s += seconds

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Context in which time passes by itself."""
        self._began_s = time.thread_time()
        yield
        self._told_s, self._began_s = self(), None


class ThreadSeconds:
    """Counts the seconds of this thread that speculators spend following the texts and drafting."""

    def __init__(self, speculators: Iterable[Speculator]) -> None:
        self.total_s = 0.0
        for speculator in speculators:
            for name in ("start", "backlog", "propose", "observe", "learn"):
                setattr(speculator, name, self._counted(getattr(speculator, name)))
        self._depth = 0  # a speculator may call itself

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self._depth += 1
            began_s = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.total_s += time.thread_time() - began_s

        return counted


def study(speculators: Iterable[Speculator], limit_s: float) -> float:
    """Let speculators learn until that no longer pays, `limit_s` seconds of this thread at most; returns the seconds."""
    began_s = time.thread_time()
    for speculator in speculators:
        while time.thread_time() - began_s < limit_s and speculator.study():
            pass
    return time.thread_time() - began_s
