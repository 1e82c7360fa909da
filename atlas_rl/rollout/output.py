"""The result of a generation call."""

from __future__ import annotations

from dataclasses import dataclass

from atlas_rl.report.report import StepReport


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """Return value of `RolloutEngine.generate`, one row per request, ordered by prompt, then by generation.

    Attributes:
        prompt_ids: The prompts, repeated per generation.
        completion_ids: Generated tokens, the ending token included.
        logprobs: Log-probability of each generated token under the processed distribution (at temperature 0, under the
            policy's own at temperature 1).
        report: What the call did and what it cost.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    report: StepReport
