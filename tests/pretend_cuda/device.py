"""The device itself: what of torch it stands for, while it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock
from weakref import WeakSet

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_rl.policy import captures
from tests import ROOT
from tests.pretend_cuda.calls import IN_PYTHON, call
from tests.pretend_cuda.graphs import Graphs
from tests.pretend_cuda.kernels import Launches
from tests.pretend_cuda.operations import Operations
from tests.pretend_cuda.record import Record
from tests.pretend_cuda.tensors import CudaTensor, activated


class PretendCuda(Record):
    """See the package's docstring.

    Args:
        roots: Folders whose frames events are charged to; the checkout and the working directory.
        available: Whether `torch.cuda.is_available()` answers yes. Libraries that then call into CUDA will fail.
        processors: Multiprocessors of the device (an H100 has 132).
        memory: Bytes of the device, all of them free.
        cudnn_attention: Whether attention in half precision goes to cuDNN first, as torch from 2.11 on has it on Hopper and
            Blackwell (cuDNN above 9.15.1, and TORCH_CUDNN_SDPA_DEPRIORITIZED not set).
        graphs: Whether it has CUDA graphs (`graphs.py`). Without, what would be captured is launched kernel by kernel.
        capability: Of the device, 9.0 for an H100.
        kernels: How Triton kernels get their results (`kernels.py`): of their references, of the interpreter, or not at all.
        forbid: Kinds of events that raise where they happen (see also `forbidding`).
        current: Index of the device that is current at first; all tensors are on device 0 (see also `astray`).

    Attributes:
        graphs: Streams and captures.
    """

    graphs: Graphs

    def __init__(
        self,
        *,
        roots: Sequence[str | Path] = (ROOT, Path.cwd()),
        available: bool = False,
        processors: int = 132,
        memory: int = 80 << 30,
        cudnn_attention: bool = True,
        graphs: bool = False,
        capability: tuple[int, int] = (9, 0),
        kernels: Literal["reference", "interpreted", "blank"] = "reference",
        forbid: Sequence[str] = (),
        current: int = 0,
    ) -> None:
        super().__init__(roots, forbid, current)
        self._processors, self._memory, self._available = processors, memory, available
        self._cudnn_attention, self._kernels, self._graphs = cudnn_attention, kernels, graphs
        self._capability = capability
        self._stack = ExitStack()

    def __enter__(self) -> PretendCuda:
        with ExitStack() as stack:
            self._enter(stack, Operations(self, cudnn_attention=self._cudnn_attention))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _enter(self, stack: ExitStack, device: Operations) -> None:
        self.graphs = device.graphs
        graphs = {"CUDAGraph": device.graphs.make, "graph": device.graphs.capture} if self._graphs else {}
        pretended = self._of_torch_cuda(device.graphs) | graphs
        for name, value in pretended.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.callback(_still_there, pretended)
        end = mock.patch.object(torch._C, "_cuda_endAllocateToPool", device.graphs.end_allocation, create=True)
        stack.enter_context(end)
        stack.enter_context(mock.patch.dict(captures._streams, clear=True))
        stack.enter_context(mock.patch.object(captures, "_pools", WeakSet()))
        # vLLM on a CPU replaces it for the whole process.
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", torch._C.TensorBase.pin_memory))
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", return_value=True))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", self._synchronize))
        stack.enter_context(_autocast_of_the_cpu())
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to("cuda")` makes new parameters
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(Launches(device, self._kernels).running())
        stack.enter_context(_Dispatch(device))
        stack.enter_context(_Functions(device))
        stack.enter_context(activated(device))

    def _of_torch_cuda(self, graphs: Graphs) -> dict[str, Any]:
        properties = SimpleNamespace(
            name="pretended H100",
            major=self._capability[0],
            minor=self._capability[1],
            total_memory=self._memory,
            multi_processor_count=self._processors,
        )
        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: self._available,
            "device_count": lambda: 1,
            "current_device": lambda: self.current,
            "device": self._making_current,
            "synchronize": self._synchronize,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: self._capability,
            "mem_get_info": lambda device=None: (self._memory, self._memory),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "empty_cache": lambda: None,
            # Numbers are the CPU's, and so is their generator.
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "Event": lambda **options: _Event(self),
            "CUDAGraph": lambda: None,
            "graph_pool_handle": graphs.pool_handle,
            "graph": _no_graph,
            "Stream": graphs.stream,
            "current_stream": graphs.current_stream,
            "set_stream": graphs.set_stream,
            "stream": graphs.on,
        }

    def move(self, module: torch.nn.Module) -> Any:
        """`module` with its parameters and buffers on the device; tied ones stay tied, and nothing is recorded."""
        moved: dict[int, Any] = {}
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    key = id(parameter)
                    if key not in moved:
                        made = CudaTensor(parameter.detach().clone(), parameter.requires_grad)
                        made._is_param = True  # type: ignore[attr-defined]
                        moved[key] = made
                    owner._parameters[name] = moved[key]
            for name, buffer in list(owner._buffers.items()):
                if buffer is not None:
                    owner._buffers[name] = moved.setdefault(id(buffer), CudaTensor(buffer.detach().clone()))
        return module

    @contextmanager
    def _making_current(self, device: torch.device | int) -> Iterator[None]:
        """`torch.cuda.device`."""
        before, self.current = self.current, device if isinstance(device, int) else device.index or 0
        try:
            yield
        finally:
            self.current = before

    def _synchronize(self, device: Any = None) -> None:
        self.event("sync", "synchronize")


@contextmanager
def _no_graph(graph: Any, **options: Any) -> Iterator[None]:
    """Nothing can be replayed: what would be captured is launched kernel by kernel, and counted."""
    raise RuntimeError("a pretended device has no graphs")
    yield


class _Event:
    """`torch.cuda.Event`: waiting for it is recorded; nothing takes time."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def record(self, stream: Any = None) -> None:
        """Nothing is queued, so nothing has to be marked."""

    def wait(self, stream: Any = None) -> None:
        """A stream waits, not the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._record.event("sync", "event.synchronize")

    def elapsed_time(self, end: _Event) -> float:
        return 0.0


def _still_there(pretended: dict[str, Any]) -> None:
    """What a test puts in place of these must go before, or undoing it later brings these back for good."""
    replaced = [name for name, value in pretended.items() if getattr(torch.cuda, name) is not value]
    assert not replaced, f"undo your own torch.cuda.{replaced[0]} inside of PretendCuda: with monkeypatch.context()"


class _Dispatch(TorchDispatchMode):
    """Tensors that C++ makes inside a call are seen here."""

    def __init__(self, device: Operations) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Where a tensor is, and where one goes, is decided in Python: here."""

    def __init__(self, device: Operations) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self if func in IN_PYTHON else ExitStack():
            return call(self._device, func, args, kwargs or {})


@contextmanager
def _autocast_of_the_cpu() -> Iterator[None]:
    """Autocast of CUDA is that of the CPU: its lists differ in a few operations that no decode step has."""
    begin = torch.autocast.__init__
    questions = ("is_autocast_enabled", "get_autocast_dtype")

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def of_the_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *device: original(*("cpu" if name == "cuda" else name for name in device))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", init))
        for name in questions:
            stack.enter_context(mock.patch.object(torch, name, of_the_cpu(getattr(torch, name))))
        yield
