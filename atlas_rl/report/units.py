"""The unit of every figure of a report, for display."""

from __future__ import annotations

_BY_NAME = {
    "step": "number",
    "policy_version": "number",
    "mode": "word",
    "num_requests": "requests",
    "num_forwards": "forwards",
    "num_request_forwards": "forwards of one request",
    "drafted": "tokens by drafter",
    "accepted": "tokens by drafter",
    "scored": "tokens by drafter",
    "calibration_error": "0 to 1, by drafter",
    "drafted_by_position": "tokens by draft position",
    "accepted_by_position": "tokens by draft position",
    "acceptance_by_position": "0 to 1, by draft position",
    "acceptance_rate": "0 to 1",
    "entropy": "nats per token",
    "mean_max_prob": "0 to 1",
    "active_batch_curve": "pairs of forward and requests",
    "completion_lengths": "tokens by request",
    "completion_length_mean": "tokens",
    "completion_length_p50": "tokens",
    "completion_length_max": "tokens",
    "audit_score_variance_nats2": "nats²",
    "audit_z": "standard deviations",
    "drafter_faults": "errors by drafter",
    "warnings": "sentences",
    "speculation": "true or false",
    "us_per_token": "µs per token",
    "accepted_length": "tokens per forward",
    "speedup_estimate": "ratio",
    "speedup_measured": "ratio",
    "generation_share": "0 to 1",
    "amdahl_bound": "ratio",
    "engine": "word",
    "rank": "number",
}
_BY_ENDING = (
    ("tokens_per_s", "tokens/s"),
    ("_tokens", "tokens"),
    ("_nats", "nats"),
    ("_bytes", "bytes"),
    ("_s", "s"),
)


def unit_of(name: str) -> str:
    """The unit of a field or a derived figure of `StepReport`; `KeyError` for a name without one."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    for ending, unit in _BY_ENDING:
        if name.endswith(ending):
            return unit
    raise KeyError(f"report/units.py has no unit for '{name}'")
