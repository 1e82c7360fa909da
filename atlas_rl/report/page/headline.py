"""The top of the page: each run's main figures and verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atlas_rl.report.page.figures import Table
from atlas_rl.report.page.reading import Run
from atlas_rl.report.page.totals import Totals, totals
from atlas_rl.report.page.verdict import verdict
from atlas_rl.report.page.words import amount, counted

_NONE = "–"


@dataclass(frozen=True)
class Headline:
    """A run's name, its tiles (label, value, remark), its verdict and its notes."""

    name: str
    tiles: tuple[tuple[str, str, str], ...]
    verdict: tuple[str, ...]
    notes: tuple[str, ...]


def headline(run: Run) -> Headline:
    """The headline of one run."""
    figures = totals(run.steps)
    tiles = tuple((label, form(figures), remark(figures)) for label, form, remark in _ROWS)
    return Headline(run.name, tiles, tuple(verdict(run.steps)), run.notes)


def side_by_side(runs: Sequence[Run]) -> Table:
    """The headline figures of several runs, a column each."""
    figures = [totals(run.steps) for run in runs]
    rows = [(label, *(form(of) for of in figures)) for label, form, _ in _ROWS]
    return Table(("", *(run.name for run in runs)), rows)


def ratio(value: float | None) -> str:
    """A ratio as text."""
    return _NONE if value is None else f"{value:.2f}×"


def share(value: float | None) -> str:
    """A share as text."""
    return _NONE if value is None else f"{value:.0%}"


def _of_steps(count: int, run: Totals) -> str:
    return f"{count:,} of {counted(run.num_steps, 'step')}" if count else "no step has one"


_ROWS: tuple[tuple[str, Callable[[Totals], str], Callable[[Totals], str]], ...] = (
    ("tokens/s", lambda run: amount(run.all.tokens_per_s), lambda run: f"{run.all.num_tokens:,} tokens"),
    ("gain, measured", lambda run: ratio(run.measured), lambda run: _of_steps(run.num_measured, run)),
    ("gain, estimated", lambda run: ratio(run.estimated), lambda run: _of_steps(run.num_estimated, run)),
    (
        "accepted length",
        lambda run: f"{run.all.accepted_length:.2f}" if run.all.speculation else _NONE,
        lambda run: "tokens per forward and request" if run.all.speculation else "speculation was off",
    ),
    (
        "drafts accepted",
        lambda run: share(run.all.acceptance_rate),
        lambda run: f"{sum(run.all.drafted.values()):,} drafted",
    ),
    ("rollout's share", lambda run: share(run.generation_share), lambda run: "of the training step"),
    (
        "Amdahl bound",
        lambda run: ratio(run.amdahl_bound if run.all.speculation else None),
        lambda run: "of the step, at this length",
    ),
    (
        "entropy",
        lambda run: _NONE if run.all.entropy is None else f"{run.all.entropy:.2f}",
        lambda run: "nats per token",
    ),
    ("steps", lambda run: f"{run.num_steps:,}", lambda run: f"{amount(run.all.generate_s)} s of generation"),
    ("warnings", lambda run: f"{len(run.all.warnings):,}", lambda run: "each counted once"),
)
