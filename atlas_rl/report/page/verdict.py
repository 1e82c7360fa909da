"""Writes sentences on whether speculation paid in a run, why not, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from atlas_rl.report.page.totals import Totals, totals
from atlas_rl.report.page.words import amount, counted
from atlas_rl.report.report import StepReport

_NOISE = 0.02  # a gain this close to 1 counts as none
_LATE_STEPS = 8  # steps from which the first and the last quarter of a run are compared
_SLOW_START = 4.0  # multiple of the median step
_HIGH_OVERHEAD = 0.15
_LOW_ACCEPTANCE = 0.35
_LEARNING = {"history", "recurrent"}  # drafters that an engine has by default
_HARDLY_DRAFTED = 0.1  # draft tokens per decoded token


def verdict(steps: Sequence[StepReport]) -> list[str]:
    """Sentences about a run of at least one step, the most important first."""
    run = totals(steps)
    if not run.all.speculation:
        return [
            "Speculation was off: these are the figures of plain decoding, which another run can be compared with.",
            *_bound(run),
        ]
    return [_outcome(run), *_start(steps), *_over_time(steps), *_reasons(run), *_bound(run), *_changes(run)]


def _outcome(run: Totals) -> str:
    if run.gain is None:
        return (
            "Whether speculation paid is not known yet: no step has an estimate of its time without speculation, and none "
            "was repeated without it."
        )
    if run.measured is not None:
        known = f"measured on {run.num_measured:,} of {counted(run.num_steps, 'step')}"
        if run.estimated is not None:
            known += f"; the estimate over {counted(run.num_estimated, 'step')} is {run.estimated:.2f}x"
    else:
        known = f"estimated over {run.num_estimated:,} of {counted(run.num_steps, 'step')}, not measured"
    if run.gain > 1 + _NOISE:
        return f"Speculation paid: {run.gain:.2f}x the tokens/s of no speculation ({known})."
    if run.gain < 1 - _NOISE:
        return f"Speculation cost speed: {run.gain:.2f}x the tokens/s of no speculation ({known})."
    return f"Speculation made no difference: {run.gain:.2f}x the tokens/s of no speculation ({known})."


def _start(steps: Sequence[StepReport]) -> list[str]:
    """Speed of the run without its first step, if that step was far slower than the others."""
    usual_s = median(report.generate_s for report in steps)
    rest = steps[1:]
    if not rest or steps[0].generate_s < _SLOW_START * usual_s:
        return []
    gain = totals(rest).gain
    without = "" if gain is None else f" Without it the gain is {gain:.2f}x."
    took = (
        f"Step {steps[0].step} took {amount(steps[0].generate_s)} s, most likely for what is compiled and loaded once."
    )
    return [took + without]


def _over_time(steps: Sequence[StepReport]) -> list[str]:
    """Gains of the first and the last quarter, both measured or both estimated."""
    if len(steps) < _LATE_STEPS:
        return []
    quarter = len(steps) // 4
    early, late = totals(steps[:quarter]), totals(steps[-quarter:])
    for how, first, last in (
        ("measured", early.measured, late.measured),
        ("estimated", early.estimated, late.estimated),
    ):
        if first is not None and last is not None:
            then = f"and in the last {quarter:,} it was {last:.2f}x"
            return [f"In the first {quarter:,} steps it was {first:.2f}x, {then} ({how})."]
    if late.gain is None:
        return []
    how = "measured" if late.measured is not None else "estimated"
    return [f"In the last {quarter:,} steps it was {late.gain:.2f}x ({how})."]


def _reasons(run: Totals) -> list[str]:
    if run.gain is None or run.gain > 1 + _NOISE:
        return []
    reasons, total = [], run.all
    if run.overhead_share > _HIGH_OVERHEAD:
        reasons.append(
            f"Drafting, planning and learning took {run.overhead_share:.0%} of the generation. On a small policy or in "
            "short runs the accepted drafts do not pay that back."
        )
    if _rarely_accepted(run):
        at = "" if total.entropy is None else f" at an entropy of {total.entropy:.2f} nats per token"
        reasons.append(
            f"{total.acceptance_rate:.0%} of the draft tokens were accepted{at}: the more random a policy, the fewer are."
        )
    if sum(total.drafted.values()) < _HARDLY_DRAFTED * total.num_decoded_tokens:
        reasons.append("Few tokens were drafted: the controller expected drafts not to pay.")
    return reasons


def _rarely_accepted(run: Totals) -> bool:
    return run.all.acceptance_rate is not None and run.all.acceptance_rate < _LOW_ACCEPTANCE


def _bound(run: Totals) -> list[str]:
    if run.generation_share is None:
        return []
    text = f"Generation took {run.generation_share:.0%} of the training step"
    if run.all.speculation and run.amdahl_bound is not None:
        text += f"; at this accepted length the whole step can become at most {run.amdahl_bound:.2f}x as fast"
    return [text + "."]


def _changes(run: Totals) -> list[str]:
    changes = []
    paid = run.gain is None or run.gain > 1 + _NOISE
    if not paid and _rarely_accepted(run) and set(run.all.drafted) <= _LEARNING:
        changes.append(
            "A head that `atlas-rl train-speculator` trains on this policy may draft better (`draft_model`)."
        )
    if run.measured is None and run.all.mode == "train":
        changes.append("To measure the gain instead of estimating it, attach with `baseline_every=20`.")
    if run.measured is not None and run.measured < 1 - _NOISE:
        changes.append("`AtlasRolloutEngine(speculation=False)` draws the same tokens without drafts.")
    return changes
