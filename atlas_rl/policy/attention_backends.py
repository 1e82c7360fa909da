"""Keeps torch's attention off cuDNN in generation; all other kernels may run.

From torch 2.11 on, `scaled_dot_product_attention` prefers cuDNN on Hopper and Blackwell. cuDNN makes a plan for every
new shape while the host waits: 43 ms with a mask on an H100 (measured). The key length changes in every decode step, so
cuDNN would plan in every step. The other kernels need no plan.

torch enables kernels per process, not per thread. Other threads may run attention or change these switches at the same
time, so:

- The engine's own attention (`attend`) changes the switch for one layer call at a time, which costs a few microseconds.
  Attention that another thread starts during that call may run on another kernel than cuDNN's. Its result then differs
  by rounding, as between releases of torch. It never fails, because a kernel that takes every input stays enabled. A
  switch changed for a whole forward would affect every layer of a trainer's thread.
- For the policy's own attention the switch can only be changed around its forward (`without_cudnn`). The audit and the
  probe do this, a few times per call.
- Kernels that the caller disabled stay disabled, and cuDNN is disabled as well. If this leaves no kernel that takes
  every input (torch's math), the others are enabled.
- Afterwards the changed switches are restored, unless somebody else has changed them since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.functional import scaled_dot_product_attention

_cuda = torch.backends.cuda
_OTHERS: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    grouped: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by any kernel but cuDNN's."""
    with without_cudnn() if query.device.type == "cuda" else nullcontext():
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Context in which no attention of this process uses cuDNN."""
    if not _cuda.cudnn_sdp_enabled():
        yield
        return
    off = [] if _cuda.math_sdp_enabled() else [put for is_on, put in _OTHERS if not is_on()]
    try:
        for put in off:
            put(True)
        _cuda.enable_cudnn_sdp(False)
        yield
    finally:
        if not _cuda.cudnn_sdp_enabled() and _cuda.math_sdp_enabled():
            _cuda.enable_cudnn_sdp(True)
            for put in off:
                put(False)
