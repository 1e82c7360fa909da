"""The eager reference of `truncate`: sorted rows, with every weight as an integer."""

from __future__ import annotations

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.truncation import Truncation

# (1 - 2**-f) / f for f in [0, 1], alternating in sign, as multiples of 2**-31: 2**-f is right within 3e-9, and never rises.
COEFFICIENTS = (1488522236, 515882469, 119193747, 20652244, 2856024, 319744, 24275)
FRACTION_BITS = 24
STEPS_PER_NAT = 2**FRACTION_BITS * 1.4426950408889634
"""Distances from the largest logit are counted in `2**-24` of a halving, rounded down."""
MOST_STEPS = 41 * 2**FRACTION_BITS
"""From here on a token weighs nothing."""
_DESCENDING = COEFFICIENTS[::-1]
_FRACTION_MASK, _FRACTION_SHIFT = 2**FRACTION_BITS - 1, 31 - FRACTION_BITS


def truncate_reference(
    logits: torch.Tensor, truncation: Truncation, temperature: float, out: torch.Tensor
) -> torch.Tensor:
    """`out`; arguments as in `atlas_kernels.truncate.truncate`."""
    scaled = logits.float()
    if temperature != 1:
        # Division by a tensor stays a division; on CUDA, by a Python number it becomes a multiplication by its
        # reciprocal.
        scaled = scaled / torch.tensor(temperature, dtype=torch.float32, device=logits.device)
    peak = scaled.amax(dim=-1, keepdim=True)
    dropped = torch.zeros_like(scaled, dtype=torch.bool)
    weight = (
        weights(scaled, peak)
        if truncation.top_p < 1 or truncation.min_p > 0
        else torch.empty(0, dtype=torch.float32, device="cpu")
    )
    if 0 < truncation.top_k < scaled.shape[1]:
        dropped = scaled < scaled.topk(truncation.top_k, dim=-1).values[:, -1:]
        weight = weight.masked_fill(dropped, 0) if len(weight) else weight
    if truncation.top_p < 1:
        order = scaled.sort(dim=-1, stable=True).indices
        sums = weight.gather(1, order).cumsum(dim=-1)
        below = sums <= share_of(sums[:, -1:], truncation.dropped_share)
        dropped = dropped | below.scatter(1, order, below)
    if truncation.min_p > 0:
        dropped = dropped | (weight >> 9 < truncation.least_share)
    return out.copy_(scaled.masked_fill(dropped & peak.isfinite(), float("-inf")))


def weights(x: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """About `2**40 exp(x - peak)`, rounded down: int64, like float32 `x`. Only `x - peak` and its scaling round."""
    steps = ((peak - x) * STEPS_PER_NAT).clamp(max=MOST_STEPS).nan_to_num(MOST_STEPS).int()
    if steps.device.type == "cpu":
        return torch.from_numpy(_weights_of(steps.numpy().reshape(-1))).view(steps.shape)
    steps = steps.long()
    fraction = (steps & (2**FRACTION_BITS - 1)) << (31 - FRACTION_BITS)
    series = torch.full_like(fraction, COEFFICIENTS[-1])
    for coefficient in reversed(COEFFICIENTS[:-1]):
        series = coefficient - (fraction * series >> 31)
    return (2**31 - (fraction * series >> 31) << 9) >> (steps >> FRACTION_BITS)


@cached_njit(nogil=True)
def _weights_of(steps):
    """`weights` of int32 `[n]`, compiled: as some twenty integer operations of torch it took longer than the sort."""
    out = np.empty(len(steps), np.int64)
    for index in range(len(steps)):
        step = np.int64(steps[index])
        fraction = (step & _FRACTION_MASK) << _FRACTION_SHIFT
        series = np.int64(0)
        for coefficient in _DESCENDING:
            series = coefficient - (fraction * series >> 31)
        out[index] = ((2147483648 - (fraction * series >> 31)) << 9) >> (step >> FRACTION_BITS)
    return out


def share_of(total: torch.Tensor, share: int) -> torch.Tensor:
    """`floor(total * share / 2**31)` of int64 numbers below `2**62`, without overflow."""
    low = total & (2**31 - 1)
    return (total >> 31) * share + (low * share >> 31)
