"""Captures work of a GPU as CUDA graphs, each replayed by one launch, and counts what captures cost.

See https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs. The graphs of one owner share a memory pool, so a
replay may overwrite what another graph has left: outputs are read before the next replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Captured:
    """The cost of captures.

    Attributes:
        seconds: Time spent on capturing.
        num_bytes: Most bytes of device memory that the graphs reserved at once.
    """

    seconds: float = 0.0
    num_bytes: int = 0

    @staticmethod
    def of(each: Iterable[Captured]) -> Captured:
        """The sum over several owners."""
        costs = list(each)
        return Captured(sum(cost.seconds for cost in costs), sum(cost.num_bytes for cost in costs))


class Captures:
    """Base of what replays its work as CUDA graphs.

    Args:
        capture: Whether to capture anything.

    Attributes:
        captured: Graphs made so far, dropped ones included.
        capture_s: Seconds spent on capturing, without waits for what was queued before.
        num_bytes: Bytes of device memory that the present graphs have reserved.
        refused: Why nothing can be captured; None as long as it can.
        short_of_memory: Whether it cannot because memory ran out, which may pass.
    """

    def __init__(self, *, capture: bool) -> None:
        self._capture = capture
        self._pool: Any = None
        self._most_bytes, self._told_s = 0, 0.0  # since the last `take_captured`, and at it
        self.captured = 0
        self.capture_s = 0.0
        self.num_bytes = 0
        self.refused: str | None = None
        self.short_of_memory = False

    @property
    def can_capture(self) -> bool:
        """Whether work is to be captured, and nothing has prevented it so far."""
        return self._capture and self.refused is None

    def take_captured(self) -> Captured:
        """The cost of captures since this was asked last."""
        cost = Captured(self.capture_s - self._told_s, self._most_bytes)
        self._told_s, self._most_bytes = self.capture_s, self.num_bytes
        return cost

    def _graph_of(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """A graph of `work`, which has not run by then. If it cannot be captured: None, and `refused` says why.

        Args:
            work: Queues kernels. It has run before, which has loaded what a capture must not load.
        """
        torch.cuda.synchronize()  # entering a capture does, too: what runs already is no part of the price
        began_s = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads may go on meanwhile, for example to pin memory for a data loader.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                before_bytes = torch.cuda.memory_reserved()  # here: entering has freed what torch held unused
                work()
        except RuntimeError as error:  # for example, a module waits for the device to see which experts are needed
            self.refused, self.short_of_memory = str(error).splitlines()[0], _ran_out_of_memory(error)
            torch.cuda.synchronize()
            return None
        self.captured += 1
        self.num_bytes += max(0, torch.cuda.memory_reserved() - before_bytes)
        self._most_bytes = max(self._most_bytes, self.num_bytes)
        self.capture_s += time.perf_counter() - began_s
        return graph

    def _free_pool(self) -> None:
        """Give back the memory of graphs that the owner has dropped."""
        self._pool = None  # else it would not be freed with them
        self.num_bytes = 0


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or the one that it came of, says so: ending a capture that failed may fail as well."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _ran_out_of_memory(error.__context__))
