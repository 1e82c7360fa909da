"""The report of one generation step: what was generated, what it cost, and what it would have cost without speculation.

Reports hold counts and seconds; every ratio is computed from them, so that reports of several ranks (`merge`) or of
several steps (`concatenate`) add up weight-correctly. `report/recorder.py` makes them, `report/sinks.py` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Mode = Literal["train", "eval", "standalone"]
PHASES = ("prefill", "draft", "forward", "sample", "commit", "controller", "observe", "refresh", "sync", "audit")
"""Named shares of a step's seconds; what belongs to none of them is `other`."""
CURVE_POINTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one generation step did.

    Attributes:
        step: Training step (optimizer steps done when it was generated); call number when stand-alone.
        policy_version: Version of the policy that generated.
        mode: `train`, `eval` or `standalone`.
        num_requests: Requests generated.
        num_prompt_tokens: Prompt tokens of all requests, repeats counted.
        num_tokens: Generated tokens, ending tokens included.
        num_forwards: Target forwards that decoded (plain or verifying), forwards that only fill the cache with prompt
            tokens not among them; of several ranks, those of the rank with most.
        num_request_forwards: (request, decoding target forward) pairs: the sum of the active batch over the forwards.
        num_decoded_tokens: Tokens committed by those forwards; less than `num_tokens` where the first token of a
            request is drawn from its prefill.
        drafted: Verified draft tokens per speculator; empty when speculation is off.
        accepted: Accepted draft tokens per speculator, same keys.
        drafted_by_position: Draft tokens verified at draft position 0, 1, ...
        accepted_by_position: Draft tokens accepted at draft position 0, 1, ...
        scored: Draft tokens per speculator whose acceptance is known, those that were drafted but not verified included.
        calibration_error: Per speculator, how far off the controller's estimates of their acceptance were, in [0, 1]: the
            expected calibration error of estimates made before the outcome was known.
        generate_s: Wall-clock seconds of the step as the trainer feels them: generation, sync and refresh.
        prefill_s: Seconds of target forwards over prompts.
        draft_s: Seconds in which speculators propose.
        forward_s: Seconds of decoding target forwards.
        sample_s: Seconds of processing logits, drawing tokens, and accepting drafts.
        commit_s: Seconds of appending tokens, advancing the cache and retiring requests.
        controller_s: Seconds of planning.
        observe_s: Seconds in which controller and speculators learn from verified tokens.
        refresh_s: Seconds of refreshing speculators after a policy update.
        sync_s: Seconds of bringing policy weights into the engine.
        audit_s: Seconds of auditing some of the rollouts.
        other_s: `generate_s` less the named seconds.
        entropy: Mean entropy of the processed distribution in nats per token; None if not measured.
        mean_max_prob: Mean probability of the likeliest token; None if not measured.
        num_scored_tokens: Tokens over which `entropy` and `mean_max_prob` are means.
        no_speculation_s: What the same tokens would have cost without speculation, in seconds, from the run's fitted
            cost model; comparable to `generate_s`. None until the model is fitted.
        baseline_tokens_per_s: Tokens/s of a measured rerun without speculation; None without a rerun.
        step_s: Seconds of the whole training step, generation included; None until known.
        active_batch_curve: (decoding forward, active requests) pairs, at most 64: the long tail.
        completion_lengths: Generated tokens of each request.
        num_audited_tokens: Tokens that were held against a plain forward pass of the policy (`audit/auditor.py`).
        audit_score_nats: Sum over them of log-probability plus entropy: 0 on average, negative where samples are more random
            than the policy, positive where they are greedier.
        audit_score_variance_nats2: Variance of that sum.
        audit_logprob_error_nats: Mean absolute difference between their logprobs and the plain forward's; None without.
        audit_evidence_nats: The run's evidence against the sampler after this step, log R of `audit/bets.py`; of
            several ranks the most. None where nothing has been audited yet.
        warnings: What went wrong, in words that name the cause.
    """

    step: int
    policy_version: int
    mode: Mode
    num_requests: int
    num_prompt_tokens: int
    num_tokens: int
    num_forwards: int
    num_request_forwards: int
    num_decoded_tokens: int
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    drafted_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    scored: dict[str, int] = field(default_factory=dict)
    calibration_error: dict[str, float] = field(default_factory=dict)
    generate_s: float
    prefill_s: float = 0.0
    draft_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    commit_s: float = 0.0
    controller_s: float = 0.0
    observe_s: float = 0.0
    refresh_s: float = 0.0
    sync_s: float = 0.0
    audit_s: float = 0.0
    other_s: float = 0.0
    entropy: float | None = None
    mean_max_prob: float | None = None
    num_scored_tokens: int = 0
    no_speculation_s: float | None = None
    baseline_tokens_per_s: float | None = None
    step_s: float | None = None
    active_batch_curve: tuple[tuple[int, int], ...] = ()
    completion_lengths: tuple[int, ...] = ()
    num_audited_tokens: int = 0
    audit_score_nats: float = 0.0
    audit_score_variance_nats2: float = 0.0
    audit_logprob_error_nats: float | None = None
    audit_evidence_nats: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def speculation(self) -> bool:
        """Whether the step had any speculator to draft with."""
        return bool(self.drafted)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of `generate_s`."""
        return self.num_tokens / self.generate_s if self.generate_s > 0 else 0.0

    @property
    def us_per_token(self) -> float | None:
        """Microseconds of `generate_s` per generated token."""
        return 1e6 * self.generate_s / self.num_tokens if self.num_tokens else None

    @property
    def accepted_length(self) -> float:
        """Tokens committed per request per decoding target forward, bonus token included; 1 without speculation.

        Tokens drawn from a prefill, and the prefill itself, are left out. 1 where nothing was decoded.
        """
        return self.num_decoded_tokens / self.num_request_forwards if self.num_request_forwards else 1.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens of all speculators; None if nothing was drafted."""
        drafted = sum(self.drafted.values())
        return sum(self.accepted.values()) / drafted if drafted else None

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Accepted / drafted tokens at draft position 0, 1, ...: an acceptance implies all earlier ones."""
        return tuple(a / d for a, d in zip(self.accepted_by_position, self.drafted_by_position, strict=True) if d)

    @property
    def no_speculation_tokens_per_s(self) -> float | None:
        """Estimated tokens/s of the same step without speculation."""
        return self.num_tokens / self.no_speculation_s if self.no_speculation_s else None

    @property
    def speedup_estimate(self) -> float | None:
        """Estimated speedup of generation over no speculation: `no_speculation_s / generate_s`."""
        return self.no_speculation_s / self.generate_s if self.no_speculation_s and self.generate_s > 0 else None

    @property
    def speedup_measured(self) -> float | None:
        """Tokens/s over those of the measured rerun without speculation."""
        return self.tokens_per_s / self.baseline_tokens_per_s if self.baseline_tokens_per_s else None

    @property
    def generation_share(self) -> float | None:
        """Share of the training step that is generation, as measured; None until the step's time is known."""
        return self.generate_s / self.step_s if self.step_s else None

    @property
    def amdahl_bound(self) -> float | None:
        """Most that a whole training step can gain over no speculation at this accepted length (`amdahl_bound`).

        R_gen is generation's share of the step *without* speculation: `no_speculation_s` against the rest of the
        measured step. Without an estimate of it, a step without speculation stands for itself; else None.
        """
        plain_s = self.no_speculation_s if self.speculation else self.generate_s
        if not self.step_s or not plain_s or not math.isfinite(plain_s):
            return None
        rest_s = max(0.0, self.step_s - self.generate_s)
        return amdahl_bound(plain_s / (plain_s + rest_s), self.accepted_length)

    @property
    def audit_z(self) -> float | None:
        """`audit_score_nats` in standard deviations; None where nothing random was audited."""
        variance = self.audit_score_variance_nats2
        return self.audit_score_nats / math.sqrt(variance) if variance > 0 else None

    @property
    def completion_length_mean(self) -> float | None:
        """Mean generated tokens per request."""
        return sum(self.completion_lengths) / len(self.completion_lengths) if self.completion_lengths else None

    @property
    def completion_length_p50(self) -> float | None:
        """Median of generated tokens per request."""
        ordered, half = sorted(self.completion_lengths), len(self.completion_lengths) // 2
        if not ordered:
            return None
        return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    @property
    def completion_length_max(self) -> int | None:
        """Most generated tokens of a request."""
        return max(self.completion_lengths, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every derived figure, as JSON types; numbers that are not finite become None."""
        return {name: _finite(getattr(self, name)) for name in (*_FIELD_NAMES, *_DERIVED_NAMES)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepReport:
        """The report that `to_dict` wrote; derived figures are computed afresh, unknown keys raise `ValueError`."""
        unknown = sorted(set(values) - set(_FIELD_NAMES) - set(_DERIVED_NAMES))
        if unknown:
            raise ValueError(f"not a step report, or one of another version: unknown keys {unknown}")
        given = {name: values[name] for name in _FIELD_NAMES if name in values}
        given["active_batch_curve"] = tuple((int(i), int(n)) for i, n in given.get("active_batch_curve", ()))
        for name in ("drafted_by_position", "accepted_by_position", "completion_lengths", "warnings"):
            given[name] = tuple(given.get(name, ()))
        return cls(**given)


_FIELD_NAMES = tuple(f.name for f in fields(StepReport))
_DERIVED_NAMES = tuple(name for name, value in vars(StepReport).items() if isinstance(value, property))


def amdahl_bound(generation_share: float, alpha: float) -> float:
    """Speedup of a training step whose generation gets `alpha` times faster: `1 / (R_gen/alpha + 1 - R_gen)`.

    With the accepted length as `alpha` it is an upper bound: as if drafts cost nothing, and verifying a row of drafts
    as much as decoding one token.

    Args:
        generation_share: R_gen in [0, 1], generation's share of a step without speculation.
        alpha: Speedup of generation, > 0.
    """
    if not 0 <= generation_share <= 1 or not alpha > 0:
        raise ValueError(f"need a share in [0, 1] and alpha > 0, got {generation_share} and {alpha}")
    return 1 / (generation_share / alpha + 1 - generation_share)


def merge(reports: Sequence[StepReport]) -> StepReport:
    """One report of ranks that generated the same step side by side.

    Counts add up; the seconds, with their breakdown, are those of the slowest rank, because the trainer waits for it;
    means are weighted by their tokens. `no_speculation_s` is the largest of the ranks, and None if some rank has none.
    Raises `ValueError` for reports of different steps, policy versions or modes.
    """
    first = _first(reports)
    for name in ("step", "policy_version", "mode"):
        if len({getattr(report, name) for report in reports}) > 1:
            raise ValueError(f"reports of different {name} do not merge: {[getattr(r, name) for r in reports]}")
    slowest = max(reports, key=lambda report: report.generate_s)
    return replace(
        first,
        **_added_counts(reports),
        **{name: getattr(slowest, name) for name in _SECONDS_NAMES},
        num_forwards=max(report.num_forwards for report in reports),
        audit_evidence_nats=max((e for r in reports if (e := r.audit_evidence_nats) is not None), default=None),
        no_speculation_s=_all_or_none(max, (report.no_speculation_s for report in reports)),
        baseline_tokens_per_s=_all_or_none(sum, (report.baseline_tokens_per_s for report in reports)),
        step_s=_all_or_none(max, (report.step_s for report in reports)),
        active_batch_curve=_added_curves([report.active_batch_curve for report in reports]),
    )


def concatenate(reports: Sequence[StepReport]) -> StepReport:
    """One report of generations that followed one another: counts and seconds add up.

    Step, version and mode are those of the last. `no_speculation_s` and `step_s` are sums, None if some part has none.
    """
    first = _first(reports)
    last = reports[-1]
    rerun_s = _all_or_none(
        sum, (r.num_tokens / r.baseline_tokens_per_s if r.baseline_tokens_per_s else None for r in reports)
    )
    curve: list[tuple[int, int]] = []
    for report in reports:
        offset = curve[-1][0] + 1 if curve else 0
        curve += [(offset + index, active) for index, active in report.active_batch_curve]
    return replace(
        first,
        **_added_counts(reports),
        **{name: sum(getattr(report, name) for report in reports) for name in _SECONDS_NAMES},
        step=last.step,
        policy_version=last.policy_version,
        mode=last.mode,
        audit_evidence_nats=last.audit_evidence_nats,
        num_forwards=sum(report.num_forwards for report in reports),
        no_speculation_s=_all_or_none(sum, (report.no_speculation_s for report in reports)),
        baseline_tokens_per_s=sum(report.num_tokens for report in reports) / rerun_s if rerun_s else None,
        step_s=_all_or_none(sum, (report.step_s for report in reports)),
        active_batch_curve=thin_curve(curve),
    )


def thin_curve(curve: Sequence[tuple[int, int]], num_points: int = CURVE_POINTS) -> tuple[tuple[int, int], ...]:
    """At most `num_points` of `curve`, evenly spaced, first and last among them."""
    if len(curve) <= num_points:
        return tuple(curve)
    return tuple(curve[round(i * (len(curve) - 1) / (num_points - 1))] for i in range(num_points))


_SECONDS_NAMES = ("generate_s", *(f"{phase}_s" for phase in PHASES), "other_s")


def _added_counts(reports: Sequence[StepReport]) -> dict[str, Any]:
    """What adds up alike over ranks and over time."""
    counts = (
        *("num_requests", "num_prompt_tokens", "num_tokens", "num_request_forwards", "num_decoded_tokens"),
        *("num_audited_tokens", "audit_score_nats", "audit_score_variance_nats2"),
    )
    return {
        **{name: sum(getattr(report, name) for report in reports) for name in counts},
        "drafted": _added_dicts(report.drafted for report in reports),
        "accepted": _added_dicts(report.accepted for report in reports),
        "drafted_by_position": _added_tuples([report.drafted_by_position for report in reports]),
        "accepted_by_position": _added_tuples([report.accepted_by_position for report in reports]),
        "scored": _added_dicts(report.scored for report in reports),
        "calibration_error": _mean_dicts([(report.calibration_error, report.scored) for report in reports]),
        "entropy": _weighted_mean((report.entropy, report.num_scored_tokens) for report in reports),
        "mean_max_prob": _weighted_mean((report.mean_max_prob, report.num_scored_tokens) for report in reports),
        "num_scored_tokens": sum(report.num_scored_tokens for report in reports),
        "audit_logprob_error_nats": _weighted_mean((r.audit_logprob_error_nats, r.num_audited_tokens) for r in reports),
        "completion_lengths": tuple(n for report in reports for n in report.completion_lengths),
        "warnings": tuple(dict.fromkeys(w for report in reports for w in report.warnings)),
    }


def _first(reports: Sequence[StepReport]) -> StepReport:
    if not reports:
        raise ValueError("at least one report is needed")
    return reports[0]


def _added_dicts(dicts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in dicts:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def _mean_dicts(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, int]]]) -> dict[str, float]:
    """Per key, the mean of the values weighted by the counts."""
    names = dict.fromkeys(name for values, _ in pairs for name in values)
    means = {
        name: _weighted_mean((values.get(name), counts.get(name, 0)) for values, counts in pairs) for name in names
    }
    return {name: mean for name, mean in means.items() if mean is not None}


def _added_tuples(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    longest = max(len(row) for row in rows)
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(longest))


def _added_curves(curves: Sequence[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, int], ...]:
    """Sum of step functions: a thinned curve holds its value until its next point, and is 0 past its last."""
    indices = sorted({index for curve in curves for index, _ in curve})
    total = []
    for index in indices:
        alive = [curve for curve in curves if curve and index <= curve[-1][0]]
        total.append((index, sum([n for i, n in curve if i <= index][-1] for curve in alive if curve[0][0] <= index)))
    return thin_curve(total)


def _weighted_mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in pairs if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _all_or_none(reduce: Any, values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else reduce(known)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(item) for item in value]
    return value
