"""Rollouts of a real engine on a tiny policy, and their audit: a wrong engine is one that was told something else."""

from __future__ import annotations

from atlas_kernels.noise import request_keys
from atlas_rl import AtlasRolloutEngine, SamplingParams
from atlas_rl.audit.auditor import Auditor
from tests import engines
from tests.engines import policy

EOS, NEW = (17, 40, 35), 24
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4, 11, 2, 9, 5, 6], [0, 63]]
SETTINGS = engines.SETTINGS | {"hot": {"temperature": 1.3}, "greedy": {"temperature": 0.0}}


def sample(model=None, num_generations=25, seed=3, engine=None, **options):
    """Rollouts of a real engine: what an engine that was told `options` returns."""
    if engine is None:
        engine = AtlasRolloutEngine(model=model or policy(), speculation=False, console=False, audit_share=0)
    return engine.generate(
        PROMPTS, num_generations=num_generations, max_new_tokens=NEW, eos_token_ids=EOS, seed=seed, **options
    )


def asked(seed=3, **options):
    return SamplingParams(max_new_tokens=NEW, eos_token_ids=EOS, seed=seed, **options)


def audit(output, sampling, *, auditor=None, model=None, noise=False, logprobs=False):
    """Every completion of `output` against the policy."""
    auditor = auditor or Auditor(1e3)
    return auditor.audit(
        model or policy(),
        output.prompt_ids,
        output.completion_ids,
        sampling,
        logprobs=output.logprobs if logprobs else None,
        noise_keys=request_keys(sampling.seed, len(output.completion_ids)) if noise else None,
    )
