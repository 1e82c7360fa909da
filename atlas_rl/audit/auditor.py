"""Checks during a run that an engine's samples come from the policy.

An engine that samples wrongly raises no error, and training goes on. So a few completions of a step go through a plain
forward pass of the policy, outside of the engine. Every token is compared with the processed distribution that it should
come from:

    support    no token is excluded by top-k, top-p or min-p
    noise      the token is the one that the noise picks, if the noise is known (drafter-invariant sampling in process) or
               sampling is greedy; one that differs by more than a near-tie is a fault, without any statistics
    logprobs   the returned logprobs are those of the plain forward, within rounding
    law        bets are placed against random tokens (`bets.py`), with at most one false alarm in a million audited steps,
               however small the samples

The choice of completions and of their positions never depends on the tokens to be tested: completions chosen by length would
have more or fewer ending tokens than the policy draws. `docs/audit.md` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_rl.audit.bets import ChangeDetector
from atlas_rl.audit.scores import Scores, Tolerance, score
from atlas_rl.core import SamplingParams

_FEW = 16  # a sum over fewer logprobs is divided by this, so that a single token raises no warning


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of auditing one step.

    Attributes:
        num_completions: Completions audited.
        scores: Scores of their tokens.
        evidence_nats: log R of the run's bets after this step, in nats; an alarm is raised at log 10^6.
        findings: Faults, one sentence each; empty for a correct engine.
    """

    num_completions: int
    scores: Scores
    evidence_nats: float
    findings: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """The audit's fields of a `StepReport`."""
        scores = self.scores
        return {
            "num_audited_tokens": scores.num_tokens,
            "audit_score_nats": scores.score_nats,
            "audit_score_variance_nats2": scores.score_variance_nats2,
            "audit_evidence_nats": self.evidence_nats if math.isfinite(self.evidence_nats) else None,
            "audit_logprob_error_nats": scores.logprob_error_mean_nats if scores.num_logprobs else None,
        }


class Auditor:
    """Audits some completions of every step of a run, and accumulates the evidence over steps.

    The cost is bounded by counting, not by a clock, so that equal runs audit alike. The audit's forward runs at most
    `share` of the tokens generated so far, prompts included; only the last completion may exceed it. A token costs less
    in this forward than in a decode step, so `share` bounds the time as well.

    Args:
        share: Share of the generated tokens that may be audited, in [0, 1]; 0 never audits.

    Attributes:
        engine_dtype: Precision that the engine computes in, if it is not the policy's own; None if unknown.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.detector = ChangeDetector()
        self.engine_dtype: torch.dtype | None = None
        self._credit_tokens = 1.0 if share else 0.0  # the first completion of a run is audited at once, on credit
        self._num_calls = 0

    def audit(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        logprobs: Sequence[Sequence[float]] | None = None,
        noise_keys: np.ndarray | None = None,
    ) -> Audit:
        """Audit as many completions of a step as the share allows, chosen at random.

        Args:
            model: The policy that the completions should come from, in process, as its trainer runs it, with wrappers
                and mixed precision. Each rank audits its own completions.
            prompts: Token ids, one prompt per completion.
            completions: Token ids exactly as sampled, ending tokens included; empty ones are skipped.
            sampling: Sampling parameters that the engine was given.
            logprobs: Per completion token, in nats, as the engine returned them; None if it returns none.
            noise_keys: uint64 `[num_completions]`, keys that the engine drew with (`atlas_kernels.noise`); None if it
                draws with other noise.

        Raises:
            ValueError: Prompts, completions and rows of logprobs differ in number.
        """
        lengths = [len(completions), len(prompts), len(completions if logprobs is None else logprobs)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"one prompt and one row of logprobs per completion is needed, got {lengths[1:]} for {lengths[0]}"
            )
        self._credit_tokens += self.share * sum(map(len, completions))
        total, num_completions = Scores.none(), 0
        for row in self._rows(prompts, completions, sampling):
            own_logprobs = None if logprobs is None else logprobs[row]
            key = None if noise_keys is None else int(noise_keys[row])
            total.add(
                score(
                    model,
                    prompts[row],
                    completions[row],
                    sampling,
                    logprobs=own_logprobs,
                    noise_key=key,
                    low_precision=self.engine_dtype not in (None, torch.float32),
                )
            )
            num_completions += 1
        alarm = total.num_tokens > 0 and self.detector.step(total.bets)
        findings = tuple(self._findings(total, total.tolerance(sampling.temperature), alarm))
        audit = Audit(num_completions, total, self.detector.evidence_nats, findings)
        if alarm:
            self.detector.reset()
        return audit

    def _rows(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Iterator[int]:
        """Indices of completions in random order while credit lasts; a long one may leave a debt for later steps."""
        order = np.random.default_rng((sampling.seed, self._num_calls)).permutation(len(completions))
        self._num_calls += 1
        for row in order.tolist():
            if self._credit_tokens <= 0:
                return
            if len(completions[row]):
                self._credit_tokens -= len(prompts[row]) + len(completions[row])
                yield row

    def _findings(self, scores: Scores, tolerance: Tolerance, alarm: bool) -> Iterator[str]:
        of = f"of {scores.num_tokens} audited tokens"
        if scores.num_outside:
            yield (
                f"audit: {scores.num_outside} {of} have probability 0 under the policy's processed distribution: the engine "
                "ignores top-k, top-p or min-p, or samples from other weights"
            )
        if scores.num_changed:
            yield (
                f"audit: {scores.num_changed} {of} are not the policy's choice (worst by {scores.worst_margin_nats:.2g} "
                "nats): the engine's forward pass or its sampler differs from the policy's"
            )
        yield from _logprob_findings(scores, tolerance)
        if alarm:
            z = "" if scores.z is None else f", z {scores.z:+.1f} in this step"
            yield (
                f"audit: the sampled tokens are not drawn from the policy; {self.detector.best} (evidence "
                f"e^{self.detector.evidence_nats:.0f}{z}, {of.removeprefix('of ')})"
            )


def _logprob_findings(scores: Scores, tolerance: Tolerance) -> Iterator[str]:
    count = max(_FEW, scores.num_logprobs)
    if scores.logprob_clipped_sum_nats / count <= tolerance.logprob_nats:
        return
    cause = "the engine holds other weights than the policy, or another sampling distribution"
    if scores.raw_clipped_sum_nats / count <= tolerance.logprob_nats:
        cause = "they are taken before temperature and truncation (vLLM: logprobs_mode='processed_logprobs')"
    yield (
        f"audit: returned logprobs differ from a plain forward pass by {scores.logprob_error_mean_nats:.2g} nats on "
        f"average, {scores.logprob_error_max_nats:.2g} at most: {cause}"
    )
