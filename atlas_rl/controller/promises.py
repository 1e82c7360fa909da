"""Compares predicted with reached goodput, per drafter and for steps with and without drafts.

The controller chooses what looks best, so its predictions are optimistic about the choice. It therefore discounts the
predicted goodput of drafting by what such steps reached so far, and pauses planning if nothing ever pays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from atlas_rl.controller.acceptance import AcceptanceModel
from atlas_rl.controller.cost import DraftCost
from atlas_rl.controller.draft_forecast import DraftForecast

_KEPT_STEPS = 20.0  # steps that a running mean remembers
_KEPT_PRIOR_STEPS, _KEPT_PRIOR_SPREAD = 3.0, 0.1  # before any evidence, as if three steps had missed by a tenth
_OUTLIER = 0.25  # bound on one step's log ratio: a larger miss means an interruption
_DOUBT_FADES = 0.01  # per step without drafts: a hundred of them forget most of the evidence against drafting
_PATIENCE = 3  # plans in a row without asking a drafter; planning pauses after the next one
_LONGEST_PAUSE = 8  # steps
# Batches of which the smaller has at least this share of the larger's requests are about the same. A pause ends when the
# batch falls below it: drafting may pay for a smaller batch.
_SAME_BATCH = 7 / 8


class Prediction(NamedTuple):
    """Tokens that a step is expected to commit, and the seconds it is expected to take without drafting."""

    tokens: float
    seconds: float


class Promise(NamedTuple):
    """Goodput of the step, drafting included, expected when `drafter` was asked."""

    drafter: str
    goodput: float


@dataclass(slots=True)
class Kept:
    """Mean share of its predicted goodput that one kind of step reaches.

    Attributes:
        mean: Running mean of log(realised / predicted).
        variance: Running variance of the same.
        num_steps: Steps behind both, at most `_KEPT_STEPS`.
    """

    mean: float = 0.0
    variance: float = _KEPT_PRIOR_SPREAD**2
    num_steps: float = _KEPT_PRIOR_STEPS

    def observe(self, goodput: float, predicted: float) -> None:
        """A step of this kind reached `goodput` tokens per second; `predicted` was expected."""
        surprise = min(max(math.log(goodput / predicted), -_OUTLIER), _OUTLIER)
        self.num_steps = min(self.num_steps + 1, _KEPT_STEPS)
        deviation = surprise - self.mean
        self.mean += deviation / self.num_steps
        self.variance += (deviation**2 - self.variance) / self.num_steps

    def fade(self, towards: float) -> None:
        """A step of another kind passed: the mean drifts to `towards`."""
        self.mean += _DOUBT_FADES * (towards - self.mean)


def discount(drafted: Kept, plain: Kept) -> float:
    """Factor on the predicted goodput of drafting: the share that steps with drafts reach, relative to plain steps.

    It covers everything that the models do not see: sampling rounds, bookkeeping, a ragged batch, and the optimism of
    choosing what looked best. One standard error is subtracted as well: a gain within the noise of step times is not
    worth the risk of a loss.
    """
    # Step times are equally noisy with and without drafts: one pooled variance, so that plain steps inform it too.
    num_steps = drafted.num_steps + plain.num_steps
    variance = (drafted.variance * drafted.num_steps + plain.variance * plain.num_steps) / num_steps
    error = math.sqrt(variance / drafted.num_steps + variance / plain.num_steps)
    return math.exp(min(0.0, drafted.mean - plain.mean) - error)


@dataclass(slots=True)
class DrafterModel:
    """Everything that the controller has learned about one drafter.

    Attributes:
        acceptance: Probability that its draft tokens are accepted.
        forecast: Forecasts its drafts before they are made.
        cost: Seconds of its calls.
        kept: Share of the goodput predicted when it was asked that was reached, drafting included.
    """

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    forecast: DraftForecast = field(default_factory=DraftForecast)
    cost: DraftCost = field(default_factory=DraftCost)
    kept: Kept = field(default_factory=Kept)


@dataclass(slots=True)
class Pause:
    """Skips planning if plans never ask a drafter, because a plan costs as much as a few draft tokens.

    The first vain plan beyond `_PATIENCE` is followed by one skipped step, the next by two, and so on up to
    `_LONGEST_PAUSE`.

    Attributes:
        num_vain: Plans in a row that asked nobody.
        steps_left: Steps to the next plan.
        batch: Requests at the latest plan.
    """

    num_vain: int = 0
    steps_left: int = 0
    batch: int = 0

    def holds(self, batch: int) -> bool:
        """Whether to skip planning a step of `batch` requests. Counts down: call it once per step."""
        if not _SAME_BATCH * self.batch <= batch <= self.batch:
            self.steps_left = 0
        self.steps_left -= self.steps_left > 0
        return self.steps_left > 0

    def observe(self, batch: int, asked: bool) -> None:
        """A step was planned; `asked` says whether a drafter was asked because it was expected to pay."""
        self.num_vain = 0 if asked else self.num_vain + 1
        self.steps_left, self.batch = min(max(0, self.num_vain - _PATIENCE), _LONGEST_PAUSE) + 1, batch
