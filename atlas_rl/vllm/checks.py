"""Refuses options that drafting inside vLLM cannot support, before any work and with what to change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from atlas_rl.checks import flag, reject_unknown
from atlas_rl.core import SamplingParams

PROPOSER = "atlas_rl.vllm.proposer.AtlasProposer"
NUM_SPECULATIVE_TOKENS = 15
"""Most draft tokens per step. The controller decides how many of them are used. `graphs.py` says why it is 15."""

UNDEFINED_LOGITS = (
    "the policy's logits are not finite (NaN or infinite) at some position, so its tokens mean nothing: "
    "check its weights"
)

_KNOWN_OPTIONS = ("draft_model", "idle_learning")


def speculative_config() -> dict[str, Any]:
    """vLLM's `speculative_config` for our proposer."""
    return {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}


def options_of(vllm_config: Any) -> dict[str, Any]:
    """Our options in vLLM's `additional_config`; `ValueError` for an unknown one, or one that is no flag and should be."""
    given = vllm_config.additional_config
    options = dict(given.get("atlas_rl", {})) if isinstance(given, dict) else {}
    reject_unknown(options, _KNOWN_OPTIONS, "additional_config['atlas_rl']")
    if "idle_learning" in options:  # "off" would count as on
        flag("additional_config['atlas_rl']['idle_learning']", options["idle_learning"])
    return options


_V2 = "atlas_rl drafts through vLLM's model runner V1: unset VLLM_USE_V2_MODEL_RUNNER"


def check_environment() -> None:
    """Raise `ValueError` for environment variables that our proposer does not support, before an engine is built."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0").lower() in ("1", "true"):
        raise ValueError(_V2)


def check_engine(vllm_config: Any) -> None:
    """Raise `ValueError` for an engine configuration that our proposer does not support."""
    checks = (
        (vllm_config.use_v2_model_runner, _V2),
        (
            bool(vllm_config.scheduler_config.async_scheduling),
            "atlas_rl drafts between steps, which asynchronous scheduling runs over: set async_scheduling=False",
        ),
        (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            "atlas_rl drafts on the rank that samples: set pipeline_parallel_size=1 and use tensor parallelism",
        ),
        (
            vllm_config.speculative_config.rejection_sample_method == "synthetic",
            "synthetic acceptance does not generate the policy's tokens: leave rejection_sample_method at its default",
        ),
    )
    for wrong, message in checks:
        if wrong:
            raise ValueError(message)


_OUR_OWN = ("n", "seed", "logprobs", "max_tokens", "detokenize", "ignore_eos", "stop", "stop_token_ids", "extra_args")
_LEAST_TEMPERATURE = 0.01
_LOST = ("min_p", "logit_bias", "logits_processors", "prompt_logprobs", "logprob_token_ids")


def check_sampling(sampling: SamplingParams, extra: Mapping[str, Any]) -> None:
    """Raise `ValueError` for sampling parameters that vLLM ignores or changes, or that we set ourselves."""
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"vLLM raises temperatures below {_LEAST_TEMPERATURE} to {_LEAST_TEMPERATURE}, got {sampling.temperature}: "
            "give 0 (greedy) or a higher one, or use AtlasRolloutEngine(backend='in_process')"
        )
    if sampling.min_p > 0:
        raise ValueError(
            "vLLM leaves min_p out under speculative decoding: use top_p, or AtlasRolloutEngine(backend='in_process')"
        )
    for name in extra:
        if name in _LOST:
            raise ValueError(f"vLLM leaves {name} out under speculative decoding: remove it from generation_kwargs")
        if name == "thinking_token_budget":
            raise ValueError(
                "vLLM counts drafts against thinking_token_budget before they are accepted, so texts would depend on the "
                "drafts: remove it from generation_kwargs, or generate without AtlasRolloutEngine"
            )
        if name in _OUR_OWN:
            raise ValueError(f"{name} is set by the engine: remove it from generation_kwargs")
