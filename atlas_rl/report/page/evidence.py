"""Panels about trust: the audit's evidence, and warnings and faults with what to do about each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from atlas_rl.report.advice import advice_for
from atlas_rl.report.page.figures import Figure, Panel, Table, color_of, having, line, mark, over_steps, whose
from atlas_rl.report.page.reading import Run
from atlas_rl.report.page.speed import known_points, steps_of
from atlas_rl.report.page.thinning import groups

ALARM_NATS = math.log(1e6)
"""Evidence at which the audit warns; `audit/bets.py` has the same number, two floors above."""
_MOST_WARNINGS = 100


def audit(runs: Sequence[Run]) -> Panel:
    """Evidence against the sampler over steps."""
    sentence = (
        "Evidence that samples are not the policy's, from tokens compared with a plain forward: the audit warns at the "
        "dotted line, and a right sampler stays below it."
    )
    evidence, scores, rows = [], [], []
    for i, run in enumerate(runs):
        highest = [max(having(g, "audit_evidence_nats"), key=lambda r: r.audit_evidence_nats or 0.0, default=None)
                   for g in groups(run.steps)]  # fmt: skip
        known = [report for report in highest if report is not None]
        if known:
            values = [report.audit_evidence_nats for report in known]
            evidence.append(line(run.name, steps_of(known), values, color_of(i)))
        scored = known_points(run, "audit_z")
        if scored:
            scores.append(line(run.name, steps_of(scored), [r.audit_z for r in scored], color_of(i)))
        total = run.total
        if total.num_audited_tokens:
            error = total.audit_logprob_error_nats
            shown = "–" if error is None else f"{error:.2g} nats"
            share = f"{total.num_audited_tokens:,} ({total.num_audited_tokens / max(1, total.num_tokens):.1%})"
            rows.append((run.name, share, "–" if total.audit_z is None else f"{total.audit_z:+.1f}", shown))
    if not evidence and not rows:
        return Panel("audit", "Audit", sentence, absent="No token was audited yet (option audit_share).")
    axes = over_steps(runs, "evidence, nats", **mark(ALARM_NATS))
    axes["yaxis"]["rangemode"] = "normal"
    parts: list[Figure | Table] = [Figure(evidence, axes, "Evidence")] if evidence else []
    if scores:
        z_axes = over_steps(runs, "standard deviations", **mark(0))
        z_axes["yaxis"]["rangemode"] = "normal"
        caption = "Score of each step: below 0 more random than the policy, above 0 greedier; within ±3 is chance"
        parts.append(Figure(scores, z_axes, caption))
    header = ("run", "audited tokens (share)", "score of the run", "mean error of logprobs")
    return Panel("audit", "Audit", sentence, (*parts, Table(header, rows)))


def warnings(runs: Sequence[Run]) -> Panel:
    """Every warning, when it occurred, and what to do about it."""
    sentence = "What the engine warned of, in which steps, and what to do about each."
    parts = []
    for run in runs:
        when: dict[str, list[int]] = {}
        for report in run.steps:
            for message in report.warnings:
                when.setdefault(message, []).append(report.step)
        rows = [(text, _steps(at), advice_for(text)) for text, at in list(when.items())[:_MOST_WARNINGS]]
        more = f"the first {_MOST_WARNINGS} of {len(when):,}" if len(when) > _MOST_WARNINGS else ""
        if rows:
            parts.append(Table(("warning", "steps", "what to do"), rows, whose(run, runs, ", " if more else "") + more))
        faults = run.total.drafter_faults
        if faults:
            header = (f"errors of drafters{' of ' if len(runs) > 1 else ''}{whose(run, runs, '')}", "count")
            parts.append(Table(header, [(name, f"{count:,}") for name, count in faults.items()]))
    absent = "" if parts else "There was none."
    return Panel("warnings", "Warnings", sentence, tuple(parts), absent)


def _steps(at: Sequence[int]) -> str:
    if len(at) == 1:
        return f"{at[0]}"
    return f"{at[0]} to {at[-1]} ({len(at)}×)"
