"""Passes our data about a request through vLLM's public sampling parameters.

Clients of a server can write anything into these fields. So the only trusted field is a request's index in a running
call that our own engine has announced. Noise keys are never sent.
"""

from __future__ import annotations

from typing import Any

from atlas_rl.core import REPETITION_PENALTIES, TEMPERATURES, SamplingParams

EXTRA_REQUEST = "atlas_rl_request"
"""In `extra_args`: the ticket of the call that announced a request, and the request's index in its sequences."""

_GREEDY_BELOW = 1e-5  # vLLM treats lower temperatures as 0
_MAX_TOKEN = 1 << 31  # tokens are int32 everywhere


def announced_as(params: Any, ticket: int | None, num_requests: int) -> int | None:
    """Index of a request in the sequences of the running call; None for a request outside that call.

    Args:
        params: vLLM's sampling parameters.
        ticket: Ticket of the running call; None if none runs.
        num_requests: Number of requests of that call.
    """
    given = (params.extra_args or {}).get(EXTRA_REQUEST)
    if ticket is None or not isinstance(given, list | tuple) or len(given) != 2:
        return None
    if not all(type(part) is int for part in given) or given[0] != ticket or not 0 <= given[1] < num_requests:
        return None
    return int(given[1])


def sampling_of(params: Any) -> SamplingParams | None:
    """vLLM's sampling parameters as ours; unsupported ones cost acceptance, never correctness.

    Returns:
        None if our parameters cannot express them, or if the text would depend on the drafts: vLLM counts drafts as
        thinking before they are accepted. Such a request is served without drafts.
    """
    if params.thinking_token_budget is not None:
        return None
    ends = set(params.stop_token_ids or ())
    if not params.ignore_eos and params.eos_token_id is not None:
        ends.add(params.eos_token_id)
    try:
        return SamplingParams(
            max_new_tokens=params.max_tokens or 1 << 30,
            temperature=min(params.temperature, TEMPERATURES[1]) if params.temperature >= _GREEDY_BELOW else 0.0,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            repetition_penalty=min(max(params.repetition_penalty, REPETITION_PENALTIES[0]), REPETITION_PENALTIES[1]),
            eos_token_ids=tuple(sorted(token for token in ends if 0 <= token < _MAX_TOKEN)),
        )
    except ValueError:
        return None
