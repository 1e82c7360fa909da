"""`scaled_dot_product_attention`: computed by the CPU, recorded as the backend that CUDA would take."""

from __future__ import annotations

from typing import Any

import torch

from tests.pretend_cuda.operations import Operations
from tests.pretend_cuda.tensors import MIXED, CudaTensor, plain, unpretended

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_KERNELS = {"cudnn": 1, "flash": 1, "efficient": 1, "math": 7}


def backend_of(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, *, cudnn: bool) -> str:
    """What an H100 takes: `cudnn`, `flash`, `efficient` or `math`.

    By the checks of torch's `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (2.13) for dense tensors without dropout:
    cuDNN and flash want half precision, flash no mask; efficient attention takes float32 and masks. `sdpa_kernel(...)` and
    `torch.backends.cuda.enable_..._sdp` are followed.
    """
    enabled = torch.backends.cuda
    half, dim = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if cudnn and enabled.cudnn_sdp_enabled() and half and dim % 8 == 0 and dim <= 128 and key.shape[-2] > 1:
        return "cudnn"
    if enabled.flash_sdp_enabled() and half and mask is None and dim <= 256:
        return "flash"
    efficient = enabled.mem_efficient_sdp_enabled() and dim % (8 if half else 4) == 0
    return "efficient" if efficient else "math"


def attend(device: Operations, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of it."""
    if not isinstance(args[0], CudaTensor):
        return func(*args, **kwargs)
    named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    tensors = [named[name] for name in _ARGUMENTS[:4] if named.get(name) is not None]
    if not all(isinstance(tensor, CudaTensor) for tensor in tensors):
        raise RuntimeError(MIXED.format("scaled_dot_product_attention"))
    _autocast(device, named)
    query, key, mask = named["query"], named["key"], named.get("attn_mask")
    backend = backend_of(query, key, mask, cudnn=device.cudnn_attention)
    if backend == "cudnn":  # plans are kept by layout
        layout = tuple((tuple(tensor.shape), tensor.inner.stride()) for tensor in tensors)
        device.record.build("cuDNN attention", ("cudnn", layout, bool(named.get("is_causal"))))
    kernels = _KERNELS[backend]
    if mask is not None and mask.dtype == torch.bool:
        kernels += 2  # a float mask is made of it: a fill and a masked fill, in every call
    if mask is not None and backend == "efficient" and mask.shape[-1] % 16:
        kernels += 2  # and padded to a multiple of 16: a fill and a copy
    device.record.event("launch", f"sdpa {backend}", count=kernels)
    with device.made_here(False), unpretended():
        return CudaTensor(func(**plain(named)))


def _autocast(device: Operations, named: dict[str, Any]) -> None:
    """Cast what autocast casts: whole caches, if they are not in its type."""
    if not torch.is_autocast_enabled("cpu"):
        return
    dtype = torch.get_autocast_dtype("cpu")
    for name in _ARGUMENTS[:3]:
        if named[name].dtype != dtype:
            device.record.event("launch", "sdpa autocast", num_bytes=named[name].inner.nbytes)
            named[name] = CudaTensor(named[name].inner.to(dtype))
