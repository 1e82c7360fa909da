"""Tests whether cuDNN attention makes a new plan for every key length, the reason to keep it out of decoding."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

OWN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BACKENDS = {"default": None, "without cuDNN": OWN, "cuDNN": [SDPBackend.CUDNN_ATTENTION]}


def rows(batch: int = 8, queries: int = 2, first: int = 300, lengths: int = 12) -> list[dict[str, Any]]:
    """Milliseconds of attention at new key lengths and at repeated ones, masked as in a decode step."""
    found = []
    for name, backends in BACKENDS.items():
        for kind in ("masked", "plain"):
            first_ms, again_ms = [], []
            kernel = ""
            for length in range(first, first + lengths):
                query = torch.randn(batch, 8, queries, 128, device="cuda", dtype=torch.bfloat16)
                # Views of a larger cache, as in the engine.
                keys, values = (torch.randn(batch, 8, 1024, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
                mask = torch.rand(batch, 1, queries, length, device="cuda") < 0.9 if kind == "masked" else None

                def attend(query=query, keys=keys, values=values, mask=mask, length=length) -> Any:
                    return scaled_dot_product_attention(
                        query, keys[:, :, :length], values[:, :, :length], attn_mask=mask
                    )

                def timed(attend=attend, backends=backends) -> float:
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    if backends is None:
                        attend()
                    else:
                        with sdpa_kernel(backends):
                            attend()
                    torch.cuda.synchronize()
                    return 1e3 * (time.perf_counter() - began)

                try:
                    first_ms.append(timed())
                    again_ms.append(float(np.median([timed() for _ in range(5)])))
                except RuntimeError as error:  # this backend does not support these arguments
                    kernel = str(error).splitlines()[0][:100]
                    break
            if not kernel:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    timed()
                names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
                kernel = max(names, key=len)[:100]
            found.append(
                {
                    "backends": name,
                    "mask": kind == "masked",
                    "torch_prefers": kernel,
                    "first_ms": float(np.median(first_ms[1:])) if first_ms else None,
                    "first_ms_all": first_ms,
                    "again_ms": float(np.median(again_ms)) if again_ms else None,
                }
            )
    return found
