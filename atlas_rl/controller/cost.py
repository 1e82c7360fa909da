"""Estimates the seconds of forwards and drafts from the run's own step times, without a calibration pass."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.curve import line_through, off_the_line, rising
from atlas_rl.controller.step_sizes import StepSizes

_Depth = TypeVar("_Depth", float, np.ndarray)

_SAMPLES = 15  # latest samples per size: their median ignores outliers and follows a machine that slows down
_TRUST = 3.0  # samples at which the median of a size, or octave, weighs as much as the fit through all of them
_CONTEXT_DOUBT = 2000.0  # context tokens: evidence spread this wide weighs as much as the prior "context is free"
_CONTEXT_FADES = 0.995  # share of that evidence kept at each forward
_OUTLIER = 0.2  # bound on a forward's relative distance from its size's mean, when learning the context's cost
_INTERRUPTED = 2.0  # bound on measured over expected seconds of a forward, either way
_KNOWN = 8  # samples of a size from which on it is used to measure the machine's level
_LEVEL_FORWARDS = 9  # latest forwards, of any size, whose median of measured over expected is the machine's level
_MEAN_FADES = 0.98  # share kept at each forward of the sums that `mean_over_median` is the ratio of
_DRAFTS = 12  # latest calls of a drafter, per octave of rows, that its cost is fitted to
_PRIOR_CALLS = 0.03  # weight of the prior "proportional to the depth", in calls
_MEASURED = 3  # forwards of a size after which its cost counts as measured: their median ignores one outlier
_ABOUT = 1.1  # bound on the ratio of two costs that are about the same
_SLOW = 4.0  # bound on a call's seconds per draft position, relative to the usual ones

OCTAVES = 32
"""Octaves of rows."""
TICK_S = 1e-9
"""Least seconds of anything: a coarse clock may measure 0."""


class CostModel:
    """Estimates seconds of a forward from its packed tokens and the cached tokens of all their requests.

    Sizes are bucketed (`StepSizes`). A prediction blends the bucket's median with a line fitted through all buckets:
    hidden steps in the true cost (kernel choices) show in buckets that were seen, and everything else is interpolated.
    If forwards are padded, the line is over the padded tokens, so predictions are a staircase.

    Two factors multiply that table, the same for all sizes. One is the cost of reading the context, fitted to the
    differences between forwards of one size. The other is the machine's level, which follows the latest forwards of any
    size. A decision compares sizes: if the machine slows down, or the context grows, sizes seen lately must not look
    dearer than those seen before.

    Args:
        padded: Sizes that forwards are padded to, rising; empty if forwards are not padded.

    Attributes:
        num_observed: Forwards observed so far.
        edges: `padded` as int64 `[n]`, for compiled decisions.
    """

    def __init__(self, padded: Sequence[int] = ()) -> None:
        self._step_sizes = StepSizes(padded)
        self.edges = self._step_sizes.edges
        self._samples: dict[int, deque[float]] = {}  # per bucket: seconds divided by both factors
        self._sizes: list[int] = []  # buckets of the samples, rising
        self._means: dict[int, tuple[float, float]] = {}  # per bucket: running mean of seconds and of context
        self._covariance, self._variance = 0.0, 0.0  # of context and relative seconds, within buckets
        self._ratios: deque[float] = deque(maxlen=_LEVEL_FORWARDS)
        self._level = 1.0
        self._measured_s, self._expected_s = 0.0, 0.0  # of the latest forwards of known sizes, older ones fading
        self.num_observed = 0
        self._table = np.zeros(0)
        self._counted: dict[int, int] = {}  # what `num_samples` found since the latest forward

    @property
    def padded(self) -> tuple[int, ...]:
        """Sizes that forwards are padded to."""
        return self._step_sizes.padded

    def observe(self, num_tokens: int, seconds: float, context_tokens: int = 0) -> None:
        """One forward of `num_tokens` over a cache of `context_tokens` took `seconds`."""
        size, seconds = self._step_sizes.bucket(num_tokens), max(seconds, TICK_S)
        self._learn_context(size, seconds, context_tokens)
        scaled = seconds / self._factor(context_tokens)
        expected = float(self._predicted(size)[size]) if self.num_observed else scaled
        if size not in self._samples:
            self._samples[size] = deque(maxlen=_SAMPLES)
            insort(self._sizes, size)
        samples = self._samples[size]
        # New sizes too: one interrupted forward would make them look dear, and they would never be tried again. If a
        # size is really dear, its next forwards show it.
        scaled = min(scaled, expected * _INTERRUPTED)
        if len(samples) >= _KNOWN:
            scaled = max(scaled, expected / _INTERRUPTED)
            self._measured_s = _MEAN_FADES * self._measured_s + scaled
            self._expected_s = _MEAN_FADES * self._expected_s + expected
            self._ratios.append(self._level * scaled / expected)
            self._level = _median(self._ratios)
        samples.append(scaled)
        self.num_observed += 1
        self._counted.clear()
        if len(samples) <= _KNOWN or _due(self.num_observed, 4):
            # Here and not in `predict`: learning runs beside the device, decisions do not.
            self._tabulate(max(len(self._table) - 1, size))

    def predict(self, max_tokens: int, context_tokens: int = 0) -> np.ndarray | None:
        """Seconds of forwards over 0, 1, ... `max_tokens` tokens: float64 `[max_tokens + 1]`; None without evidence."""
        if not self._samples:
            return None
        return self._predicted(max_tokens) * self._factor(context_tokens)

    def seconds(self, num_tokens: int, context_tokens: int = 0) -> float | None:
        """`predict` for one size."""
        if not self._samples:
            return None
        return float(self._predicted(num_tokens)[num_tokens]) * self._factor(context_tokens)

    def tables(self, max_tokens: int, context_tokens: int) -> tuple[np.ndarray, float]:
        """`predict` as a table of at least `max_tokens + 1` sizes and a factor on it, for compiled decisions.

        Requires evidence.
        """
        if len(self._table) <= max_tokens:
            self._tabulate(max_tokens)
        return self._table, self._factor(context_tokens)

    def num_samples(self, num_tokens: int) -> int:
        """Number of remembered forwards that are padded to the same size, or within a tenth of it."""
        if num_tokens not in self._counted:
            self._counted[num_tokens] = self._count(num_tokens)
        return self._counted[num_tokens]

    def _count(self, num_tokens: int) -> int:
        """`num_samples`, counted anew."""
        if self.padded and num_tokens <= self.padded[-1]:
            return len(self._samples.get(self._step_sizes.bucket(num_tokens), ()))
        near = slice(bisect_left(self._sizes, 0.9 * num_tokens), bisect_right(self._sizes, 1.1 * num_tokens))
        return sum([len(self._samples[size]) for size in self._sizes[near]])

    @property
    def mean_over_median(self) -> float:
        """Mean seconds of the latest forwards over what was predicted for them; 1 before any was.

        Predictions are medians. They rank sizes well, but a sum of many forwards also contains the interrupted ones.
        """
        return self._measured_s / self._expected_s if self._expected_s else 1.0

    def knows(self, num_tokens: int) -> bool:
        """Whether the prediction for this size was measured: at it, or at sizes around it with about equal cost.

        More tokens of one kind never cost less, so the cost of a size lies between those of its neighbours.
        """
        measured = self._measured_like(num_tokens)
        below = [size for size in measured if size <= num_tokens]
        above = [size for size in measured if self._step_sizes.end(size) > num_tokens]
        if not below or not above:
            return False
        table = self._predicted(above[0])
        return bool(table[above[0]] <= _ABOUT * table[below[-1]])

    def _measured_like(self, num_tokens: int) -> list[int]:
        """Buckets whose cost counts as measured, rising: padded ones if `num_tokens` are padded, else the others.

        Padded forwards and unpadded ones run in different ways, so neither kind bounds the other.
        """
        beyond = bisect_right(self._sizes, self._step_sizes.last)
        sizes = self._sizes[:beyond] if num_tokens <= self._step_sizes.last else self._sizes[beyond:]
        return [size for size in sizes if len(self._samples[size]) >= _MEASURED]

    def _predicted(self, max_tokens: int) -> np.ndarray:
        if len(self._table) <= max_tokens:
            self._tabulate(max_tokens)
        return self._table[: max_tokens + 1]

    def _factor(self, context_tokens: int) -> float:
        """Factor on the whole table, for the context and the machine's present speed."""
        if self._covariance <= 0:
            return self._level
        return self._level * (1 + self._covariance / (self._variance + _CONTEXT_DOUBT**2) * context_tokens)

    def _learn_context(self, size: int, seconds: float, context_tokens: int) -> None:
        known, context = self._means.get(size, (seconds, float(context_tokens)))
        off = min(max(seconds / known - 1, -_OUTLIER), _OUTLIER)
        deviation = context_tokens - context
        self._covariance = _CONTEXT_FADES * self._covariance + off * deviation
        self._variance = _CONTEXT_FADES * self._variance + deviation**2
        self._means[size] = known * (1 + 0.1 * off), context + 0.1 * deviation

    def _tabulate(self, max_tokens: int) -> None:
        max_tokens = max(max_tokens, self._sizes[-1])
        run, beyond = self._step_sizes.run(max_tokens), self._step_sizes.last + 1
        self._table = np.empty(max_tokens + 1)
        for begin, end in ((0, min(beyond, max_tokens + 1)), (beyond, max_tokens + 1)):
            if begin < end:
                self._table[begin:end] = self._tabulated(begin, end, run)

    def _tabulated(self, begin: int, end: int, run: np.ndarray) -> np.ndarray:
        """Seconds of forwards over `begin`, ... `end - 1` tokens, all of them padded or none: float64 `[end - begin]`.

        More tokens of one kind are never cheaper. If they seem so, a forward was interrupted: weigh by samples. But the
        first sizes that are not padded may be cheaper than the last ones that are, because they run in another way.
        """
        sizes = [size for size in self._sizes if begin <= size < end]
        known = sizes if len(sizes) > 1 else self._sizes  # one size makes no line
        weight = np.array([len(self._samples[size]) for size in known], np.float64)
        median = rising([_median(self._samples[size]) for size in known], weight.tolist())
        intercept, slope = line_through(run[known].astype(np.float64), median, weight)
        line = intercept + slope * run
        off = off_the_line(run[known].astype(np.float64), median / line[known] - 1, weight / (weight + _TRUST))
        table = (line * (1 + np.interp(run, run[known], off)))[begin:end]
        seen = np.full(end - begin, np.inf)
        for size, own in zip(known, off, strict=True):
            if begin <= size < end:
                where = slice(size, self._step_sizes.end(size))
                inside = slice(size - begin, self._step_sizes.end(size) - begin)
                seen[inside] = table[inside] = (line * (1 + own))[where][: end - size]
        # An interpolated size must not cost more than a larger one that was measured.
        table = np.minimum(table, np.where(np.isinf(seen), np.minimum.accumulate(seen[::-1])[::-1], np.inf))
        never_cheaper: np.ndarray = np.maximum.accumulate(np.maximum(table, TICK_S))
        return never_cheaper


class CostModels:
    """A cost model for each list of sizes that forwards are padded to. None is lost while another one is in use."""

    def __init__(self) -> None:
        self._models: dict[tuple[int, ...], CostModel] = {}

    def of(self, padded: Sequence[int] = ()) -> CostModel:
        """The model of forwards that are padded to these sizes, rising; empty if they are not padded."""
        return self._models.setdefault(tuple(padded), CostModel(padded))


class DraftCost:
    """Estimates seconds of a drafter's call: `a + b * depth + c * rows * depth + d * backlog`.

    `rows` are the requests that it drafts for, `backlog` the committed tokens that it has to process first. The four
    coefficients are never negative. They are fitted to the latest calls of every octave of rows by least squares of
    relative errors, robust to outliers. A ridge pulls them towards "proportional to the depth", which decides until
    other inputs vary. Every octave also has a level, the median of measured over fitted seconds, shrunk towards 1 while
    its calls are few: they may be older or newer than those of other octaves.
    """

    def __init__(self) -> None:
        self._calls: dict[int, deque[tuple[int, int, int, float]]] = {}  # by octave of rows
        self._observed, self._held = 0, 0
        self._shares = np.zeros(0)
        self._levels = np.zeros(0)  # by octave of rows, each from the nearest observed octave

    def __len__(self) -> int:
        return self._held

    @property
    def octaves(self) -> list[int]:
        """Octaves of rows (their bit lengths) of the observed calls."""
        return list(self._calls)

    def knows(self, rows: int) -> bool:
        """Whether a call for about this many requests was observed: in the same octave or an adjacent one."""
        octave = rows.bit_length()
        return any(near in self._calls for near in (octave - 1, octave, octave + 1))

    def observe(self, rows: int, depth: int, seconds: float, backlog: int = 0) -> None:
        """Record a call that took `seconds`."""
        calls = self._calls.setdefault(rows.bit_length(), deque(maxlen=_DRAFTS))
        self._held += len(calls) < _DRAFTS
        calls.append((rows, max(depth, 1), backlog, max(seconds, TICK_S)))
        self._observed += 1
        if _due(self._observed, 8):
            self._fit()

    def predict(self, rows: int, depth: _Depth, backlog: int = 0) -> _Depth:
        """Seconds of a call, for one depth or several: float, or float64 `[n]`.

        Args:
            rows: Requests that it drafts for.
            depth: Draft tokens per request, a float or float64 `[n]`.
            backlog: Committed tokens that it has to process first.

        Raises:
            ValueError: Before any call was observed.
        """
        if not self._calls:
            raise ValueError("no call was observed yet")
        fixed, per_depth, per_token, per_backlog = self._shares.tolist()
        level = float(self._levels[rows.bit_length()])
        return level * (fixed + per_backlog * backlog + (per_depth + per_token * rows) * depth)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs of `drafts_s`: the four coefficients, and the level of each octave of rows."""
        return self._shares, self._levels

    def _fit(self) -> None:
        rows, depth, backlog, seconds = np.array([call for calls in self._calls.values() for call in calls]).T
        per_depth = _median(seconds / depth)
        seconds = np.minimum(seconds, _SLOW * per_depth * depth)  # a call may have compiled, or been interrupted
        features = np.stack([np.ones_like(depth), depth, rows * depth, backlog], axis=1) / seconds[:, None]
        scale = np.maximum(features.mean(axis=0), 1e-9)
        features = features / scale
        prior = np.array([0.0, per_depth, 0.0, 0.0]) * scale
        weight, shares = np.ones_like(seconds), prior
        ends = np.cumsum([len(calls) for calls in self._calls.values()])[:-1]
        for _ in range(4):  # reweighted: calls far from the fit of their octave weigh less in the next round
            weighted = features * weight[:, None]
            shares = _not_negative(weighted.T @ features, weighted.sum(axis=0), prior)
            rest = np.split(1 - features @ shares, ends)
            off = np.abs(np.concatenate([part - _median(part) for part in rest]))
            weight = 1 / (1 + (off / (2 * _median(off) + 1e-3)) ** 2)
        over = np.split(1 / np.maximum(features @ shares, 1e-3), ends)
        levels = {
            octave: _median(part) ** (len(part) / (len(part) + _TRUST))
            for octave, part in zip(self._calls, over, strict=True)
        }
        self._levels = np.array([levels[min(levels, key=lambda known: abs(known - own))] for own in range(OCTAVES)])
        self._shares = shares / scale


@cached_njit(nogil=True)
def drafts_s(shares: np.ndarray, levels: np.ndarray, rows: int, depth: int, backlog: int) -> float:
    """Seconds of a call, from `DraftCost.tables()`; compiled form of `DraftCost.predict`.

    Args:
        shares: float64 `[4]`.
        levels: float64 `[octaves]`.
        rows: Requests that it drafts for.
        depth: Draft tokens per request.
        backlog: Committed tokens that it has to process first.
    """
    octave = 0
    while rows >> octave > 0:
        octave += 1
    seconds: float = levels[octave] * (shares[0] + shares[3] * backlog + (shares[1] + shares[2] * rows) * depth)
    return seconds


def _not_negative(gram: np.ndarray, moment: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Least squares with a ridge towards `prior`; drops the most negative coefficient until none is negative."""
    shares, kept = np.zeros(len(prior)), np.arange(len(prior))
    while len(kept):
        square = gram[np.ix_(kept, kept)] + _PRIOR_CALLS * np.eye(len(kept))
        found = np.linalg.solve(square, moment[kept] + _PRIOR_CALLS * prior[kept])
        if (found >= 0).all():
            shares[kept] = found
            break
        kept = np.delete(kept, found.argmin())
    return shares


def _due(num_observed: int, every: int) -> bool:
    """Whether to fit again: always at first, later at every `every`-th observation, because fits take time."""
    return num_observed < 16 or num_observed % every == 0


def _median(values: Iterable[float]) -> float:
    """Median of a few numbers; numpy's takes ten times as long."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])
