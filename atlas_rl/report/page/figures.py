"""Parts of a page: panels, figures in plotly's JSON, and tables. Does not load plotly.

Colours of text and grid are the page's: they follow the reader's light or dark scheme (`page.js`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from atlas_rl.report.page.reading import Run
from atlas_rl.report.page.thinning import groups
from atlas_rl.report.report import StepReport

COLORS = ("#3b82c4", "#d9822b", "#2f9e77", "#c0569b", "#8a6fd1", "#a8892c", "#d1495b", "#4aa8b5", "#7d8590", "#6b8e23")
"""Readable on white and on near-black."""
GREY = "#8b929c"
_FEW_POINTS = 40  # lines of up to this many points show them
_FEW_TICKS = 12
_ENTRY_PX, _LETTER_PX, _ROW_PX = 45, 7, 19  # size of a legend: mark of an entry, letter, row


@dataclass(frozen=True)
class Figure:
    """A chart: traces and layout of plotly, with an optional caption."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str = ""
    height_px: int = 300


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """One section of the page.

    Attributes:
        key: Its anchor.
        title: Two or three words.
        sentence: Explains what it shows.
        parts: Its figures and tables.
        absent: Why there is nothing to show; empty if there is something.
    """

    key: str
    title: str
    sentence: str
    parts: tuple[Figure | Table, ...] = ()
    absent: str = ""


def height_px(figure: Figure, width_px: int) -> int:
    """Height of a figure whose legend gets `width_px`: legend rows beyond the second do not shrink the chart."""
    longest = max(len(trace.get("name", "")) for trace in figure.data)
    columns = max(1, width_px // (_ENTRY_PX + _LETTER_PX * longest))
    rows = -(-len(figure.data) // columns)
    return figure.height_px + _ROW_PX * max(0, rows - 2)


def color_of(index: int) -> str:
    """The colour of the index-th run or drafter."""
    return COLORS[index % len(COLORS)]


def having(steps: Iterable[StepReport], *names: str) -> list[StepReport]:
    """The steps in which all of these figures are known."""
    return [report for report in steps if all(getattr(report, name) is not None for name in names)]


def pale(color: str) -> str:
    """A pale form of a colour of `COLORS`, for overlapping areas."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def line(name: str, x: Sequence[Any], y: Sequence[Any], color: str, **more: Any) -> dict[str, Any]:
    """A line over steps, with markers if there are few points."""
    mode = "lines+markers" if len(x) <= _FEW_POINTS else "lines"
    trace = {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y)}
    return trace | {"line": {"color": color, "width": 2}, "marker": {"color": color, "size": 5}} | more


def dots(name: str, x: Sequence[Any], y: Sequence[Any], color: str, **more: Any) -> dict[str, Any]:
    """Single points."""
    marker = {"color": color, "size": 9, "symbol": "diamond"}
    return {"type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y), "marker": marker} | more


def bars(name: str, x: Sequence[Any], y: Sequence[Any], color: str, **more: Any) -> dict[str, Any]:
    """Horizontal bars of length `x`, one for every name in `y`."""
    trace = {"type": "bar", "orientation": "h", "name": name, "x": list(x), "y": list(y)}
    return trace | {"marker": {"color": color}} | more


def layout(x_title: str, y_title: str, **more: Any) -> dict[str, Any]:
    """Axes with titles; y starts at zero, because most figures here are amounts."""
    axes = {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}, "rangemode": "tozero"}}
    return axes | more


def over_steps(runs: Sequence[Run], y_title: str, **more: Any) -> dict[str, Any]:
    """Step axes of runs; few steps get a tick each, and none between them."""
    title = {"train": "training step", "standalone": "call", "eval": "evaluation at step"}[runs[0].mode]
    sizes = {len(groups(run.steps)[0]) for run in runs}
    per_point = f" ({'up to ' if len(sizes) > 1 else ''}{max(sizes)} per point)" if max(sizes) > 1 else ""
    axes = layout(title + per_point, y_title, **more)
    numbers = [report.step for run in runs for report in run.steps]
    axes["xaxis"] |= whole_ticks(min(numbers), max(numbers))
    return axes


def names_axis() -> dict[str, Any]:
    """An axis of names, the first at the top. Without it plotly reads names such as 2026-11-26 as dates."""
    return {"type": "category", "automargin": True, "autorange": "reversed"}


def whole_ticks(least: int, most: int) -> dict[str, Any]:
    """Part of an axis of whole numbers, equal for all figures even if some lack numbers."""
    margin = max(0.5, 0.03 * (most - least))
    axis = {"tickformat": "d", "range": [least - margin, most + margin]}
    return axis | {"dtick": 1} if most - least <= _FEW_TICKS else axis


def mark(y: float) -> dict[str, Any]:
    """Layout of a dotted horizontal line."""
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    return {"shapes": [shape | {"line": {"color": GREY, "width": 1.5, "dash": "dot"}}]}


def whose(run: Run, runs: Sequence[Run], after: str = ", ") -> str:
    """The run's name as a prefix; empty if there is only one run."""
    return f"{run.name}{after}" if len(runs) > 1 else ""
