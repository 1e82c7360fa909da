"""Triton kernels on pretended tensors: interpreted, and compiled as often as Triton would."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.pretend_cuda.operations import Operations
from tests.pretend_cuda.tensors import CudaTensor, plain, unpretended


@contextmanager
def interpreted_kernels(device: Operations) -> Iterator[None]:
    """Inside, kernels run by the interpreter on the numbers behind the tensors; CPU tensors are refused."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        yield
        return
    original = InterpretedFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        if not any(isinstance(value, CudaTensor) for value in values):
            return original(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        if any(isinstance(v, torch.Tensor) and not isinstance(v, CudaTensor) for v in values):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        device.record.build(f"Triton {kernel.fn.__name__}", (kernel.fn, specialization(kernel.fn, args, kwargs)))
        device.record.event("triton", kernel.fn.__name__)
        with unpretended():
            return original(kernel, *plain(args), grid=grid, warmup=warmup, **plain(kwargs))

    with mock.patch.object(InterpretedFunction, "run", run):
        yield


def specialization(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: constants, types, numbers that are 1 or multiples of 16, aligned pointers."""
    signature = inspect.signature(function)
    given = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind(*args, **given)
    bound.apply_defaults()
    key: list[Any] = [kwargs.get("num_warps")]
    for name, value in bound.arguments.items():
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.inner.data_ptr() % 16 == 0 if isinstance(value, CudaTensor) else None))
        elif "constexpr" in str(signature.parameters[name].annotation) or value is None or isinstance(value, bool):
            key.append((name, str(value)))
        elif isinstance(value, int):
            key.append((name, "one" if value == 1 else "sixteens" if value % 16 == 0 else "int", abs(value) >= 2**31))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)
