"""The report of one generation step: what was generated, what it cost, and what it would have cost without speculation.

Reports hold counts and seconds, and every ratio is computed from them. Each field declares how it adds up over ranks and
over steps, and `report/sums.py` adds them. `report/recorder.py` makes reports, `report/sinks.py` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from atlas_rl.report.sums import (
    adds,
    curves_in_turn,
    curves_side_by_side,
    distinct,
    joined,
    largest,
    largest_if_all,
    largest_known,
    last,
    mean_by_key,
    mean_over,
    of_slowest,
    rate_of_slowest,
    rate_over,
    same,
    total,
    total_by_key,
    total_by_position,
    total_if_all,
)

Mode = Literal["train", "eval", "standalone"]
PHASES = ("prefill", "draft", "forward", "sample", "commit", "controller", "observe", "refresh", "sync", "audit")
"""Named shares of a step's seconds; what belongs to none of them is `other`."""

_IDENTITY = adds(same, steps=last)
_COUNT = adds(total)
_SECONDS = adds(of_slowest, steps=total)
_BY_KEY = adds(total_by_key)
_BY_POSITION = adds(total_by_position)
_TOKEN_MEAN = adds(mean_over("num_scored_tokens"))
_AUDIT_MEAN = adds(mean_over("num_audited_tokens"))
_CALIBRATION = adds(mean_by_key("scored"))
_OPTIONAL_SECONDS = adds(largest_if_all, steps=total_if_all)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Counts, seconds and warnings of one generation step.

    Attributes:
        step: Training step (optimizer steps done when it was generated); call number when stand-alone.
        policy_version: Version of the policy that generated.
        mode: `train`, `eval` or `standalone`.
        num_requests: Requests generated.
        num_prompt_tokens: Prompt tokens of all requests, repeats counted.
        num_tokens: Generated tokens, ending tokens included.
        num_forwards: Target forwards that decoded, plain or verifying. Forwards that only fill the cache with prompt tokens
            do not count.
        num_request_forwards: (request, decoding target forward) pairs: the sum of the active batch over the forwards.
        num_decoded_tokens: Tokens that those forwards committed. Fewer than `num_tokens` if the first token of each request
            is drawn from its prefill.
        drafted: Verified draft tokens per speculator; empty if speculation is off.
        accepted: Accepted draft tokens per speculator, same keys.
        drafted_by_position: Draft tokens verified at draft position 0, 1, ...
        accepted_by_position: Draft tokens accepted at draft position 0, 1, ...
        scored: Draft tokens per speculator whose acceptance is known, whether they were verified or not.
        calibration_error: Expected calibration error, in [0, 1], of the acceptance that the controller had estimated for
            the `scored` tokens; per speculator.
        generate_s: Wall-clock seconds that the trainer waits for the step: generation, sync and refresh.
        prefill_s: Seconds of target forwards over prompts.
        draft_s: Seconds of proposing drafts.
        forward_s: Seconds of decoding target forwards, and of verification that is captured with them.
        sample_s: Seconds of processing logits, drawing tokens, and accepting drafts.
        commit_s: Seconds of appending tokens, advancing the cache and retiring requests.
        controller_s: Seconds of planning.
        observe_s: Seconds of learning from verified tokens, controller and speculators together.
        refresh_s: Seconds of refreshing speculators after a policy update.
        sync_s: Seconds of bringing policy weights into the engine: loading them into vLLM, or gathering them from the ranks
            that hold them.
        audit_s: Seconds of auditing a share of the rollouts.
        packing_s: Seconds, part of `prefill_s` and `forward_s`, of packing weights for faster products on a CPU.
        packed_bytes: Most bytes of weight copies at once: packed ones, and those in the type of a trainer's autocast.
        capture_s: Seconds, part of `forward_s` and `draft_s`, of capturing decode steps and drafts as CUDA graphs. Those of
            steps last for one call.
        graph_bytes: Most bytes of device memory that CUDA graphs reserve in one call, beyond its cache.
        idle_learning_s: Seconds that a server's drafters learned while it had nothing to do, since the last report. Nobody
            waits for them, and no other figure counts them.
        other_s: `generate_s` less the named seconds.
        entropy: Mean entropy of the processed distribution in nats per token; None if not measured.
        mean_max_prob: Mean probability of the likeliest token; None if not measured.
        num_scored_tokens: Tokens over which `entropy` and `mean_max_prob` are means.
        no_speculation_s: Estimated seconds of the same tokens without speculation (`no_speculation_seconds`), to be
            compared with `generate_s`. None if no speculator could draft, or if the run has not measured the cost of
            plain forwards of such batches.
        baseline_tokens_per_s: Tokens per second of a measured rerun without speculation, with the step's own `sync_s` and
            `audit_s` added to its seconds; None without a rerun.
        step_s: Seconds of training since the last report, with generation, without evaluation and measuring reruns: of one
            optimizer step, or of several if not each of them generates. None until known.
        active_batch_curve: Pairs of (index of the decoding forward, active requests), at most 64; shows the long tail.
        completion_lengths: Generated tokens of each request.
        num_audited_tokens: Tokens compared with a plain forward pass of the policy (`audit/auditor.py`).
        audit_score_nats: Sum of log-probability plus entropy over the audited tokens. Its expectation is 0 for a correct
            sampler, below 0 for one that is more random than the policy, above 0 for a greedier one.
        audit_score_variance_nats2: Variance of `audit_score_nats`, in nats squared.
        audit_logprob_error_nats: Mean absolute difference between returned logprobs and those of the plain forward; None if
            the engine returned none.
        audit_evidence_nats: The run's evidence against the sampler after this step: log R of `audit/bets.py`. None if
            nothing has been audited yet.
        drafter_faults: Number of errors by drafter, controller and following of requests, for those that had any. They
            cost only drafts.
        warnings: Failures of the step, each as one sentence that names the cause.
    """

    step: int = field(metadata=_IDENTITY)
    policy_version: int = field(metadata=_IDENTITY)
    mode: Mode = field(metadata=_IDENTITY)
    num_requests: int = field(metadata=_COUNT)
    num_prompt_tokens: int = field(metadata=_COUNT)
    num_tokens: int = field(metadata=_COUNT)
    num_forwards: int = field(metadata=adds(largest, steps=total))
    num_request_forwards: int = field(metadata=_COUNT)
    num_decoded_tokens: int = field(metadata=_COUNT)
    drafted: dict[str, int] = field(default_factory=dict, metadata=_BY_KEY)
    accepted: dict[str, int] = field(default_factory=dict, metadata=_BY_KEY)
    drafted_by_position: tuple[int, ...] = field(default=(), metadata=_BY_POSITION)
    accepted_by_position: tuple[int, ...] = field(default=(), metadata=_BY_POSITION)
    scored: dict[str, int] = field(default_factory=dict, metadata=_BY_KEY)
    calibration_error: dict[str, float] = field(default_factory=dict, metadata=_CALIBRATION)
    generate_s: float = field(metadata=_SECONDS)
    prefill_s: float = field(default=0.0, metadata=_SECONDS)
    draft_s: float = field(default=0.0, metadata=_SECONDS)
    forward_s: float = field(default=0.0, metadata=_SECONDS)
    sample_s: float = field(default=0.0, metadata=_SECONDS)
    commit_s: float = field(default=0.0, metadata=_SECONDS)
    controller_s: float = field(default=0.0, metadata=_SECONDS)
    observe_s: float = field(default=0.0, metadata=_SECONDS)
    refresh_s: float = field(default=0.0, metadata=_SECONDS)
    sync_s: float = field(default=0.0, metadata=_SECONDS)
    audit_s: float = field(default=0.0, metadata=_SECONDS)
    packing_s: float = field(default=0.0, metadata=_SECONDS)
    packed_bytes: int = field(default=0, metadata=adds(largest))
    capture_s: float = field(default=0.0, metadata=_SECONDS)
    graph_bytes: int = field(default=0, metadata=adds(largest))
    idle_learning_s: float = field(default=0.0, metadata=_SECONDS)
    other_s: float = field(default=0.0, metadata=_SECONDS)
    entropy: float | None = field(default=None, metadata=_TOKEN_MEAN)
    mean_max_prob: float | None = field(default=None, metadata=_TOKEN_MEAN)
    num_scored_tokens: int = field(default=0, metadata=_COUNT)
    no_speculation_s: float | None = field(default=None, metadata=_OPTIONAL_SECONDS)
    baseline_tokens_per_s: float | None = field(
        default=None, metadata=adds(rate_of_slowest("num_tokens"), steps=rate_over("num_tokens"))
    )
    step_s: float | None = field(default=None, metadata=_OPTIONAL_SECONDS)
    active_batch_curve: tuple[tuple[int, int], ...] = field(
        default=(), metadata=adds(curves_side_by_side, steps=curves_in_turn)
    )
    completion_lengths: tuple[int, ...] = field(default=(), metadata=adds(joined))
    num_audited_tokens: int = field(default=0, metadata=_COUNT)
    audit_score_nats: float = field(default=0.0, metadata=_COUNT)
    audit_score_variance_nats2: float = field(default=0.0, metadata=_COUNT)
    audit_logprob_error_nats: float | None = field(default=None, metadata=_AUDIT_MEAN)
    audit_evidence_nats: float | None = field(default=None, metadata=adds(largest_known, steps=last))
    drafter_faults: dict[str, int] = field(default_factory=dict, metadata=_BY_KEY)
    warnings: tuple[str, ...] = field(default=(), metadata=adds(distinct))

    @property
    def speculation(self) -> bool:
        """Whether any speculator could draft in this step."""
        return bool(self.drafted)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of `generate_s`."""
        return self.num_tokens / self.generate_s if self.generate_s > 0 else 0.0

    @property
    def rollout_s(self) -> float:
        """Seconds of `generate_s` without refreshes and weight loading."""
        return self.generate_s - self.refresh_s - self.sync_s

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
        """Accepted / drafted tokens at draft position 0, 1, ...; accepted only if all tokens before it were."""
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
        """Measured speedup of generation: tokens/s over those of the rerun without speculation; None if no rerun."""
        return self.tokens_per_s / self.baseline_tokens_per_s if self.baseline_tokens_per_s else None

    @property
    def generation_share(self) -> float | None:
        """Measured share of generation in the training's time, `step_s`; None until that is known."""
        return self.generate_s / self.step_s if self.step_s else None

    @property
    def amdahl_bound(self) -> float | None:
        """Upper bound on the speedup of the whole training step at this accepted length (function `amdahl_bound`).

        The bound needs generation's share of the step *without* speculation: `no_speculation_s` against the rest of the
        measured step. A step without speculation is measured as it is. None if `step_s` or the estimate is not known.
        """
        plain_s = self.no_speculation_s if self.speculation else self.generate_s
        if not self.step_s or not plain_s or not math.isfinite(plain_s):
            return None
        rest_s = max(0.0, self.step_s - self.generate_s)
        return amdahl_bound(plain_s / (plain_s + rest_s), self.accepted_length)

    @property
    def audit_z(self) -> float | None:
        """`audit_score_nats` in standard deviations; None if no audited token was random."""
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
        """All fields and derived figures as JSON types; numbers that are not finite become None."""
        return {name: _finite(getattr(self, name)) for name in (*_FIELD_NAMES, *_DERIVED_NAMES)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepReport:
        """The report from the output of `to_dict`; derived figures are recomputed.

        A line of `rollouts.jsonl` also says who wrote it (`ORIGIN`), which is no part of the report.

        Raises:
            ValueError: Unknown keys.
        """
        unknown = sorted(set(values) - set(_FIELD_NAMES) - set(_DERIVED_NAMES) - set(ORIGIN))
        if unknown:
            raise ValueError(f"not a step report, or one of another version: unknown keys {unknown}")
        given = {name: values[name] for name in _FIELD_NAMES if name in values}
        given["active_batch_curve"] = tuple((int(i), int(n)) for i, n in given.get("active_batch_curve", ()))
        for name in ("drafted_by_position", "accepted_by_position", "completion_lengths", "warnings"):
            given[name] = tuple(given.get(name, ()))
        return cls(**given)


ORIGIN = {
    "engine": "Random name of the engine that wrote the line.",
    "rank": "Number of the process that wrote the line, 0 with one process.",
}
"""Further keys of a line of a report file, which say who wrote it."""

_FIELD_NAMES = tuple(f.name for f in fields(StepReport))
_DERIVED_NAMES = tuple(name for name, value in vars(StepReport).items() if isinstance(value, property))


def amdahl_bound(generation_share: float, alpha: float) -> float:
    """Speedup of a training step whose generation gets `alpha` times faster: `1 / (R_gen/alpha + 1 - R_gen)`.

    With the accepted length as `alpha` it is an upper bound: it takes drafts to be free, and verifying a row of drafts to
    cost as much as decoding one token.

    Args:
        generation_share: R_gen in [0, 1], generation's share of a step without speculation.
        alpha: Speedup of generation, > 0.
    """
    if not 0 <= generation_share <= 1 or not alpha > 0:
        raise ValueError(f"need a share in [0, 1] and alpha > 0, got {generation_share} and {alpha}")
    return 1 / (generation_share / alpha + 1 - generation_share)


def with_sync(report: StepReport, seconds: float) -> StepReport:
    """The report with further seconds of loading weights, which are spent with and without speculation."""
    plain_s, rate = report.no_speculation_s, report.baseline_tokens_per_s
    return replace(
        report,
        sync_s=report.sync_s + seconds,
        generate_s=report.generate_s + seconds,
        no_speculation_s=None if plain_s is None else plain_s + seconds,
        baseline_tokens_per_s=report.num_tokens / (report.num_tokens / rate + seconds) if rate else rate,
    )


def rerun_tokens_per_s(report: StepReport, rerun: StepReport) -> float:
    """Tokens per second of a measuring rerun of the step in `report`, had it loaded weights and been audited as well.

    The step does both whether it speculates or not; the rerun does neither.
    """
    return with_sync(rerun, report.sync_s + report.audit_s).tokens_per_s


def no_speculation_seconds(
    report: StepReport, num_forwards: int, forwards_s: float | None, *, draws_all: bool = False
) -> float | None:
    """Estimated seconds of the generation in `report`, had it run without speculation.

        turns_s = (commit_s + other_s) * num_forwards / report.num_forwards
        seconds = prefill_s + sample_s + turns_s + forwards_s + audit_s

    Prompts cost the same, as many tokens are drawn (`sample_s`), and as many are audited. Commits and the rest of a turn
    (`other_s`) are paid once per turn. Drafting, planning and learning fall away, and plain forwards stand in for the
    verifying ones.

    Args:
        report: Of a generation with speculation, before refresh and sync are added to it.
        num_forwards: Decoding forwards that plain decoding makes for the same tokens.
        forwards_s: Estimated seconds of these; None where nobody knows, and then there is no estimate.
        draws_all: Whether positions after a rejected draft took sampling time, too. `sample_s` is then reduced to the
            share of the tokens that were kept.
    """
    if forwards_s is None:
        return None
    turns_s = (report.commit_s + report.other_s) * num_forwards / max(1, report.num_forwards)
    sample_s = report.sample_s
    if draws_all:
        of_prompts = report.num_tokens - report.num_decoded_tokens
        num_drawn = of_prompts + report.num_request_forwards + sum(report.drafted.values())
        sample_s *= report.num_tokens / max(1, num_drawn)
    return report.prefill_s + sample_s + turns_s + forwards_s + report.audit_s


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(item) for item in value]
    return value
