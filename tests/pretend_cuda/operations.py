"""One operation of torch, below autograd: computed on the CPU, checked and recorded as CUDA would have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from atlas_rl.policy.varlen import Packing, reference
from tests.pretend_cuda.graphs import Graphs
from tests.pretend_cuda.record import Record
from tests.pretend_cuda.tensors import MIXED, CudaTensor, mapped, plain, tensors_in

_aten = torch.ops.aten
_INDICES = "indices should be either on cpu or on the same device as the indexed tensor (cpu)"

_SYNCING = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.equal,
    _aten.is_nonzero,
    _aten.bincount,
    _aten.multinomial,
}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_}
_FREE = {
    _aten.empty,
    _aten.empty_strided,
    _aten.empty_like,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten._unsafe_view,
    _aten._reshape_alias,
    _aten.lift_fresh,
    _aten.lift,
    _aten._local_scalar_dense,
    _aten.scalar_tensor,
    _aten.set_,
    _aten.resize_,
    _aten._fused_sdp_choice,
}
# Kernels of operations that start more than one: sorts are radix passes, `topk` of a long row is a search and a gather.
_TOGETHER = {_aten.cat: 128, _aten._foreach_copy_: 64}  # tensors of a list that one launch takes
_KERNELS = {_aten.sort: 6, _aten.topk: 3, _aten.cumsum: 2, _aten.nonzero: 3, _aten._unique2: 8, _aten.cummin: 2}


class Pinned:
    """Pinned memory, and views of it: known by its storage, which is kept so that no other takes its address."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` of the host, which is pinned from now on."""
        self._kept[torch.Tensor.untyped_storage(tensor).data_ptr()] = tensor
        return tensor

    def __contains__(self, tensor: object) -> bool:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, CudaTensor):
            return False
        return torch.Tensor.untyped_storage(tensor).data_ptr() in self._kept


class Operations:
    """Runs operations below autograd.

    Args:
        record: Where events go.
        cudnn_attention: Whether attention in half precision goes to cuDNN first.
    """

    def __init__(self, record: Record, *, cudnn_attention: bool) -> None:
        self.record, self.cudnn_attention = record, cudnn_attention
        self.pinned = Pinned()
        self.graphs = Graphs(record)
        self._tags = [False]  # whether tensors that C++ makes on its own, inside the call at hand, are on the device

    @contextmanager
    def made_here(self, on_device: bool) -> Iterator[None]:
        """Inside, tensors that C++ makes on its own are on the device, or not."""
        self._tags.append(on_device)
        try:
            yield
        finally:
            self._tags.pop()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation."""
        packet, asked = func.overloadpacket, kwargs.get("device")
        tensors = list(tensors_in((args, kwargs)))
        on_device = [value for value in tensors if isinstance(value, CudaTensor)]
        if not on_device and (tensors or not self._tags[-1]):
            return func(*args, **kwargs)
        self._check(packet, args, tensors)
        out = self.graphs.run(partial(_OF_CUDA_ALONE.get(packet, func), *plain(args), **plain(kwargs)), packet)
        if packet is _aten.copy_:
            return self._copied(args)
        if packet is _aten._to_copy and asked is not None and asked.type == "cpu" and not self._tags[-1]:
            self.record.event("d2h", "to(cpu)", num_bytes=on_device[0].inner.nbytes)
            return out
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self._launched(packet, args, out, view)
        wrapped = _wrapping(on_device)
        if view and on_device and not on_device[0].is_inference():  # inference mode makes no inference tensor of a view
            with torch.inference_mode(False):
                return mapped(out, wrapped)
        return mapped(out, wrapped)

    def _check(self, packet: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        """Raise where torch would for want of one device; note what it copies by itself, and where it waits."""
        if packet is _aten.copy_:
            return
        if packet in _INDEXED:
            self._check_indexed(packet, args)
            return
        if any(not isinstance(value, CudaTensor) and value.dim() for value in tensors):
            raise RuntimeError(MIXED.format(packet))
        if packet in _SYNCING:
            self.record.event("sync", str(packet).removeprefix("aten."))
        if packet is _aten.histc and args[2:3] == args[3:4]:
            self.record.event("sync", "histc without bounds")
        if packet is _aten.repeat_interleave and len(args) == 1:
            self.record.event("sync", "repeat_interleave without output_size")

    def _check_indexed(self, packet: Any, args: Any) -> None:
        target, indices = args[0], [index for index in args[1] if index is not None]
        if not isinstance(target, CudaTensor):
            if any(isinstance(index, CudaTensor) for index in indices):
                raise RuntimeError(_INDICES)
            raise RuntimeError(MIXED.format(packet))  # values on the device for a tensor of the host
        for index in indices:
            if not isinstance(index, CudaTensor):
                self.record.event("h2d", "index of the host", num_bytes=index.nbytes)
            elif index.dtype in (torch.bool, torch.uint8) and not _fills(packet, args):
                self.record.event("sync", "index by a mask")
        if len(args) > 2 and not isinstance(args[2], CudaTensor):
            if args[2].dim():
                raise RuntimeError(MIXED.format(packet))
            self.record.event("h2d", "value of the host", num_bytes=args[2].nbytes)

    def _copied(self, args: Any) -> torch.Tensor:
        target, source = args[0], args[1]
        asked = len(args) > 2 and bool(args[2])
        if isinstance(target, CudaTensor) and (isinstance(source, CudaTensor) or not source.dim()):
            self.record.event("launch", "copy_")  # of one number of the host: a fill
        elif isinstance(target, CudaTensor):
            kind = "h2d_async" if asked and source in self.pinned else "h2d"
            self.record.event(kind, "copy_", num_bytes=source.nbytes)
        else:
            kind = "d2h_async" if asked and target in self.pinned else "d2h"
            self.record.event(kind, "copy_", num_bytes=source.nbytes)
        return target

    def _launched(self, packet: Any, args: Any, out: Any, view: bool) -> None:
        if view or packet in _FREE:
            return
        if packet is _aten._to_copy and isinstance(out, torch.Tensor) and not out.numel():
            return
        if packet is _aten._to_copy and getattr(args[0], "_is_param", False):
            self.record.event("launch", "cast of a weight", num_bytes=args[0].nbytes)
            return
        together = _TOGETHER.get(packet)
        kernels = -(-len(args[0]) // together) if together else _KERNELS.get(packet, 1)
        self.record.event("launch", str(packet).removeprefix("aten."), count=kernels)


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_starts: torch.Tensor, key_starts: torch.Tensor,
    max_queries: int, max_keys: int, dropout: float, causal: bool, debug: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What no CPU has: by the reference of `atlas_rl.policy.varlen`."""
    assert seqused_k is not None, "sequences whose keys end where the next ones begin"
    assert key.shape == value.shape, "values of another size than keys"
    assert causal or window_size_right == 0 or max_queries == 1, "attention to later tokens"
    packing = Packing(query_starts, key_starts, seqused_k, max_queries, max_keys)
    window = None if window_size_left is None else window_size_left + 1
    return *reference(query, key[None], value[None], packing, scale, window), *(query.new_zeros(0) for _ in range(3))


def _histc(values: torch.Tensor, *bounds: int) -> torch.Tensor:
    """A CPU counts no integers."""
    return torch.histc(values.float(), *bounds).to(values.dtype)


_OF_CUDA_ALONE: dict[Any, Callable[..., Any]] = {
    _aten._flash_attention_forward: _flash_attention,
    _aten.histc: _histc,
}


def _wrapping(on_device: list[CudaTensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes device tensors of results; what an operation changed in place stays the tensor that it was."""
    own = {id(value.inner): value for value in on_device}

    def wrapped(value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, CudaTensor):
            return value
        known = own.get(id(value))
        return CudaTensor(value) if known is None else known

    return wrapped


def _fills(packet: Any, args: Any) -> bool:
    """Whether torch makes `x[mask] = one value` a `masked_fill`, which does not wait."""
    return packet in (_aten.index_put_, _aten._index_put_impl_, _aten.index_put) and args[2].numel() == 1
