"""What a target forward costs, learned from the run's own step times: no table, no calibration pass."""

from __future__ import annotations

from collections import deque

import numpy as np

_SAMPLES = 15  # per size; their median shrugs off outliers and follows a machine that slows down
_TRUST = 3.0  # samples at which a size's own median and the fitted line weigh the same
_PRIOR_DOUBLING_TOKENS = 64.0  # before any evidence: this many more tokens double a forward's time
_PRIOR_WEIGHT = 0.05


class CostModel:
    """Seconds of a forward over `num_tokens` packed tokens.

    Sizes are bucketed finely when small and by eighths of an octave beyond. The prediction blends a bucket's median with
    a line fitted through all buckets, so that steps in the true cost (kernel choices, captured graph sizes) show where
    they have been seen and everything else is interpolated.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._line: tuple[float, float] | None = None
        self._table = np.zeros(0)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """One forward of `num_tokens` took `seconds`."""
        size = _bucket(num_tokens)
        self._samples.setdefault(size, deque(maxlen=_SAMPLES)).append(seconds)
        self._line = None

    def predict(self, max_tokens: int) -> np.ndarray | None:
        """Seconds of forwards over 0, 1, ... `max_tokens` tokens: float64 `[max_tokens + 1]`; None without evidence."""
        if not self._samples:
            return None
        if self._line is None:
            self._fit()
        if len(self._table) <= max_tokens:
            self._tabulate(max_tokens)
        return self._table[: max_tokens + 1]

    def _fit(self) -> None:
        size = np.array(list(self._samples), dtype=np.float64)
        weight = np.array([len(samples) for samples in self._samples.values()], dtype=np.float64)
        median = np.array([np.median(samples) for samples in self._samples.values()])
        mean_size, mean = np.average(size, weights=weight), np.average(median, weights=weight)
        prior_slope = mean / (mean_size + _PRIOR_DOUBLING_TOKENS)
        centred = size - mean_size
        # A ridge towards the prior slope: it decides while only one size has been seen and fades as sizes spread.
        ridge = _PRIOR_WEIGHT * (mean_size + 1) ** 2
        slope = (weight @ (centred * (median - mean)) + ridge * prior_slope) / (weight @ centred**2 + ridge)
        slope = min(max(slope, 0.0), mean / max(mean_size, 1.0))
        self._line = (mean - slope * mean_size, slope)
        self._table = np.zeros(0)

    def _tabulate(self, max_tokens: int) -> None:
        assert self._line is not None
        intercept, slope = self._line
        max_tokens = max(max_tokens, *self._samples)
        sizes = np.arange(max_tokens + 1)
        table = intercept + slope * sizes
        seen = np.full(max_tokens + 1, np.inf)
        for bucket, samples in self._samples.items():
            where = slice(bucket, bucket + _width(bucket))
            trust = len(samples) / (len(samples) + _TRUST)
            ratio = float(np.median(samples)) / (intercept + slope * bucket)
            table[where] *= 1 + trust * (ratio - 1)
            seen[where] = table[where]
        # More tokens are never cheaper: neither may a guess exceed what more tokens were seen to cost, nor a noisy bucket
        # fall below what fewer did.
        table = np.minimum(table, np.where(np.isinf(seen), np.minimum.accumulate(seen[::-1])[::-1], np.inf))
        self._table = np.maximum.accumulate(np.maximum(table, 1e-9))


def _bucket(num_tokens: int) -> int:
    """The smallest size of the bucket: exact below 16, then eighths of an octave."""
    return num_tokens // _width(num_tokens) * _width(num_tokens)


def _width(num_tokens: int) -> int:
    """Sizes in the bucket of `num_tokens`."""
    return 1 if num_tokens < 16 else 1 << (num_tokens.bit_length() - 4)
