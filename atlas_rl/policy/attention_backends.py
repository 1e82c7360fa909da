"""Keeps torch's attention off cuDNN in generation; all other kernels may run.

From torch 2.11 on, `scaled_dot_product_attention` goes to cuDNN first on Hopper and Blackwell. cuDNN makes a plan for every
shape that it has not met, while everybody waits: 43 ms with a mask on an H100 (measured). A decode step has keys of a
length that no step had before, so that it would plan every time. The others plan nothing.

Which kernels may run is a switch of the process; torch has none for a thread. Another thread may run attention meanwhile,
and it may turn switches itself, so:

- The engine's own attention (`attend`) turns the switch for one call of a layer at a time, which costs a few microseconds.
  What another thread starts within that call may go to another kernel than cuDNN's; it then differs by rounding, as it would
  from one release of torch to the next, and never fails: there is always a kernel left that takes every input. Turned for a
  whole forward, the switch would do this to every layer of a trainer's thread.
- The policy's own attention is only reached around its forward (`without_cudnn`), as the audit and the probe run it, a few
  times per call.
- What the caller forbids stays forbidden: of the kernels that are on, cuDNN's goes off. Only where that would leave none
  that takes every input (torch's math), the others go on.
- Put back is what was turned, and only as far as nobody turned it since.
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
