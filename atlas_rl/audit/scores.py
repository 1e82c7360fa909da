"""Compares tokens that an engine has sampled with a plain forward pass of the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from atlas_kernels import noise
from atlas_kernels.noise import Stream
from atlas_rl.audit import bets as audit_bets
from atlas_rl.audit.plain_forward import plain_logits
from atlas_rl.core import SamplingParams
from atlas_rl.policy.current_device import on_device
from atlas_rl.policy.threads import evaluation_mode
from atlas_rl.policy.unwrap import unwrap_policy
from atlas_rl.sampling.processing import process
from atlas_rl.sampling.verification import choose

_POSITIONS = 1024  # most audited positions of a completion: bounds the memory of their logits
_CHUNK_ROWS = 64  # positions processed together: bounds the float32 copies


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Differences in nats between an engine and a plain forward pass that rounding explains.

    Attributes:
        logprob_nats: Mean absolute difference of returned logprobs. Each difference is clipped at ten times this value,
            because a token at the threshold of truncation may be far off.
        margin_nats: Margin by which a token may miss being the one that the noise picks, or the likeliest if greedy.
        drift_nats: Mean signed difference of a token's log-likelihood.
        logit_share: Share of a logit by which that margin grows: numbers are stored with an error relative to their size.
    """

    logprob_nats: float
    margin_nats: float
    drift_nats: float
    logit_share: float = 0.0

    def at(self, temperature: float) -> Tolerance:
        """The tolerance for logits divided by `temperature`, which also scales their rounding."""
        scale = 1 / temperature if 0 < temperature < 1 else 1.0
        return Tolerance(
            logprob_nats=self.logprob_nats * scale,
            margin_nats=self.margin_nats * scale,
            drift_nats=self.drift_nats * scale,
            logit_share=self.logit_share * scale,
        )


FULL_PRECISION = Tolerance(logprob_nats=1e-3, margin_nats=1e-2, drift_nats=1e-5)
LOW_PRECISION = Tolerance(logprob_nats=0.05, margin_nats=0.5, drift_nats=2e-3, logit_share=4 * 2**-8)
"""bfloat16 stores a number with an error of at most 2**-8 of it, here two logits in each of two forward passes."""


@dataclass(slots=True)
class Scores:
    """Sums over audited tokens, which add up over completions.

    Attributes:
        num_tokens: Tokens audited.
        score_nats: Sum of log p(x) + H(p): its expectation is 0 for a correct sampler, above 0 for one that is too
            greedy.
        score_variance_nats2: Sum of the variances of log p(x) under p.
        bets: float64 `[num_bets]`, nats that each bet has won.
        num_outside: Tokens that the processing excludes.
        num_known: Tokens that can be computed, because their noise is known or sampling is greedy.
        num_changed: Known tokens that differ from the computed ones by more than rounding.
        worst_margin_nats: Largest margin by which such a token differed.
        num_logprobs: Returned logprobs compared.
        logprob_error_sum_nats: Sum of their absolute differences.
        logprob_error_max_nats: The largest absolute difference.
        logprob_clipped_sum_nats: Sum of the absolute differences, clipped as in `Tolerance.logprob_nats`.
        raw_clipped_sum_nats: The same, against the policy's logprobs before any processing.
        low_precision: Whether the policy or its engine computed any part in less than float32.
    """

    num_tokens: int
    score_nats: float
    score_variance_nats2: float
    bets: np.ndarray
    num_outside: int = 0
    num_known: int = 0
    num_changed: int = 0
    worst_margin_nats: float = 0.0
    num_logprobs: int = 0
    logprob_error_sum_nats: float = 0.0
    logprob_error_max_nats: float = 0.0
    logprob_clipped_sum_nats: float = 0.0
    raw_clipped_sum_nats: float = 0.0
    low_precision: bool = False

    @classmethod
    def none(cls) -> Scores:
        """Empty scores."""
        return cls(0, 0.0, 0.0, np.zeros(len(audit_bets.NAMES)))

    def add(self, other: Scores) -> None:
        """Add the tokens of `other`."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            worst = name in ("worst_margin_nats", "logprob_error_max_nats", "low_precision")
            setattr(self, name, max(mine, theirs) if worst else mine + theirs)

    @property
    def z(self) -> float | None:
        """`score_nats` in standard deviations, about normal over many tokens; None if no token was random."""
        return self.score_nats / math.sqrt(self.score_variance_nats2) if self.score_variance_nats2 > 0 else None

    def tolerance(self, temperature: float) -> Tolerance:
        """Differences that rounding explains, for tokens drawn at `temperature`."""
        return (LOW_PRECISION if self.low_precision else FULL_PRECISION).at(temperature)

    @property
    def logprob_error_mean_nats(self) -> float:
        """Mean absolute difference of returned logprobs; 0 if none were returned."""
        return self.logprob_error_sum_nats / max(1, self.num_logprobs)


def score(
    model: nn.Module,
    prompt: Sequence[int],
    completion: Sequence[int],
    sampling: SamplingParams,
    *,
    logprobs: Sequence[float] | None = None,
    noise_key: int | None = None,
    low_precision: bool = False,
) -> Scores:
    """Compare one completion with a plain forward pass of the policy.

    Args:
        model: The policy as its trainer runs it, wrappers included; dropout is switched off during the forward.
        prompt: Token ids.
        completion: Token ids as sampled, the ending token included.
        sampling: Sampling parameters that the engine was given.
        logprobs: Logprob of each completion token, in nats, as the engine returned them; None if it returned none.
        noise_key: Key of the noise (`noise.request_keys`) for drafter-invariant sampling; None if unknown.
        low_precision: Whether the engine computes in less than float32. The policy's own precision is observed.
    """
    # Long completions are audited at every second, third, ... position. The stride depends on the requested length: the
    # sampled length depends on the tokens to be tested.
    stride = -(-sampling.max_new_tokens // _POSITIONS)
    kept = np.arange(0, len(completion), stride)
    total = Scores.none()
    if not len(kept):
        return total
    device = unwrap_policy(model).get_input_embeddings().weight.device
    tokens = torch.tensor([*prompt, *completion], device=device)
    returned = (
        None if logprobs is None else torch.tensor(logprobs, dtype=torch.float64, device="cpu")[torch.from_numpy(kept)]
    )
    places = torch.from_numpy(kept + len(prompt) - 1).to(device)
    with on_device(device), torch.no_grad(), evaluation_mode(model):
        plain = plain_logits(model, tokens[:-1], places)
        total.low_precision = low_precision or not plain.full_precision
        tolerance = total.tolerance(sampling.temperature)
        for begin in range(0, len(kept), _CHUNK_ROWS):
            part = slice(begin, begin + _CHUNK_ROWS)
            rows = _Rows(plain.logits[part].float().clone(), tokens, places[part] + 1, sampling, tolerance)
            total.add(rows.scores(None if returned is None else returned[part], noise_key))
    return total


class _Rows:
    """Some positions of one completion.

    Args:
        raw: float32 `[rows, vocab]`, logits before any processing.
        tokens: int64 `[num_tokens]`, prompt and completion.
        places: int64 `[rows]`, index in `tokens` of the token that each row predicts.
        sampling: Sampling parameters that the engine was given.
        tolerance: Differences that rounding explains.
    """

    def __init__(
        self,
        raw: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor,
        sampling: SamplingParams,
        tolerance: Tolerance,
    ) -> None:
        self.raw, self.sampling, self.tolerance = raw, sampling, tolerance
        self.places, self.own = places, tokens[places]
        order = torch.arange(len(tokens), device=tokens.device)
        first = torch.full((raw.shape[-1],), len(tokens), device=tokens.device, dtype=torch.int64)
        self.seen = first.scatter_reduce(0, tokens, order, "amin")[None] < places[:, None]
        self.prefixes = None
        if sampling.repetition_penalty != 1:
            self.prefixes = torch.where(order < places[:, None], tokens, tokens[0])
        self.log_probs = process(raw.clone(), sampling, self.prefixes).log_softmax(dim=-1)

    def scores(self, returned: torch.Tensor | None, noise_key: int | None) -> Scores:
        own = self.log_probs.gather(1, self.own[:, None])[:, 0].double()
        inside = torch.isfinite(own)
        found = self._law(inside)
        found.num_tokens = len(own)
        found.num_outside = self._num_outside(~inside)
        self._known(found, noise_key, inside)
        if returned is not None:
            self._logprobs(found, returned.to(own.device), own, inside)
        return found

    def _law(self, inside: torch.Tensor) -> Scores:
        """Score and bets of the tokens; empty for greedy sampling, which draws nothing."""
        if self.sampling.greedy:
            return Scores.none()
        log_probs, own = self.log_probs[inside], self.own[inside]
        probs = log_probs.exp()
        # Includes tokens that the policy masks with its type's least number, whose square is infinite.
        finite = log_probs.masked_fill(probs == 0, 0.0)
        entropy = -torch.linalg.vecdot(probs, finite)
        variance = (torch.linalg.vecdot(probs, finite.square()) - entropy.square()).clamp(min=0)
        drawn = log_probs.gather(1, own[:, None])[:, 0]
        ratios = audit_bets.log_ratios(log_probs, own, self.seen[inside], self.sampling.eos_token_ids)
        bets = audit_bets.log_values(ratios, self.tolerance.drift_nats)
        return Scores(0, float((drawn + entropy).double().sum()), float(variance.double().sum()), bets)

    def _excluded(self, rows: torch.Tensor, token_ids: torch.Tensor, shift_nats: float) -> torch.Tensor:
        """Whether each of `token_ids` int64 `[n]` is excluded at `rows` if its logit is shifted: bool `[n]`."""
        shifted = self.raw[rows]
        shift = torch.full(
            (len(rows), 1), shift_nats * (self.sampling.temperature or 1), device=shifted.device, dtype=shifted.dtype
        )
        shifted.scatter_add_(1, token_ids[:, None], shift)
        prefixes = None if self.prefixes is None else self.prefixes[rows]
        return ~torch.isfinite(process(shifted, self.sampling, prefixes).gather(1, token_ids[:, None])[:, 0])

    def _num_outside(self, outside: torch.Tensor) -> int:
        """Number of excluded tokens, except those that rounding alone may have excluded."""
        rows = outside.nonzero()[:, 0]
        return int(self._excluded(rows, self.own[rows], self.tolerance.margin_nats).sum()) if len(rows) else 0

    def _known(self, found: Scores, noise_key: int | None, inside: torch.Tensor) -> None:
        """Compare tokens with those that the run's noise picks, or with the likeliest if sampling is greedy."""
        if noise_key is None and not self.sampling.greedy:
            return
        places, own = self.places.cpu().numpy(), self.own.cpu().numpy()
        keys = np.full(len(own), noise_key or 0, np.uint64)
        expected = choose(self.log_probs.exp(), keys, places, Stream.TARGET, self.sampling.greedy)
        found.num_known = len(own)
        # Excluded tokens are counted in `num_outside`.
        for row in np.flatnonzero((expected != own) & inside.cpu().numpy()):
            right, drawn = self.log_probs[row, [expected[row], own[row]]].double().tolist()
            if not self.sampling.greedy:
                right -= math.log(noise.exponential(keys[row], places[row], expected[row], int(Stream.TARGET)))
                drawn -= math.log(noise.exponential(keys[row], places[row], own[row], int(Stream.TARGET)))
            margin = right - drawn
            stored = self.tolerance.logit_share * float(self.raw[row, [expected[row], own[row]]].abs().max())
            if margin > self.tolerance.margin_nats + stored and not self._on_the_edge(int(row), int(expected[row])):
                found.num_changed += 1
                found.worst_margin_nats = max(found.worst_margin_nats, margin)

    def _on_the_edge(self, row: int, token: int) -> bool:
        """Whether rounding alone may have excluded the token that the noise picks."""
        at, tokens = torch.tensor([row], device=self.raw.device), torch.tensor([token], device=self.raw.device)
        return bool(self._excluded(at, tokens, -self.tolerance.margin_nats)[0])

    def _logprobs(self, found: Scores, returned: torch.Tensor, own: torch.Tensor, inside: torch.Tensor) -> None:
        clip = 10 * self.tolerance.logprob_nats
        error = (returned - own)[inside].abs()
        raw = self.raw.log_softmax(dim=-1).gather(1, self.own[:, None])[:, 0]
        found.num_logprobs = len(error)
        found.logprob_error_sum_nats = float(error.sum())
        found.logprob_error_max_nats = float(error.max()) if len(error) else 0.0
        found.logprob_clipped_sum_nats = float(error.clamp(max=clip).sum())
        found.raw_clipped_sum_nats = float((returned - raw)[inside].abs().clamp(max=clip).sum())
