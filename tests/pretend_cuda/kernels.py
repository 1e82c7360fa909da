"""Triton kernels on pretended tensors: launched and compiled as on a GPU, computed by their references.

Interpreted, a kernel takes half a second. So what a call of one of our kernels gives is computed by its reference, which
gives the same (tests/kernels). The code of the host that launches it runs all the same, on memory that nobody writes,
so that its launches, copies and compilations are recorded. Kernels that are not listed here are interpreted.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from tests.pretend_cuda.operations import Operations
from tests.pretend_cuda.tensors import CudaTensor, plain, unpretended

# Folder-less modules of `atlas_kernels`: what launches a kernel, and its reference, of the same arguments.
_REFERENCES = (
    ("verify_triton", "verify_reference", "verify"),
    ("rejection_triton", "rejection_reference", "rejection"),
    ("draft_head_triton", "draft_head_reference", "draft_head"),
    ("truncated_head_triton", "draft_head_reference", "draft_head"),
    ("draw_triton", "draw_reference", "draw"),
    ("truncate_triton", "truncate_reference", "truncate"),
    ("nvfp4_triton", "nvfp4_reference", "quantize"),
    ("nvfp4_triton", "nvfp4_reference", "linear"),
    ("layer_triton", "layer_reference", "rms_norm"),
    ("layer_triton", "layer_reference", "rotate"),
    ("layer_triton", "layer_reference", "gated"),
    ("layer_triton", "layer_reference", "store"),
)


class Launches:
    """What stands for Triton's interpreter.

    Args:
        device: Of the tensors.
        kernels: "reference" computes what calls of our kernels give by their references, "interpreted" interprets all, and
            with "blank" nothing is written at all: to see what is launched.
    """

    def __init__(self, device: Operations, kernels: str) -> None:
        self._device, self._by_references = device, kernels == "reference"
        self._blank = kernels == "blank"  # whether launches write nothing

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, kernels run like this."""
        try:
            from triton.runtime.interpreter import InterpretedFunction
        except ImportError:
            yield
            return
        original = InterpretedFunction.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            return self._launch(original, kernel, args, kwargs)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", run))
            for launcher, reference, name in _REFERENCES if self._by_references else ():
                module = importlib.import_module(f"atlas_kernels.{launcher}")
                same = getattr(importlib.import_module(f"atlas_kernels.{reference}"), f"{name}_reference")
                called = self._by_reference(getattr(module, f"{name}_triton"), same)
                stack.enter_context(mock.patch.object(module, f"{name}_triton", called))
            yield

    def _launch(self, original: Callable[..., Any], kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [*args, *kwargs.values()]
        if not any(isinstance(value, CudaTensor) for value in values):
            return original(kernel, *args, **kwargs)
        if any(isinstance(v, torch.Tensor) and not isinstance(v, CudaTensor) for v in values):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        named = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        self._device.record.build(f"Triton {kernel.fn.__name__}", (kernel.fn, specialization(kernel, args, named)))
        self._device.record.event("triton", kernel.fn.__name__)
        if self._blank:
            return None
        with unpretended():
            return original(kernel, *plain(args), **plain(kwargs))

    def _by_reference(self, launcher: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(tensor, CudaTensor) for tensor in _tensors((*args, *kwargs.values()))):
                return launcher(*args, **kwargs)
            before, self._blank = self._blank, True
            try:
                launcher(*args, **kwargs)
            finally:
                self._blank = before
            with unpretended():
                out = self._device.graphs.run(partial(reference, *(_numbers(value) for value in args)))
                return CudaTensor(out) if isinstance(out, torch.Tensor) else tuple(_on_device(value) for value in out)

        return called


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(getattr(value, field.name) for field in fields(value))


def _numbers(value: Any) -> Any:
    """An argument with the numbers of its tensors."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _numbers(getattr(value, field.name)) for field in fields(value)})
    return value.inner if isinstance(value, CudaTensor) else value


def _on_device(value: torch.Tensor | None) -> CudaTensor | None:
    return None if value is None else CudaTensor(value)


def specialization(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: constants, types, numbers that are 1 or multiples of 16, aligned pointers.

    Numbers and pointers are left out as far as the kernel says that it wants none of it.
    """
    signature = inspect.signature(kernel.fn)
    whatever, anywhere = (
        kernel.kwargs.get(name) or () for name in ("do_not_specialize", "do_not_specialize_on_alignment")
    )
    given = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind(*args, **given)
    bound.apply_defaults()
    key: list[Any] = [kwargs.get("num_warps")]
    for name, value in bound.arguments.items():
        if isinstance(value, torch.Tensor):
            aligned = value.inner.data_ptr() % 16 == 0 if isinstance(value, CudaTensor) else None
            key.append((name, value.dtype, None if name in (*whatever, *anywhere) else aligned))
        elif "constexpr" in str(signature.parameters[name].annotation) or value is None or isinstance(value, bool):
            key.append((name, str(value)))
        elif isinstance(value, int):
            kind = "one" if value == 1 else "sixteens" if value % 16 == 0 else "int"
            key.append((name, None if name in whatever else kind, abs(value) >= 2**31))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)
