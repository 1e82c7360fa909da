"""Truncates rows of logits by top-k, then top-p, then min-p: excluded tokens get `-inf`.

The number and the probabilities of the kept tokens are those of `transformers.generate`, which leaves the choice among
equal tokens to an unstable sort. With l = logits / T and m the largest l:

    top-k   keeps l >= the k-th largest l, so every token that equals the k-th
    top-p   sorts the remaining tokens in ascending order, equal ones by id, and drops from the beginning while the sum
            of probabilities is <= 1 - top_p; so of equal tokens at the boundary the highest ids stay, and the last
            token always stays
    min-p   drops tokens of less than `min_p` times the largest probability

**The same set everywhere.** Sums of rounded numbers depend on their order, and exponentials on the library. Here the
weight of a token is about `2**40 exp(l - m)`, rounded down, by a polynomial in integers (`truncate_reference.weights`),
and sums are integers. So the kernel keeps exactly the tokens that the reference keeps. Both keep what float64 sums
would keep, unless a sum is within some 1e-7 of the boundary; the float32 sums of `transformers` have rounding errors of
that size.

A row that is no distribution (a NaN, an infinite logit, no token allowed) loses no token, so that the sampler notices
it.
"""

from __future__ import annotations

import math

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.rows import LOGIT_DTYPES
from atlas_kernels.truncate_reference import truncate_reference
from atlas_kernels.truncation import Truncation


def truncate(
    logits: torch.Tensor,
    truncation: Truncation,
    *,
    temperature: float = 1.0,
    out: torch.Tensor | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Divide by the temperature, and set excluded tokens to `-inf`. Does not read from the device.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab]`; `-inf` for excluded tokens. Unchanged, unless it is `out`.
        truncation: Which tokens are kept.
        temperature: `> 0`.
        out: float32 `[rows, vocab]`, receives the result; may be `logits`. None makes one.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Returns:
        `out`: float32 `[rows, vocab]`.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits must be float32, bfloat16 or float16 [rows, vocab], got {logits.dtype} {list(logits.shape)}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}: greedy rows are not truncated")
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if out.shape != logits.shape or out.dtype != torch.float32 or out.device != logits.device or out.stride(1) != 1:
        raise ValueError(
            f"out must be float32 {list(logits.shape)} on {logits.device} with rows in one piece, "
            f"got {out.dtype} {list(out.shape)} on {out.device} with strides {out.stride()}"
        )
    if use_triton(logits, implementation):
        from atlas_kernels.truncate_triton import truncate_triton

        return truncate_triton(logits, truncation, temperature, out)
    return truncate_reference(logits, truncation, temperature, out)
