"""Truncates rows of logits by top-k, then top-p, then min-p: tokens outside get `-inf`.

As many tokens are kept as by `transformers.generate`, and as likely ones; among equal ones it leaves the choice to a sort
that is not stable. With l = logits / T and m the largest l:

    top-k   keeps l >= the k-th largest l, so every token that is equal to the k-th
    top-p   puts what is left in ascending order, equal tokens by their ids, and drops from its beginning as long as the sum
            of probabilities is <= 1 - top_p; so of equal tokens at the boundary the highest ids stay. The last one stays
    min-p   drops tokens of less than `min_p` times the largest probability

**One set, whoever computes it.** Sums of rounded numbers depend on their order, and exponentials on the library. Here a
token weighs about `2**40 exp(l - m)`, rounded down, by a polynomial in integers (`truncate_reference.weights`), and sums are
integers. So the kernel keeps exactly the tokens that the reference keeps. Both keep what float64 sums keep, unless a sum
comes within some 1e-7 of the boundary; `transformers` rounds its float32 sums by as much.

A row that is no distribution (a NaN, an infinite logit, no token allowed) loses no token, so that whoever draws notices it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.rows import LOGIT_DTYPES
from atlas_kernels.truncate_reference import truncate_reference

SHARE_BITS = 31
"""Probabilities are compared as multiples of `2**-31`."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens of a distribution are kept.

    Attributes:
        top_k: Most tokens, but for those that are equal to the last one; 0 keeps all.
        top_p: Least share of the probability, in (0, 1]; 1 keeps all tokens.
        min_p: Least probability, as a share in [0, 1] of the largest; 0 keeps all.

    Raises:
        ValueError: A number is outside its range.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps every token), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1] (0 keeps every token), got {self.min_p}")

    @property
    def dropped_share(self) -> int:
        """`1 - top_p`, as a multiple of `2**-31` that is below 1."""
        return min(round((1 - self.top_p) * 2**SHARE_BITS), 2**SHARE_BITS - 1)

    @property
    def least_share(self) -> int:
        """`min_p`, likewise, rounded up."""
        return min(math.ceil(self.min_p * 2**SHARE_BITS), 2**SHARE_BITS - 1)


def truncate(
    logits: torch.Tensor,
    truncation: Truncation,
    *,
    temperature: float = 1.0,
    out: torch.Tensor | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Divide by the temperature, and set what is not kept to `-inf`. Reads nothing back from the device.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab]`; `-inf` for excluded tokens. Unchanged, unless it is `out`.
        truncation: What is kept.
        temperature: `> 0`.
        out: float32 `[rows, vocab]`, what is written; may be `logits`. None makes one.
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
