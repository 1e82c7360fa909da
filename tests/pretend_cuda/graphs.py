"""CUDA graphs of a pretended device: operations are noted where they run, and run again on the same memory.

A replay reads what tensors hold then, and writes where the capture wrote. It knows nothing of Python: what a parameter is
replaced by, a flag or a number that has changed since, a graph does not see. So a graph that is stale gives what it would
give on a GPU. What makes the host wait fails while something is captured, as there.

What torch does around a capture is done as well, faults included (torch 2.11 to 2.14):

- A capture that was invalidated raises when it ends. The stream that it was made on stays the current one, and the
  allocator goes on as if it were captured to (`underway`), and so does the random generator (`draws`).
- torch's own stream for captures belongs to the device that was current at the first one. What is captured on a stream
  of another device than the tensors' is launched at once, and the graph is empty.
- Products write to a workspace of their stream. A graph that goes takes those of its stream along, and a graph of another
  pool that has one of them writes to memory that is not its own any more.
- A pool whose graphs are all gone takes no others.

Unlike a GPU's, a capture also computes what it notes; and memory is kept by whoever has the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.pretend_cuda.record import Record
from tests.pretend_cuda.tensors import tensors_in, unpretended

NUM_STREAMS = 32  # per device
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
_PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")}


class Stream:
    """`torch.cuda.Stream`. Nothing runs apart: it only tells where work would go.

    Attributes:
        index: Of its device.
        number: Equal ones of a device are one stream; 0 is the device's default.
    """

    def __init__(self, record: Record, index: int, number: int = 0) -> None:
        self._record, self.index, self.number = record, index, number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.index, self.number) == (other.index, other.number)

    def __hash__(self) -> int:
        return hash((self.index, self.number))

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cuda.Event()

    def wait_event(self, event: Any) -> None:
        """A stream waits, not the host."""

    def wait_stream(self, stream: Stream) -> None:
        """A stream waits, not the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._record.event("sync", "stream.synchronize")


@dataclass(slots=True, eq=False)
class _Workspace:
    """What products of a stream write to.

    Attributes:
        pool: Of the capture that it was allocated in; None if there was none.
        is_gone: Whether torch has let go of it.
    """

    pool: Any
    is_gone: bool = False


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, graphs: Graphs, record: Record) -> None:
        self._graphs, self._record = graphs, record
        self.operations: list[tuple[Callable[[], Any], Any]] = []  # and what each gave
        self.workspaces: list[_Workspace] = []
        self.pool: Any = None
        self.stream: Stream | None = None  # once it is captured

    def replay(self) -> None:
        """Everything once more: one launch."""
        self._record.event("launch", "graph")
        if any(one.is_gone and one.pool != self.pool for one in self.workspaces):
            raise RuntimeError(ILLEGAL)
        with unpretended(), torch.no_grad():
            for operation, before in self.operations:
                for old, new in zip(tensors_in(before), tensors_in(operation()), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        """Forget everything."""
        if self.stream is not None:
            self._graphs.ended(self)
        self.operations, self.stream = [], None

    def __del__(self) -> None:
        self.reset()


class Graphs:
    """What is captured now, if anything, and the streams.

    Attributes:
        underway: Pools that allocations go to as if a capture ran.
        draws: Whether the random generator draws outside of captures.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._open: Graph | None = None
        self._defaults: dict[int, Stream] = {}
        self._turns: dict[int, int] = {}  # of streams, by device
        self._current: dict[int, Stream] = {}
        self._of_captures: Stream | None = None  # torch's own
        self._workspaces: dict[Stream, _Workspace] = {}
        self._num_of_pool: Counter[Any] = Counter()
        self._num_pools = 0
        self.underway: list[Any] = []
        self.draws = True

    def make(self) -> Graph:
        return Graph(self, self._record)

    def pool_handle(self) -> tuple[int, int]:
        self._num_pools += 1
        return 0, self._num_pools

    def stream(self, device: Any = None) -> Stream:
        """`torch.cuda.Stream`: the streams of a device are handed out in turn."""
        index = self._record.current if device is None else torch.device(device).index or 0
        turn = self._turns[index] = self._turns.get(index, 0) % NUM_STREAMS + 1
        return Stream(self._record, index, turn)

    def current_stream(self, device: Any = None) -> Stream:
        index = self._record.current if device is None else torch.device(device).index or 0
        default = self._defaults.setdefault(index, Stream(self._record, index))
        return self._current.get(index, default)

    def set_stream(self, stream: Stream) -> None:
        """The device of the stream becomes the current one."""
        self._record.current, self._current[stream.index] = stream.index, stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, there = self.current_stream(), self.current_stream(stream.device)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(there)
            self.set_stream(before)

    @contextmanager
    def capture(
        self, graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """`torch.cuda.graph`."""
        if stream is None:
            stream = self._of_captures = self._of_captures or self.stream()
        before, there = self.current_stream(), self.current_stream(stream.device)
        self.set_stream(stream)
        graph.pool = self.pool_handle() if pool is None else pool
        if self._num_of_pool.get(graph.pool) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self._num_of_pool[graph.pool] += 1
        self.underway.append(graph.pool)
        self.draws = False
        if stream.index == 0:  # where the tensors are
            self._open, self._record.captured = graph, []
        self._record.is_invalidated = False
        try:
            yield
        finally:
            self._open, self._record.captured = None, None
            if self._record.is_invalidated:
                raise RuntimeError(INVALIDATED)
            graph.stream, self.draws = stream, True
            self.underway.remove(graph.pool)
            self.set_stream(there)
            self.set_stream(before)

    def ended(self, graph: Graph) -> None:
        """A graph goes."""
        self._num_of_pool[graph.pool] -= 1
        assert graph.stream is not None
        workspace = self._workspaces.pop(graph.stream, None)
        if workspace is not None:
            workspace.is_gone = True

    def end_allocation(self, device: int, pool: Any) -> None:
        """`torch._C._cuda_endAllocateToPool`."""
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def run(self, operation: Callable[[], Any], packet: Any = None) -> Any:
        """Run an operation on plain tensors, and note it where something is captured."""
        out = operation()
        if packet in _PRODUCTS:
            pool = None if self._open is None else self._open.pool
            workspace = self._workspaces.setdefault(self.current_stream(), _Workspace(pool))
            if self._open is not None:
                self._open.workspaces.append(workspace)
        if self._open is not None:
            self._open.operations.append((operation, out))
        return out
