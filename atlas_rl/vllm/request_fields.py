"""What passes between our side and vLLM about a request, in vLLM's public sampling parameters."""

from __future__ import annotations

from typing import Any

from atlas_rl.core import REPETITION_PENALTIES, TEMPERATURES, SamplingParams
from atlas_rl.vllm.internals import Request
from atlas_rl.vllm.request_table import Arrival

_GREEDY_BELOW = 1e-5  # temperatures that vLLM takes for 0

EXTRA_KEY = "atlas_rl_key"
"""Noise key of a request, uint64, in `extra_args`. Not vLLM's `seed`: its generators cannot be rewound on CPUs."""

EXTRA_REQUEST = "atlas_rl_request"
"""Index of a request in the sequences of the call that announced it, in `extra_args`."""


def arrival_of(request: Request, noise_key: int) -> Arrival:
    """What drafters need to know of a request of vLLM's."""
    params = request.params
    extra = params.extra_args or {}
    return Arrival(
        name=request.name,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=sampling_of(params),
        noise_key=noise_key,
        request=extra.get(EXTRA_REQUEST),
    )


def sampling_of(params: Any) -> SamplingParams:
    """vLLM's sampling parameters as ours; what we do not have costs acceptance, never correctness."""
    ends = set(params.stop_token_ids or ())
    if not params.ignore_eos and params.eos_token_id is not None:
        ends.add(params.eos_token_id)
    return SamplingParams(
        max_new_tokens=params.max_tokens or 1 << 30,
        temperature=min(params.temperature, TEMPERATURES[1]) if params.temperature >= _GREEDY_BELOW else 0.0,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        repetition_penalty=min(max(params.repetition_penalty, REPETITION_PENALTIES[0]), REPETITION_PENALTIES[1]),
        eos_token_ids=tuple(sorted(ends)),
    )
