"""Panels about speed: tokens/s, gain, accepted length, seconds, and the long tail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atlas_rl.report.page.figures import (
    GREY,
    Figure,
    Panel,
    Table,
    bars,
    color_of,
    dots,
    having,
    layout,
    line,
    mark,
    names_axis,
    over_steps,
    pale,
    whose,
)
from atlas_rl.report.page.reading import Run
from atlas_rl.report.page.thinning import groups
from atlas_rl.report.page.totals import phase_s, phases_of
from atlas_rl.report.page.words import amount
from atlas_rl.report.report import StepReport
from atlas_rl.report.sums import concatenate

PHASE_COLORS = {
    "prefill": "#8a6fd1",
    "draft": "#d9822b",
    "forward": "#3b82c4",
    "sample": "#4aa8b5",
    "commit": "#6b8e23",
    "controller": "#d1495b",
    "observe": "#a8892c",
    "refresh": "#c0569b",
    "sync": "#2f9e77",
    "audit": "#9c755f",
    "other": GREY,
}
_USUAL_SHARE, _SPIKE = 0.95, 3.0  # share of steps that sets the height; factor above it that is cut off
_REST = "rest of step"


def accepted_length(runs: Sequence[Run]) -> Panel:
    """Accepted length over steps."""
    sentence = (
        "Tokens that one forward of the policy committed per request; 1 (dotted) is decoding without speculation."
    )
    drafting = [(i, run) for i, run in enumerate(runs) if run.total.speculation]
    if not drafting:
        return Panel("accepted-length", "Accepted length", sentence, absent="Speculation was off.")
    data = []
    for i, run in drafting:
        reports = run.points
        data.append(line(run.name, steps_of(reports), [r.accepted_length for r in reports], color_of(i)))
    axes = over_steps(runs, "tokens", **mark(1))
    axes["yaxis"]["rangemode"] = "normal"
    return Panel("accepted-length", "Accepted length", sentence, (Figure(data, axes),))


def tokens_per_s(runs: Sequence[Run]) -> Panel:
    """Tokens/s over steps, beside those without speculation."""
    sentence = (
        "Generated tokens per second of generation. Dashed: the estimate for the same step without speculation. "
        "Diamonds: measured reruns without it."
    )
    data = []
    for i, run in enumerate(runs):
        reports, color = run.points, color_of(i)
        data.append(line(run.name, steps_of(reports), [r.tokens_per_s for r in reports], color))
        estimated = known_points(run, "no_speculation_s")
        if estimated:
            values = [r.no_speculation_tokens_per_s for r in estimated]
            name, style = f"{whose(run, runs)}no speculation (est.)", {"color": color, "width": 1.5, "dash": "dash"}
            data.append(line(name, steps_of(estimated), values, color, line=style, mode="lines"))
        measured = known_points(run, "baseline_tokens_per_s")
        if measured:
            values = [r.baseline_tokens_per_s for r in measured]
            data.append(dots(f"{whose(run, runs)}no speculation (measured)", steps_of(measured), values, color))
    return Panel("tokens-per-s", "Tokens per second", sentence, (Figure(data, over_steps(runs, "tokens/s")),))


def gain(runs: Sequence[Run]) -> Panel:
    """Gain over no speculation over steps."""
    sentence = "Tokens per second over those without speculation: above 1 (dotted) speculation paid in that step."
    data = []
    for i, run in enumerate(runs):
        estimated = known_points(run, "speedup_estimate")
        if estimated:
            values = [r.speedup_estimate for r in estimated]
            data.append(line(f"{whose(run, runs)}estimated", steps_of(estimated), values, color_of(i)))
        measured = known_points(run, "speedup_measured")
        if measured:
            values = [r.speedup_measured for r in measured]
            data.append(dots(f"{whose(run, runs)}measured", steps_of(measured), values, color_of(i)))
    if not data:
        reason = (
            "No step has an estimate, as speculation was off or the run has just begun, and none was rerun without it."
        )
        return Panel("gain", "Gain over no speculation", sentence, absent=reason)
    axes = over_steps(runs, "gain", **mark(1))
    axes["yaxis"]["rangemode"] = "normal"
    return Panel("gain", "Gain over no speculation", sentence, (Figure(data, axes),))


def seconds(runs: Sequence[Run]) -> Panel:
    """Seconds by phase: per token over the run, and per step."""
    sentence = "Where every second of the generation went; the phases add up to it."
    whole = [run.total for run in runs]
    names = [run.name for run in runs]
    if not phases_of(whole):
        return Panel("seconds", "Where the seconds went", sentence, absent="No seconds were recorded.")
    data = []
    for phase in phases_of(whole):
        us = [1e6 * phase_s(total, phase) / total.num_tokens if total.num_tokens else 0.0 for total in whole]
        data.append(bars(phase, us, names, PHASE_COLORS[phase]))
    axes = layout("µs per generated token", "", barmode="stack", legend={"traceorder": "normal"})
    axes["yaxis"] = names_axis() | {"showticklabels": len(runs) > 1}
    parts: list[Figure | Table] = [Figure(data, axes, "Per token, over the whole run", 170 + 40 * len(runs))]
    parts += [_seconds_by_step(run, runs) for run in runs if phases_of(run.steps)]
    return Panel("seconds", "Where the seconds went", sentence, (*parts, _seconds_table(runs, whole)))


def _seconds_by_step(run: Run, runs: Sequence[Run]) -> Figure:
    split, sums, data = groups(run.steps), run.points, []
    x = steps_of(sums)
    shape: dict[str, Any] = {"mode": "lines", "stackgroup": "s"} if len(x) > 1 else {"type": "bar", "mode": None}
    for phase in phases_of(sums):
        y = [phase_s(report, phase) / len(group) for report, group in zip(sums, split, strict=True)]
        style = {"line": {"width": 0.5, "color": PHASE_COLORS[phase]}, "fillcolor": PHASE_COLORS[phase]}
        data.append(_area(phase, x, y, PHASE_COLORS[phase], style if len(x) > 1 else {}, shape))
    if any(report.step_s is not None for report in sums):
        rest = [max(0.0, (r.step_s or 0.0) - r.generate_s) / len(g) for r, g in zip(sums, split, strict=True)]
        style = {"line": {"width": 0.5, "color": GREY}, "fillcolor": "rgba(139,146,156,0.18)"}
        data.append(_area(_REST, x, rest, "rgba(139,146,156,0.4)", style if len(x) > 1 else {}, shape))
    axes = over_steps([run], "s per step", barmode="stack", legend={"traceorder": "normal"})
    caption = f"{whose(run, runs, ': ')}Per step, with the rest of the training step where it is known"
    heights = sorted(sum(values) for values in zip(*(trace["y"] for trace in data), strict=True))
    usual = heights[int(_USUAL_SHARE * (len(heights) - 1))]
    if heights[-1] > _SPIKE * usual:
        axes["yaxis"]["range"] = [0, 1.5 * usual]
        caption += f"; the highest, {amount(heights[-1])} s, is cut off"
    return Figure(data, axes, caption, 360)


def _area(
    name: str, x: Sequence[int], y: Sequence[float], color: str, style: dict[str, Any], shape: dict[str, Any]
) -> dict[str, Any]:
    if "stackgroup" in shape:
        return {"type": "scatter", "name": name, "x": list(x), "y": list(y)} | style | shape
    return {"type": "bar", "name": name, "x": list(map(str, x)), "y": list(y), "marker": {"color": color}}


def _seconds_table(runs: Sequence[Run], whole: Sequence[StepReport]) -> Table:
    rows = [
        (phase, *(f"{amount(phase_s(t, phase))} s, {phase_s(t, phase) / (t.generate_s or 1):.1%}" for t in whole))
        for phase in phases_of(whole)
    ]
    rows.append(("generation", *(f"{amount(t.generate_s)} s" for t in whole)))
    return Table(("phase", *(run.name for run in runs)), rows, "The same in seconds, and in shares of the generation")


def long_tail(runs: Sequence[Run]) -> Panel:
    """Active requests over the forwards of the newest step, and completion lengths over steps."""
    sentence = (
        "The long tail: how many requests still run while a step decodes, and how long completions are. A step ends with "
        "its longest completion, and forwards over few requests are where drafts are cheapest."
    )
    parts: list[Figure | Table] = []
    curves = []
    for i, run in enumerate(runs):
        newest = run.steps[-1]
        if newest.active_batch_curve:
            at, active = zip(*newest.active_batch_curve, strict=True)
            style = {"color": color_of(i), "width": 2, "shape": "hv"}
            name = f"{whose(run, runs)}step {newest.step}"
            curves.append(
                line(
                    name, at, active, color_of(i), line=style, mode="lines", fill="tozeroy", fillcolor=pale(color_of(i))
                )
            )
    if curves:
        parts.append(
            Figure(curves, layout("forward of the newest step", "requests"), "Active requests in the newest step")
        )
    lengths = []
    for i, run in enumerate(runs):
        reports = [report for report in run.points if report.completion_lengths]
        for label, figure, dash in (("longest", "max", "dot"), ("mean", "mean", "solid"), ("median", "p50", "dash")):
            values = [getattr(report, f"completion_length_{figure}") for report in reports]
            style = {"color": color_of(i), "width": 2 if dash == "solid" else 1.3, "dash": dash}
            if reports:
                lengths.append(line(f"{whose(run, runs)}{label}", steps_of(reports), values, color_of(i), line=style))
    if lengths:
        parts.append(Figure(lengths, over_steps(runs, "tokens"), "Completion lengths"))
    absent = "" if parts else "No step recorded its requests."
    return Panel("long-tail", "Long tail of the batch", sentence, tuple(parts), absent)


def steps_of(reports: Sequence[StepReport]) -> list[int]:
    """The step of each report; for a sum, its last."""
    return [report.step for report in reports]


def known_points(run: Run, *names: str) -> list[StepReport]:
    """One report per point of a run, over those of its steps that have the figures."""
    known = [
        (having(group, *names), len(group), whole) for group, whole in zip(groups(run.steps), run.points, strict=True)
    ]
    return [whole if len(some) == size else concatenate(some) for some, size, whole in known if some]
