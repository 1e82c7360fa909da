"""Panels about drafting: share and acceptance of drafters, acceptance by position, entropy, calibration."""

from __future__ import annotations

from collections.abc import Sequence

from atlas_rl.report.page.figures import (
    GREY,
    Figure,
    Panel,
    bars,
    color_of,
    layout,
    line,
    names_axis,
    over_steps,
    whole_ticks,
    whose,
)
from atlas_rl.report.page.reading import Run
from atlas_rl.report.page.speed import known_points, steps_of
from atlas_rl.report.report import StepReport

_ENOUGH_DRAFTS = 20  # verified drafts at a position that are needed to show its acceptance
_ENOUGH_PER_POINT = 10


def speculators(runs: Sequence[Run]) -> Panel:
    """Which drafters drafted, and how much was accepted."""
    sentence = "Which speculator drafted, and how many of its verified draft tokens were the policy's own choice."
    drafting = [run for run in runs if run.total.drafted]
    if not drafting:
        return Panel("speculators", "Who drafted", sentence, absent="Speculation was off.")
    rows, accepted, refused = [], [], []
    for run in drafting:
        total = run.total
        for name, drafted in total.drafted.items():
            rate = f" ({total.accepted[name] / drafted:.0%})" if drafted else ""
            rows.append(f"{whose(run, drafting, ': ')}{name}{rate}")
            accepted.append(total.accepted[name])
            refused.append(drafted - total.accepted[name])
    data = [bars("accepted", accepted, rows, color_of(2)), bars("not accepted", refused, rows, GREY)]
    axes = layout("verified draft tokens", "", barmode="stack", legend={"traceorder": "normal"})
    axes["yaxis"] = names_axis()
    parts = [Figure(data, axes, "Over the whole run", 130 + 34 * len(rows))]
    return Panel("speculators", "Who drafted", sentence, (*parts, *(_over_steps(run, drafting) for run in drafting)))


def _over_steps(run: Run, drafting: Sequence[Run]) -> Figure:
    data = []
    reports = run.points
    names = list(dict.fromkeys(name for report in reports for name in report.drafted))
    for name in names:
        rates = [
            r.accepted[name] / r.drafted[name] if r.drafted.get(name, 0) >= _ENOUGH_PER_POINT else None for r in reports
        ]
        data.append(line(name, steps_of(reports), rates, _color(name, reports), mode="lines+markers"))
    axes = over_steps([run], "accepted share")
    axes["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    caption = f"{whose(run, drafting, ': ')}Accepted share over steps, of {_ENOUGH_PER_POINT} draft tokens at least"
    return Figure(data, axes, caption)


def _color(drafter: str, reports: Sequence[StepReport]) -> str:
    """The colour of a drafter, the same in every chart of a run."""
    names = dict.fromkeys(name for report in reports for name in (*report.drafted, *report.calibration_error))
    return color_of(list(names).index(drafter))


def by_position(runs: Sequence[Run]) -> Panel:
    """Acceptance at each draft position."""
    sentence = (
        "Accepted share of the draft tokens verified at each position; those behind a refused one count as refused."
    )
    data = []
    for i, run in enumerate(runs):
        total = run.total
        counts = list(zip(total.accepted_by_position, total.drafted_by_position, strict=True))
        shown = [(n + 1, a / d, d) for n, (a, d) in enumerate(counts) if d >= _ENOUGH_DRAFTS]
        if shown:
            position, rate, drafted = zip(*shown, strict=True)
            hover = "position %{x}: %{y:.0%} of %{customdata:,}"
            more = {"customdata": list(drafted), "hovertemplate": hover, "mode": "lines+markers"}
            data.append(line(run.name, position, rate, color_of(i), **more))
    if not data:
        reason = f"No draft position was verified {_ENOUGH_DRAFTS} times."
        return Panel("by-position", "Acceptance by position", sentence, absent=reason)
    axes = layout("position in the draft", "accepted share")
    axes["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    axes["xaxis"] |= whole_ticks(1, max(map(len, (trace["x"] for trace in data))))
    return Panel("by-position", "Acceptance by position", sentence, (Figure(data, axes),))


def entropy(runs: Sequence[Run]) -> Panel:
    """Entropy of the policy over steps."""
    sentence = "Mean entropy of the distributions that tokens were drawn from: as it falls, drafts are easier to guess."
    data = []
    for i, run in enumerate(runs):
        reports = known_points(run, "entropy")
        if reports:
            data.append(line(run.name, steps_of(reports), [r.entropy for r in reports], color_of(i)))
    if not data:
        return Panel("entropy", "Entropy", sentence, absent="The engine did not measure it.")
    return Panel("entropy", "Entropy", sentence, (Figure(data, over_steps(runs, "nats per token")),))


def calibration(runs: Sequence[Run]) -> Panel:
    """Errors of the controller's acceptance estimates."""
    sentence = (
        "Expected calibration error: how far the acceptance that the controller expected was from what came, by speculator. "
        "0 is exact; a large one means that the controller drafts too much or too little."
    )
    parts = []
    for run in runs:
        data = []
        reports = run.points
        names = list(dict.fromkeys(name for report in reports for name in report.calibration_error))
        for name in names:
            errors = [report.calibration_error.get(name) for report in reports]
            data.append(line(name, steps_of(reports), errors, _color(name, reports), mode="lines+markers"))
        if data:
            parts.append(Figure(data, over_steps([run], "error of the share"), whose(run, runs, "")))
    absent = "" if parts else "No draft was scored against an estimate."
    return Panel("calibration", "Calibration of the controller", sentence, tuple(parts), absent)
