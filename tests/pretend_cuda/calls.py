"""Calls of torch's Python interface that say where a tensor is, or where one goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.pretend_cuda.attention import attend
from tests.pretend_cuda.operations import Operations
from tests.pretend_cuda.tensors import CUDA, CudaTensor, plain, tensors_in, unpretended

_CPU = torch.device("cpu")
_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}

# Functions of torch that are written in Python, inside of which calls are of interest again.
IN_PYTHON: set[Any] = {torch.Tensor.__array__}


def call(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special(device, func, args, kwargs)
    if kwargs.get("pin_memory") and kwargs.get("device") in (None, "cpu", _CPU):
        return device.pinned.add(func(*args, **{name: v for name, v in kwargs.items() if name != "pin_memory"}))
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == "cuda":
        return _made(device, func, args, kwargs | {"device": "cpu"})
    on_device = asked is None and any(isinstance(v, CudaTensor) for v in tensors_in((args, kwargs)))
    with device.made_here(on_device):
        return func(*args, **kwargs)


def _made(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a factory makes on the device; what it made of host values was copied there."""
    with device.made_here(False):
        out = device.graphs.run(partial(func, *plain(args), **plain(kwargs)))
    if func in (torch.tensor, torch.as_tensor, torch.asarray):
        device.record.event("h2d", func.__name__, num_bytes=out.nbytes)
    elif func not in _EMPTY:
        device.record.event("launch", getattr(func, "__name__", str(func)))
    return CudaTensor(out, out.requires_grad)


def _moved(
    device: Operations, tensor: torch.Tensor, target: Any, dtype: Any, non_blocking: bool, copy: bool
) -> torch.Tensor:
    """`tensor.to(...)`."""
    here = isinstance(tensor, CudaTensor)
    there = here if target is None else target.type == "cuda"
    if here and there:
        return tensor if dtype in (None, tensor.dtype) and not copy else _converted(tensor, dtype)
    if not here and not there:
        return tensor if dtype in (None, tensor.dtype) and not copy else _converted(tensor, dtype)
    source = tensor.inner if isinstance(tensor, CudaTensor) else tensor.detach()
    with unpretended():
        made = source.to(dtype=dtype or source.dtype, copy=True)
    if there:
        pinned = non_blocking and tensor in device.pinned
        device.record.event("h2d_async" if pinned else "h2d", "to(cuda)", num_bytes=made.nbytes)
        if dtype is not None and dtype != tensor.dtype:
            device.record.event("launch", "_to_copy")
        return CudaTensor(made, tensor.requires_grad and tensor.is_leaf)
    device.record.event("d2h_async" if non_blocking else "d2h", "to(cpu)", num_bytes=made.nbytes)
    return device.pinned.add(made) if non_blocking else made  # torch makes the target pinned


def _converted(tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    """A copy where the tensor is, through autograd and dispatch."""
    return torch.Tensor.clone(tensor) if dtype in (None, tensor.dtype) else torch.ops.aten._to_copy(tensor, dtype=dtype)


def _to(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    copy = bool(kwargs.pop("copy", False))
    rest = args[1:]
    if rest and isinstance(rest[0], torch.Tensor):
        target = CUDA if isinstance(rest[0], CudaTensor) else _CPU
        return _moved(device, args[0], target, rest[0].dtype, False, copy)
    target, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **kwargs)
    return _moved(device, args[0], target, dtype, non_blocking, copy)


def _cuda(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _moved(device, args[0], CUDA, None, bool(kwargs.get("non_blocking")), False)


def _cpu(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _moved(device, args[0], _CPU, None, False, False)


def _numpy(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], CudaTensor):
        raise TypeError(_NUMPY)
    return func(*args, **kwargs)


def _tolist(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], CudaTensor):
        return func(*args, **kwargs)
    device.record.event("d2h", "tolist", num_bytes=args[0].inner.nbytes)
    with unpretended():
        return args[0].inner.tolist()


def _data_get(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return CudaTensor(args[0].inner) if isinstance(args[0], CudaTensor) else func(*args, **kwargs)


def _data_set(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, value = args
    if isinstance(target, CudaTensor) != isinstance(value, CudaTensor):
        raise RuntimeError(
            "incompatible tensor type: `x.data = y` needs both on one device; use PretendCuda.move(module)"
        )
    func(*args, **kwargs)
    if isinstance(target, CudaTensor):
        target.inner = value.inner


def _pin(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], CudaTensor):
        raise RuntimeError("cannot pin 'CUDAFloatType': only dense CPU tensors can be pinned")
    return args[0] if args[0] in device.pinned else device.pinned.add(args[0].clone())


def _is_pinned(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] in device.pinned


def _rms_norm(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One kernel on CUDA (`_fused_rms_norm`), some of torch's own on a CPU."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    learned = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if learned or not all(isinstance(tensor, CudaTensor) for tensor in tensors):
        return func(*args, **kwargs)
    device.record.event("launch", "rms_norm")
    with unpretended():
        return CudaTensor(device.graphs.run(partial(func, *plain(args), **plain(kwargs))))


def _new_tensor(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    like, asked = args[0], kwargs.get("device")
    there = isinstance(like, CudaTensor) if asked is None else torch.device(asked).type == "cuda"
    if not there:
        return func(*plain(args), **plain(kwargs))
    return _made(device, torch.tensor, (args[1],), {"dtype": kwargs.get("dtype") or like.dtype})


def _as_tensor(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if isinstance(args[0], CudaTensor):
        return _moved(device, args[0], asked, kwargs.get("dtype"), False, False)
    if asked is not None and asked.type == "cuda":
        return _made(device, func, args, kwargs | {"device": "cpu"})
    return func(*args, **kwargs)


def _storage(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0].inner if isinstance(args[0], CudaTensor) else args[0])


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.tolist: _tolist,
    torch._C.TensorBase.pin_memory: _pin,
    torch.Tensor.is_pinned: _is_pinned,
    torch.Tensor.new_tensor: _new_tensor,
    torch.as_tensor: _as_tensor,
    torch.Tensor.untyped_storage: _storage,
    torch.Tensor.data_ptr: _storage,
    torch.Tensor.data.__get__: _data_get,  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: _data_set,  # type: ignore[attr-defined]
    torch.nn.functional.scaled_dot_product_attention: attend,
    torch.nn.functional.rms_norm: _rms_norm,
}
