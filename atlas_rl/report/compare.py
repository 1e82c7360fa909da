"""Compares two runs' figures, with their noise.

A figure of a run is one sum over its steps divided by another, such as tokens by seconds. Its noise is estimated by
resampling the run's steps: a bootstrap over blocks of neighbouring steps, because neighbours resemble each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from atlas_rl.report.page.reading import Run, read_runs
from atlas_rl.report.page.words import counted
from atlas_rl.report.report import StepReport
from atlas_rl.report.sinks import markdown

_ENOUGH_STEPS = 5  # fewest steps for an interval
_RESAMPLES = 2_000
_NONE = "-"
Terms = tuple[float, float]
"""What a step adds to numerator and denominator of a figure."""
Interval = tuple[float, float]
"""Lower and upper end."""


@dataclass(frozen=True)
class Comparison:
    """One figure of two runs; unknown values are None.

    Attributes:
        label: Name and unit.
        values: The value of each run, over all its steps.
        spreads: For each run, the 10th and 90th percentile of the values of single steps.
        ratio: Second run over first.
        interval: 95% interval of the ratio; None if a run has fewer than five steps with the figure.
    """

    label: str
    values: tuple[float | None, float | None]
    spreads: tuple[Interval | None, Interval | None]
    ratio: float | None
    interval: Interval | None


def compare(first: Sequence[StepReport], second: Sequence[StepReport], *, seed: int = 0) -> list[Comparison]:
    """Compare the figures that at least one of two runs has.

    Runs of the same steps are resampled together, so that whatever makes a step slow in both, such as its prompts, is
    not counted as noise of the ratio.

    Args:
        first: Steps of the run in the denominator, at least one.
        second: Steps of the run in the numerator.
        seed: Seed of the bootstrap.
    """
    found = []
    for label, part in FIGURES.items():
        runs = [[(report.step, both) for report in of if (both := part(report)) is not None] for of in (first, second)]
        if not any(runs):
            continue
        sums = [np.array([both for _, both in run], np.float64).reshape(-1, 2) for run in runs]
        values = [_ratio(*of.sum(0)) for of in sums]
        paired = [step for step, _ in runs[0]] == [step for step, _ in runs[1]]
        ratio = None if None in values else _ratio(values[1] or 0.0, values[0] or 0.0)
        interval = _interval(sums[0], sums[1], paired, seed) if ratio is not None else None
        found.append(Comparison(label, (values[0], values[1]), (_spread(sums[0]), _spread(sums[1])), ratio, interval))
    return found


def table(first: Run, second: Run, *, skip: int = 0) -> str:
    """The comparison as text.

    Args:
        first: The run in the denominator.
        second: The run in the numerator.
        skip: Steps to leave out at the start of both.

    Raises:
        ValueError: A run has no more steps than `skip`.
    """
    for run in (first, second):
        if len(run.steps) <= skip:
            raise ValueError(
                f"{run.name} has {counted(len(run.steps), 'step')} and --skip leaves out {skip}: skip fewer"
            )
    rows = [["", first.name, "its steps", second.name, "its steps", "ratio", "95% interval"]]
    for row in compare(first.steps[skip:], second.steps[skip:]):
        sides = [
            cell for pair in zip(row.values, row.spreads, strict=True) for cell in (_number(pair[0]), _range(pair[1]))
        ]
        ratio = _NONE if row.ratio is None else f"{_times(row.ratio, 2)}x"
        # Three decimals show whether an interval contains 1.
        interval = _NONE if row.interval is None else " to ".join(_times(end, 3) for end in row.interval)
        rows.append([row.label, *sides, ratio, interval])
    counts = f"{len(first.steps) - skip:,} and {counted(len(second.steps) - skip, 'step')}"
    foot = (
        f"{counts}. 'its steps': from the 10th to the 90th percentile of single steps. An interval that holds 1 is no "
        "difference; it knows the noise within these runs, not that of another seed or machine."
    )
    return f"{markdown(rows)}\n\n{foot}"


def run_command(args: argparse.Namespace) -> None:
    """Print the comparison of `args.first` and `args.second`.

    Raises:
        ValueError: A path holds no run or several, or `--skip` leaves no steps.
        OSError: A file cannot be read.
    """
    if args.skip < 0:
        raise ValueError(f"--skip is a number of steps, got {args.skip}")
    runs = read_runs([args.first, args.second])
    if len(runs) != 2:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"these are {len(runs)} runs ({names}): name two files of one run each")
    print(table(*runs, skip=args.skip))
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")


def _drafts(report: StepReport) -> Terms | None:
    return (sum(report.accepted.values()), sum(report.drafted.values())) if report.speculation else None


def _of(numerator: float | None, denominator: float | None) -> Terms | None:
    return None if numerator is None or denominator is None else (numerator, denominator)


def _baseline(report: StepReport) -> Terms | None:
    return (
        (report.num_tokens / report.baseline_tokens_per_s, report.generate_s) if report.baseline_tokens_per_s else None
    )


def _entropy(report: StepReport) -> Terms | None:
    scored = report.num_scored_tokens
    return None if report.entropy is None else (report.entropy * scored, scored)


FIGURES: dict[str, Callable[[StepReport], Terms | None]] = {
    "tokens/s": lambda report: (report.num_tokens, report.generate_s),
    "generation, s per step": lambda report: (report.generate_s, 1.0),
    "training step, s": lambda report: _of(report.step_s, 1.0),
    "rollout's share of the step": lambda report: _of(report.generate_s, report.step_s),
    "gain, measured": _baseline,
    "gain, estimated": lambda report: _of(report.no_speculation_s, report.generate_s),
    "accepted length": lambda report: (report.num_decoded_tokens, report.num_request_forwards),
    "drafts accepted, share": _drafts,
    "entropy, nats per token": _entropy,
    "completion length, tokens": lambda report: (report.num_tokens, report.num_requests),
}
"""By label, what a step adds to a figure's two sums; None where the step does not know."""


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _spread(sums: np.ndarray) -> Interval | None:
    own = sums[sums[:, 1] != 0]
    if len(own) < 2:
        return None
    low, high = np.quantile(own[:, 0] / own[:, 1], [0.1, 0.9])
    return float(low), float(high)


def _interval(first: np.ndarray, second: np.ndarray, paired: bool, seed: int) -> Interval | None:
    if min(len(first), len(second)) < _ENOUGH_STEPS:
        return None
    random = np.random.default_rng(seed)
    starts = _drawn(random, len(first))
    again = starts if paired else _drawn(random, len(second))
    below, above = _sums_of_blocks(first, starts), _sums_of_blocks(second, again)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (above[:, 0] / above[:, 1]) / (below[:, 0] / below[:, 1])
    known = ratios[np.isfinite(ratios)]
    if len(known) < _RESAMPLES // 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _drawn(random: np.random.Generator, num_steps: int) -> np.ndarray:
    """First steps `[resamples, blocks]` of circular blocks that together cover at least `num_steps` steps."""
    return random.integers(num_steps, size=(_RESAMPLES, -(-num_steps // _block_size(num_steps))))


def _block_size(num_steps: int) -> int:
    return max(1, round(num_steps ** (1 / 3)))


def _sums_of_blocks(sums: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums `[resamples, 2]` over blocks of steps; the last block is cut so that all have as many steps as `sums`."""
    num_steps, size = len(sums), _block_size(len(sums))
    up_to = np.concatenate([np.zeros((1, 2)), np.cumsum(np.concatenate([sums, sums[:size]]), axis=0)])

    def block(first: np.ndarray, length: int) -> np.ndarray:
        return up_to[first + length] - up_to[first]

    whole = block(starts[:, :-1], size).sum(1)
    return whole + block(starts[:, -1], num_steps - size * (starts.shape[1] - 1))


def _times(value: float, digits: int) -> str:
    """A ratio as text; small ones keep three digits."""
    return f"{value:.{digits}f}" if value >= 0.1 else f"{value:.3g}"


def _number(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _range(ends: Interval | None) -> str:
    return _NONE if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"
