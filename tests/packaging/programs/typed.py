"""A user's program for the type checker: what the public names return is known to it, and not `Any`. It is not run."""

from typing import assert_type

import torch

from atlas_rl import AtlasRolloutEngine, GenerationOutput, SamplingParams, StepReport, __version__


def rollouts(policy: torch.nn.Module, prompts: list[list[int]]) -> GenerationOutput:
    engine = AtlasRolloutEngine(model=policy, audit_share=0.0, output_dir="runs/typed", speculation=True)
    output = engine.generate(prompts, num_generations=2, max_new_tokens=8, temperature=1.0, seed=3)
    assert_type(output, GenerationOutput)
    assert_type(output.completion_ids, list[list[int]])
    assert_type(output.logprobs, list[list[float]])
    engine.policy_updated()
    assert_type(engine.lost_writes, dict[str, int])
    return output


def figures(report: StepReport) -> dict[str, float | None]:
    assert_type(report.tokens_per_s, float)
    assert_type(report.speedup_measured, float | None)
    assert_type(report.drafted, dict[str, int])
    assert_type(report.warnings, tuple[str, ...])
    return {"gain": report.speedup_estimate, "accepted": report.accepted_length, "bound": report.amdahl_bound}


# An error that strict checking demands: a package that took every name for its own would hide misspelt ones.
from atlas_rl import AtlasRolloutEngin  # type: ignore[attr-defined] # noqa: E402, F401

assert_type(__version__, str)
assert_type(SamplingParams(max_new_tokens=8).temperature, float)
assert_type(AtlasRolloutEngine().load_drafters("drafters.safetensors"), None)
