"""Captures work of a GPU as CUDA graphs, each replayed by one launch, and counts what captures cost.

See https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs. The graphs of one owner share a memory pool, so a
replay may overwrite what another graph has left: outputs are read before the next replay.

Three things that torch leaves to its caller are kept here:

- **Graphs share memory only within a pool** (`_Pool`). Products write to a workspace that torch keeps per stream, in the
  pool of the capture that used one there first. It goes with that pool, and from torch 2.12 on with any graph of the
  stream. Graphs of another pool would then write to memory that is somebody else's (pytorch#193402). So the stream that a
  pool's graphs are captured on is no other pool's meanwhile. An owner that finds none is refused.
- **A capture goes to the device that is current.** torch's own stream for captures belongs to the device that was
  current at the first capture of the process. On another device it would capture nothing, silently.
- **A capture that fails leaves nothing behind** (`_capturing`). torch would leave its own stream current. Up to 2.11 its
  allocator would take the capture to be running for ever, and would not free memory for others (pytorch#180395); and its
  random generator would as well, and raise at the next dropout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

_LACKS = ("out of memory", "ALLOC_FAILED")  # in messages of errors that are no `OutOfMemoryError`
_NUM_STREAMS = 32  # that torch has per device and priority
_TORCH = str(Path(torch.__file__).parent)


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Pool:
    """Memory that some graphs share, and the stream that they are captured on."""

    handle: Any
    stream: torch.cuda.Stream


_streams: dict[int, list[torch.cuda.Stream]] = {}  # by device; used again, because torch has `_NUM_STREAMS` of each
_pools: WeakSet[_Pool] = WeakSet()


def _new_pool() -> _Pool:
    """A pool on the current device, with a stream that no other pool has; `RuntimeError` if they have all of torch's.

    torch hands out its streams in turn, so two of its objects may be one stream. They are equal then.
    """
    known, taken = _streams.setdefault(torch.cuda.current_device(), []), [pool.stream for pool in _pools]
    candidates = chain(known, (torch.cuda.Stream() for _ in range(_NUM_STREAMS)))
    free = next((stream for stream in candidates if stream not in taken), None)
    if free is None:
        raise RuntimeError("all of torch's streams on this device are taken by the graphs of others")
    if free not in known:
        known.append(free)
    pool = _Pool(torch.cuda.graph_pool_handle(), free)
    _pools.add(pool)
    return pool


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
        self._pool: _Pool | None = None
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
        """A graph of `work`, which has been replayed once. If it cannot be captured: None, and `refused` says why.

        Args:
            work: Queues kernels. It has run before, which has loaded what a capture must not load.
        """
        torch.cuda.synchronize()  # entering a capture does, too: what runs already is no part of the price
        began_s = time.perf_counter()
        # By its id: a frame that holds an error of its own traceback, and all memory of its callers, is never freed.
        handled = id(sys.exception())
        graph = torch.cuda.CUDAGraph()
        try:
            # A pool is remembered with its first graph: torch does not take one whose graphs are all gone.
            pool = self._pool or _new_pool()
            with _capturing(graph, pool):
                before_bytes = torch.cuda.memory_reserved()  # here: entering has freed what torch held unused
                work()
            graph.replay()  # the first launch takes memory, too
        except RuntimeError as error:  # for example, a module waits for the device to see which experts are needed
            self.refused, self.short_of_memory = _reason(error, handled)
            torch.cuda.synchronize()
            return None
        self._pool = pool
        self.captured += 1
        self.num_bytes += max(0, torch.cuda.memory_reserved() - before_bytes)
        self._most_bytes = max(self._most_bytes, self.num_bytes)
        self.capture_s += time.perf_counter() - began_s
        return graph

    def _free_pool(self) -> None:
        """Give back the memory of graphs that the owner has dropped."""
        self._pool = None  # else it would not be freed with them
        self.num_bytes = 0


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: _Pool) -> Iterator[None]:
    """`torch.cuda.graph` that leaves nothing behind."""
    has_ended = False
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), _capture(graph, pool):
            yield
        has_ended = True
    finally:
        if not has_ended:
            _undo(pool)


def _undo(pool: _Pool) -> None:
    """End what a failed capture has begun in torch's allocator and random generator."""
    device = pool.stream.device
    with suppress(RuntimeError):  # later torch, and most failures, have ended it
        torch._C._cuda_endAllocateToPool(device.index, pool.handle)
    # The generator learns from the end of a capture, and only then. An empty graph would be warned of.
    another = _Pool(torch.cuda.graph_pool_handle(), pool.stream)
    with (
        suppress(RuntimeError),
        torch.cuda.stream(torch.cuda.current_stream()),
        _capture(torch.cuda.CUDAGraph(), another),
    ):
        torch.zeros(1, dtype=torch.int64, device=device)


def _capture(graph: torch.cuda.CUDAGraph, pool: _Pool) -> AbstractContextManager[object]:
    """`torch.cuda.graph`. Other threads may go on meanwhile, for example to pin memory for a data loader."""
    return torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local")


def _reason(error: BaseException, handled: int) -> tuple[str, bool]:
    """Why a capture failed, and whether memory ran out. `handled` is the id of what was being handled when it began."""
    causes = [error]  # the first one last
    while True:
        cause = causes[-1].__cause__ or causes[-1].__context__
        if cause is None or id(cause) == handled:
            return _told(causes[-1]), any(map(_is_lack_of_memory, causes))
        causes.append(cause)


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _LACKS)


def _told(error: BaseException) -> str:
    """The first line of an error, and where it was raised, as far as that is not in torch."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith(_TORCH):
            place = f", in {code.co_name} of {Path(code.co_filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return (str(error) or type(error).__name__).splitlines()[0] + place
