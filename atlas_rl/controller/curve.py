"""The curve of seconds over tokens: a line through the medians of all sizes, and how far each size is off it."""

from __future__ import annotations

import math

import numpy as np

_PRIOR_DOUBLING_TOKENS = 64.0  # before any evidence: this many more tokens double a forward's time
_PRIOR_WEIGHT = 0.05  # weight of that slope in the fit


def rising(values: list[float], weights: list[float]) -> np.ndarray:
    """The nearest non-decreasing sequence, by weighted least squares of the logarithms (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        mean, count = math.log(max(value, 1e-9)), 1
        while pools and pools[-1][0] > mean:
            other, other_weight, members = pools.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, count = weight + other_weight, count + members
        pools.append((mean, weight, count))
    return np.exp(np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools]))


def line_through(size: np.ndarray, median: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Intercept and slope of seconds as a linear function of tokens."""
    total = weight.sum()
    mean_size, mean = float(weight @ size / total), float(weight @ median / total)
    prior_slope = mean / (mean_size + _PRIOR_DOUBLING_TOKENS)
    centred = size - mean_size
    # A ridge towards the prior slope: it decides until a second size is seen, and fades as sizes spread.
    ridge = _PRIOR_WEIGHT * (mean_size + 1) ** 2
    slope = float((weight @ (centred * (median - mean)) + ridge * prior_slope) / (weight @ centred**2 + ridge))
    slope = min(max(slope, 0.0), mean / max(mean_size, 1.0))
    return mean - slope * mean_size, slope


def off_the_line(size: np.ndarray, off: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """Relative distances of sizes from their line, float64 `[n]`, smoothed: costs are a curve, not a line.

    The fewer forwards of a size were seen, the more it follows the sizes around it, and these the line.
    """
    own, around = trust * off, np.zeros(len(off))
    if len(off) > 2:
        share = (size[1:-1] - size[:-2]) / (size[2:] - size[:-2])
        around[1:-1] = (1 - share) * own[:-2] + share * own[2:]
    return own + (1 - trust) * around
