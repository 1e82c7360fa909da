"""CUDA graphs of a pretended device: operations are noted where they run, and run again on the same memory.

A replay reads what tensors hold then, and writes where the capture wrote. It knows nothing of Python: what a parameter is
replaced by, a flag or a number that has changed since, a graph does not see. So a graph that is stale gives what it would
give on a GPU. What makes the host wait fails while something is captured, as there.

Unlike a GPU's, a capture also computes what it notes; and memory is kept by whoever has the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.pretend_cuda.record import Record
from tests.pretend_cuda.tensors import tensors_in, unpretended


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.operations: list[tuple[Callable[[], Any], Any]] = []  # and what each gave

    def replay(self) -> None:
        """Everything once more: one launch."""
        self._record.event("launch", "graph")
        with unpretended(), torch.no_grad():
            for operation, before in self.operations:
                for old, new in zip(tensors_in(before), tensors_in(operation()), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        """Forget everything."""
        self.operations = []


class Graphs:
    """What is captured now, if anything."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._open: Graph | None = None

    def make(self) -> Graph:
        return Graph(self._record)

    @contextmanager
    def capture(self, graph: Graph, **options: Any) -> Iterator[None]:
        """`torch.cuda.graph`."""
        self._open, self._record.captured = graph, []
        try:
            yield
        finally:
            self._open, self._record.captured = None, None

    def run(self, operation: Callable[[], Any]) -> Any:
        """Run an operation on plain tensors, and note it where something is captured."""
        out = operation()
        if self._open is not None:
            self._open.operations.append((operation, out))
        return out
