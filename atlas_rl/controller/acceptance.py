"""Estimates acceptance: maps a drafter's own confidence to the probability that its draft token is accepted."""

from __future__ import annotations

import math
from collections.abc import Hashable
from itertools import chain

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.controller.slots import LEAST, survival_of

_EDGES = np.linspace(-5.0, 5.0, 21)  # bins of the confidence, in logits: fine where they decide whether a draft pays
_NUM_BINS = len(_EDGES) + 1
_POSITIONS = np.array([0, 1, 2, 4, 8])  # first draft position of each class of positions
_PRIOR_WEIGHT = 8.0  # weight of a cell's prior, in observations
_MEMORY = 2000.0  # observations beyond which a cell scales older ones down
_FORGET_AT_UPDATE = 0.7  # share of the evidence kept at a policy update
_SCORE_BINS = 10
_KEPT_DISTRIBUTIONS = 8  # sampling distributions whose statistics are kept


class AcceptanceModel:
    """Share of draft tokens that were accepted, by confidence and draft position.

    A cell with little data is shrunk towards its confidence bin over all positions, and that bin towards the confidence
    itself. A well-calibrated drafter needs no data; one that is overconfident at far positions is corrected there.

    A position is observed only if every draft token before it was accepted (censoring). The estimate is therefore
    acceptance given an accepted prefix, which is what a decision about the next slot needs.
    """

    def __init__(self) -> None:
        shape = (len(_POSITIONS), _NUM_BINS)
        self._tried, self._accepted = np.zeros(shape), np.zeros(shape)
        self._evidence: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {None: (self._tried, self._accepted)}
        self._scores = np.zeros((3, _SCORE_BINS))  # tried, sum of estimates, accepted; by estimate
        self._lines: tuple[np.ndarray, np.ndarray] | None = None

    def switch_to(self, distribution: Hashable) -> None:
        """Switch to another sampling distribution.

        A new one starts from a discounted copy of the current statistics; a known one resumes its own.

        Args:
            distribution: Key of the distribution, such as the temperature.
        """
        if distribution not in self._evidence:
            if len(self._evidence) == _KEPT_DISTRIBUTIONS:
                del self._evidence[next(iter(self._evidence))]
            worth = _PRIOR_WEIGHT / np.maximum(self._tried.sum(axis=0), _PRIOR_WEIGHT)
            self._evidence[distribution] = self._tried * worth, self._accepted * worth
        self._tried, self._accepted = self._evidence[distribution]
        self._lines = None

    def estimate(self, confidence: np.ndarray) -> np.ndarray:
        """Probability that each position is accepted, given that its prefix was: float64 `[batch, draft_len]`.

        Args:
            confidence: float32 `[batch, draft_len]`, the columns are draft positions 0, 1, ...
        """
        return self._estimate(*_bins(confidence), _classes(confidence.shape[1])[None])

    def survival(self, confidence: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Probability that each position is accepted together with all before it.

        Args:
            confidence: float32 `[batch, draft_len]`.
            lengths: int64 `[batch]`.

        Returns:
            float64 `[batch, MAX_LOOKAHEAD]`, zero past a row's length.
        """
        stands: np.ndarray = survival_of(np.ascontiguousarray(confidence, np.float32), lengths, *self.tables())
        return stands

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The last four arguments of `survival_of`; do not write to them."""
        return _EDGES, _POSITION_CLASSES, *self._lines_now()

    def observe(self, confidence: np.ndarray, num_tried: np.ndarray, num_accepted: np.ndarray) -> None:
        """Learn from drafts whose outcome is known.

        Args:
            confidence: float32 `[batch, draft_len]`.
            num_tried: int64 `[batch]`, positions with a known outcome: the accepted ones, and the rejected one after
                them if there is one.
            num_accepted: int64 `[batch]`.
        """
        if confidence.shape[1] == 0:
            return
        learn_outcomes(
            np.ascontiguousarray(confidence, np.float32), num_tried, num_accepted, _EDGES, _POSITIONS, *self._lines_now(),
            self._tried, self._accepted, self._scores,
        )  # fmt: skip
        excess = np.maximum(1.0, self._tried / _MEMORY)
        self._tried /= excess
        self._accepted /= excess
        self._lines = None
        self._lines_now()  # here and not in a decision: learning runs beside the device

    def policy_updated(self) -> None:
        """The policy changed: older evidence gets less weight."""
        for table in chain.from_iterable(self._evidence.values()):
            table *= _FORGET_AT_UPDATE
        self._lines = None

    def take_calibration(self) -> tuple[int, float]:
        """Draft tokens scored since the last call, and their expected calibration error.

        As in Guo et al., arXiv 1706.04599, eq. 3: the distance between mean estimate and mean outcome within tenths of
        the estimate, averaged over draft tokens. Each estimate is scored before the model learns from its outcome.
        """
        tried, estimates, accepted = self._scores
        total = tried.sum()
        error = float(np.abs(estimates - accepted).sum() / total) if total else 0.0
        self._scores = np.zeros_like(self._scores)
        return int(total), error

    def _estimate(self, own: np.ndarray, cell: np.ndarray, position_class: np.ndarray) -> np.ndarray:
        """Estimate single positions. After both shrinkages it is linear in the confidence: `a + b * own`, by cell."""
        a, b = self._lines_now()
        return a[position_class, cell] + b[position_class, cell] * own

    def _lines_now(self) -> tuple[np.ndarray, np.ndarray]:
        if self._lines is None:
            tried, accepted = self._tried.sum(axis=0), self._accepted.sum(axis=0)
            guess = _PRIOR_WEIGHT / (self._tried + _PRIOR_WEIGHT)
            anywhere = guess / (tried + _PRIOR_WEIGHT)
            self._lines = self._accepted / (self._tried + _PRIOR_WEIGHT) + anywhere * accepted, anywhere * _PRIOR_WEIGHT
        return self._lines


@cached_njit(nogil=True)
def learn_outcomes(
    confidence: np.ndarray,
    num_tried: np.ndarray,
    num_accepted: np.ndarray,
    edges: np.ndarray,
    positions: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    tried: np.ndarray,
    accepted: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Count outcomes by class of position and bin of confidence, and score their estimates, in place.

    Args:
        confidence: float32 `[batch, draft_len]`.
        num_tried: int64 `[batch]`, positions with a known outcome.
        num_accepted: int64 `[batch]`.
        edges: float64 `[n]`, bins of the confidence in logits.
        positions: int64 `[classes]`, first draft position of each class.
        a: float64 `[classes, n + 1]`; the estimate is `a + b * confidence`.
        b: float64 `[classes, n + 1]`.
        tried: float64 `[classes, n + 1]`, updated in place.
        accepted: float64 `[classes, n + 1]`, updated in place.
        scores: float64 `[3, bins]`: tried, sum of estimates, accepted; by estimate, updated in place.
    """
    for row in range(len(num_tried)):
        kind = 0
        for position in range(min(num_tried[row], num_accepted[row] + 1, confidence.shape[1])):
            while kind + 1 < len(positions) and positions[kind + 1] <= position:
                kind += 1
            own = min(max(np.float64(confidence[row, position]), LEAST), 1 - LEAST)
            cell = np.searchsorted(edges, math.log(own / (1 - own)))
            stands = 1.0 if position < num_accepted[row] else 0.0
            estimate = a[kind, cell] + b[kind, cell] * own
            score = min(int(estimate * scores.shape[1]), scores.shape[1] - 1)
            scores[0, score] += 1.0
            scores[1, score] += estimate
            scores[2, score] += stands
            tried[kind, cell] += 1.0
            accepted[kind, cell] += stands


def _bins(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence as float64 inside (0, 1), and its bin."""
    own = np.clip(confidence.astype(np.float64), LEAST, 1 - LEAST)
    return own, np.searchsorted(_EDGES, np.log(own / (1 - own)))


def _classes(draft_len: int) -> np.ndarray:
    """Class of draft position 0, 1, ...: int64 `[draft_len]`."""
    return np.searchsorted(_POSITIONS, np.arange(draft_len), side="right") - 1


_POSITION_CLASSES = _classes(MAX_LOOKAHEAD)
