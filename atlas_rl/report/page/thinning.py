"""Thins long runs into sums over neighbouring steps, so that a page stays small."""

from __future__ import annotations

from collections.abc import Sequence

from atlas_rl.report.report import StepReport
from atlas_rl.report.sums import concatenate

MOST_POINTS = 250
"""Of one line."""


def groups(steps: Sequence[StepReport], most: int = MOST_POINTS) -> list[Sequence[StepReport]]:
    """Groups of neighbouring steps, at most `most`, of equal size."""
    size = -(-len(steps) // most)
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def points(steps: Sequence[StepReport]) -> tuple[StepReport, ...]:
    """One report per group, with counts and seconds summed, so that ratios are over all of its tokens."""
    return tuple(concatenate(group) for group in groups(steps))
