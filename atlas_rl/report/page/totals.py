"""Figures of a whole run, each over the steps that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas_rl.report.page.figures import having
from atlas_rl.report.report import PHASES, StepReport
from atlas_rl.report.sums import concatenate

OVERHEAD = ("draft", "controller", "observe", "refresh")
"""Phases that a run without speculation does not have."""


@dataclass(frozen=True)
class Totals:
    """Totals of a run; None if no step has the figure.

    Attributes:
        all: Sum of all steps.
        num_steps: Number of steps.
        measured: Tokens/s divided by those of the reruns without speculation.
        num_measured: Number of steps with such a rerun.
        estimated: Tokens/s divided by the estimate of those without speculation.
        num_estimated: Number of steps with such an estimate.
        generation_share: Generation's share of the training steps' time.
        amdahl_bound: Upper bound on the whole step's gain at this accepted length.
        overhead_share: Share of generation spent on drafting, planning, learning and refreshing.
    """

    all: StepReport
    num_steps: int
    measured: float | None
    num_measured: int
    estimated: float | None
    num_estimated: int
    generation_share: float | None
    amdahl_bound: float | None
    overhead_share: float

    @property
    def gain(self) -> float | None:
        """The measured gain, else the estimated one."""
        return self.estimated if self.measured is None else self.measured


def totals(steps: Sequence[StepReport]) -> Totals:
    """Sum up the steps of a run (at least one)."""
    total = concatenate(steps)

    def over(some: Sequence[StepReport], figure: str) -> float | None:
        summed = total if len(some) == len(steps) else concatenate(some) if some else None
        return None if summed is None else getattr(summed, figure)

    measured, estimated = having(steps, "baseline_tokens_per_s"), having(steps, "no_speculation_s")
    return Totals(
        all=total,
        num_steps=len(steps),
        measured=over(measured, "speedup_measured"),
        num_measured=len(measured),
        estimated=over(estimated, "speedup_estimate"),
        num_estimated=len(estimated),
        generation_share=over(having(steps, "step_s"), "generation_share"),
        amdahl_bound=over(having(steps, "amdahl_bound"), "amdahl_bound"),
        overhead_share=sum(phase_s(total, name) for name in OVERHEAD) / total.generate_s if total.generate_s else 0.0,
    )


def phase_s(report: StepReport, phase: str) -> float:
    """Seconds of a phase of `PHASES`, or of `other`."""
    return getattr(report, f"{phase}_s")


def phases_of(reports: Sequence[StepReport]) -> list[str]:
    """Phases with nonzero time in these reports, `other` last."""
    return [phase for phase in (*PHASES, "other") if any(phase_s(report, phase) > 0 for report in reports)]
