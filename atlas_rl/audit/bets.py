"""Tests whether tokens come from the distribution they should come from, by betting against the sampler.

Each bet is one way to be wrong: a distribution q that depends on the prefix alone. If the tokens x are drawn from p,
the likelihood ratio q(x) / p(x) has mean 1 whatever the prefix. The product over tokens is then a fair game, which
grows only by luck (test martingales: Ville 1939; Shafer et al., arXiv 0912.4269). If the tokens are drawn from q, the
logarithm of the product grows by KL(q, p) per token, and no test with a valid false-alarm rate grows faster. A token
without a choice (p is a point mass) neither wins nor loses, and a completion that ends early only stops the game early.

A sampler may break in the middle of a run, so a new game starts with every step and all games are kept
(Shiryaev-Roberts; e-detectors: Shin, Ramdas, Rinaldo, arXiv 2203.03532). With E_n(k) the product of bet k over step n:

    R_n(k) = (R_{n-1}(k) + 1) E_n(k)             R_n = mean over k of R_n(k)

For a correct sampler `R_n - n` is a martingale. Hence `P(R reaches A within n steps) <= n / A` (Doob), and the mean
number of steps to a false alarm is at least A. Both hold exactly at every sample size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

ALARM = 1e6
"""A of the formulas: the least mean number of audited steps between false alarms."""

TEMPERATURES = (0.25, 0.5, 0.8, 0.93, 1.07, 1.25, 2.0, 4.0)  # factors on the requested temperature
JUNK_SHARES = (0.003, 0.03, 0.3)
TILTS = (-0.2, 0.2)  # log-odds of the likeliest, second and third token, and of tokens that occurred before
ENDING_TILTS = (-1.0, 1.0)
NUM_RANKS = 3

NAMES: tuple[str, ...] = (
    *(f"as if drawn at {t:g} times the temperature" for t in TEMPERATURES),
    *(f"as if {share:.1%} of them were drawn at random" for share in JUNK_SHARES),
    *(
        f"the {rank} token comes too {'often' if tilt > 0 else 'rarely'}"
        for rank in ("likeliest", "second likeliest", "third likeliest")
        for tilt in TILTS
    ),
    *(f"repeated tokens come too {'often' if tilt > 0 else 'rarely'}" for tilt in TILTS),
    *(f"ending tokens come too {'often' if tilt > 0 else 'rarely'}" for tilt in ENDING_TILTS),
)
"""The fault that each bet stands for, in words that end a sentence about sampled tokens."""

STRENGTHS = np.array(
    [
        *(abs(1 / t - 1) for t in TEMPERATURES),
        *JUNK_SHARES,
        *(abs(tilt) for _ in range(NUM_RANKS + 1) for tilt in TILTS),
        *(abs(tilt) for tilt in ENDING_TILTS),
    ]
)
"""Nats by which each bet moves when log p moves by one; its gain from rounding, per token, is in proportion."""


def log_ratios(
    log_probs: torch.Tensor, token_ids: torch.Tensor, seen: torch.Tensor, ending_ids: Sequence[int]
) -> torch.Tensor:
    """log q(x) / p(x) of every bet and token: float64 `[num_bets, rows]`, nats.

    Args:
        log_probs: float32 `[rows, vocab]`, normalised; `-inf` for excluded tokens.
        token_ids: int64 `[rows]`, tokens that are not excluded.
        seen: bool `[rows, vocab]`, tokens that occur before the position, which repetition penalties apply to.
        ending_ids: Tokens that end a completion.
    """
    own = log_probs.gather(1, token_ids[:, None])[:, 0].double()
    ratios = [(1 / t - 1) * own - torch.logsumexp(log_probs * (1 / t), dim=-1).double() for t in TEMPERATURES]
    support = torch.isfinite(log_probs).sum(dim=-1)
    # A token of practically zero probability must not overflow; e^300 is evidence enough.
    inverse = torch.exp(-own.clamp(min=-300.0))
    ratios += [torch.log((1 - share) + share / support * inverse) for share in JUNK_SHARES]
    ranked, tokens = log_probs.topk(min(NUM_RANKS, log_probs.shape[-1]), dim=-1)
    for rank in range(NUM_RANKS):
        if rank < ranked.shape[-1]:
            mass, hit = ranked[:, rank].double().exp(), tokens[:, rank] == token_ids
            ratios += [_tilted(mass, hit, tilt) for tilt in TILTS]
        else:
            ratios += [torch.zeros_like(own) for _ in TILTS]
    repeated, hit = (log_probs.exp() * seen).sum(dim=-1).double(), seen.gather(1, token_ids[:, None])[:, 0]
    ratios += [_tilted(repeated, hit, tilt) for tilt in TILTS]
    ending = torch.as_tensor(sorted(set(ending_ids)), dtype=torch.int64, device=log_probs.device)
    mass, hit = log_probs[:, ending].double().exp().sum(dim=-1), torch.isin(token_ids, ending)
    ratios += [_tilted(mass, hit, tilt) for tilt in ENDING_TILTS]
    return torch.stack(ratios)


def log_values(ratios: torch.Tensor, drift_nats: float) -> np.ndarray:
    """Nats that every bet has won over the tokens of `log_ratios`: float64 `[num_bets]`.

    Args:
        ratios: float64 `[num_bets, rows]`, nats.
        drift_nats: Bound on the change of a token's mean log-likelihood by rounding. Every bet pays for it on every token,
            in proportion to its strength, so that it stays a losing game to first order.
    """
    return ratios.sum(dim=-1).cpu().numpy() - ratios.shape[1] * drift_nats * STRENGTHS


def _tilted(mass: torch.Tensor, hit: torch.Tensor, tilt: float) -> torch.Tensor:
    """log q(x) / p(x) if q scales the odds of an event of probability `mass` by `exp(tilt)`: float64 `[rows]`."""
    return hit * tilt - torch.log1p(mass * math.expm1(tilt))


class ChangeDetector:
    """Adds the bets up over the steps of a run and raises the alarm.

    Args:
        alarm_steps: A in the formulas of the module's docstring.
    """

    def __init__(self, alarm_steps: float = ALARM) -> None:
        self.alarm_nats = math.log(alarm_steps)
        self._log_r = np.full(len(NAMES), -np.inf)

    @property
    def evidence_nats(self) -> float:
        """log R of all bets together, in nats."""
        return float(np.logaddexp.reduce(self._log_r) - math.log(len(NAMES)))

    @property
    def best(self) -> str:
        """The fault that the bet with the largest gains tests for."""
        return NAMES[int(self._log_r.argmax())]

    def step(self, log_values: np.ndarray) -> bool:
        """Add one audited step (float64 `[num_bets]`, nats won) and return whether to raise the alarm."""
        self._log_r = np.logaddexp(self._log_r, 0.0) + log_values
        return self.evidence_nats >= self.alarm_nats

    def reset(self) -> None:
        """Drop all evidence, so that the next alarm needs new evidence."""
        self._log_r = np.full(len(NAMES), -np.inf)
