"""Tensors that say they are on `cuda:0`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.pretend_cuda.operations import Operations

CUDA = torch.device("cuda", 0)
MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (when running {})"
)

_of_thread = threading.local()
_latest: list[Operations] = []  # autograd runs its threads without the thread-local one


class CudaTensor(torch.Tensor):
    """A tensor that says it is on `cuda:0`; `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> CudaTensor:
        inner = inner.detach() if inner.requires_grad else inner
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
            storage_size=inner.untyped_storage().nbytes(),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.inner!r} on pretended cuda:0"

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        made = CudaTensor(self.inner.clone(), self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True  # type: ignore[attr-defined]
        return memo.setdefault(id(self), made)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CudaTensor, (self.inner, self.requires_grad)


def active() -> Operations:
    """The device that operations on tensors of this thread go to."""
    found = getattr(_of_thread, "device", None) or (_latest[-1] if _latest else None)
    if found is None:
        raise RuntimeError("a pretended CUDA tensor was used outside of PretendCuda()")
    return found


@contextmanager
def activated(device: Operations) -> Iterator[None]:
    """Inside, operations go to `device`."""
    before, _of_thread.device = getattr(_of_thread, "device", None), device
    _latest.append(device)
    try:
        yield
    finally:
        _latest.remove(device)
        _of_thread.device = before


@contextmanager
def unpretended() -> Iterator[None]:
    """Inside, torch is itself."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Tensors among the arguments of a call, in their order."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)


def mapped(values: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`values`, arguments or results of a call, with `function` of every tensor in them."""
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: mapped(value, function) for name, value in values.items()}
    if isinstance(values, tuple | list):
        made = [mapped(value, function) for value in values]
        named = hasattr(values, "_fields")  # a namedtuple; torch's own take a list, as lists and tuples do
        return type(values)(*made) if named else type(values)(made)
    return values


def plain(values: Any) -> Any:
    """`values` with the numbers of every tensor in them."""
    return mapped(values, lambda tensor: tensor.inner if isinstance(tensor, CudaTensor) else tensor)
