"""Acceptance, calibrated online: from a speculator's own confidence to the probability that the position is accepted."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain

import numpy as np

_EDGES = np.linspace(-5.0, 5.0, 21)  # in logits of the confidence: fine where it is decided whether a draft pays
_NUM_BINS = len(_EDGES) + 1
_POSITIONS = np.array([0, 1, 2, 4, 8])  # the first draft position of each class
_PRIOR_WEIGHT = 8.0  # observations that a guess is worth in a cell without data
_MEMORY = 2000.0  # observations after which a cell forgets the oldest
_FORGET_AT_UPDATE = 0.7  # what a policy update leaves of the evidence
_SCORE_BINS = 10
_KEPT_WAYS = 8  # ways of drawing tokens whose evidence is kept


class AcceptanceModel:
    """The share of verified drafts that were accepted, by confidence and draft position.

    A cell of little data is shrunk towards its confidence bin over all positions, and that towards the confidence itself:
    a speculator that estimates itself well needs no data, one that boasts at far positions is found out there.

    A position is seen only while every draft before it was accepted (censoring), so what is estimated is acceptance given
    that the prefix stood, which is what a decision about the next slot needs.
    """

    def __init__(self) -> None:
        shape = (len(_POSITIONS), _NUM_BINS)
        self._tried, self._accepted = np.zeros(shape), np.zeros(shape)
        self._evidence: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {None: (self._tried, self._accepted)}
        self._scores = np.zeros((3, _SCORE_BINS))  # tried, sum of estimates, accepted; by estimate
        self._lines: tuple[np.ndarray, np.ndarray] | None = None

    def drawn(self, how: Hashable) -> None:
        """From here on tokens are drawn in this way: what was learned of another is a first guess at it, and no more.

        What was learned of this one, before another came between, holds again.

        Args:
            how: Whatever tells ways apart, such as the temperature.
        """
        if how not in self._evidence:
            if len(self._evidence) == _KEPT_WAYS:
                del self._evidence[next(iter(self._evidence))]
            worth = _PRIOR_WEIGHT / np.maximum(self._tried.sum(axis=0), _PRIOR_WEIGHT)
            self._evidence[how] = self._tried * worth, self._accepted * worth
        self._tried, self._accepted = self._evidence[how]
        self._lines = None

    def estimate(self, confidence: np.ndarray) -> np.ndarray:
        """Acceptance probability of each position given its prefix: float64 `[batch, draft_len]`.

        Args:
            confidence: float32 `[batch, draft_len]`, the columns are draft positions 0, 1, ...
        """
        return self._estimate(*_bins(confidence), _classes(confidence.shape[1])[None])

    def observe(self, confidence: np.ndarray, num_tried: np.ndarray, num_accepted: np.ndarray) -> None:
        """Learn from drafts whose fate is known.

        Args:
            confidence: float32 `[batch, draft_len]`.
            num_tried: int64 `[batch]`, positions whose acceptance is known: those accepted and, where one was rejected
                after them, that one.
            num_accepted: int64 `[batch]`.
        """
        if confidence.shape[1] == 0:
            return
        position = np.arange(confidence.shape[1])[None]
        tried = position < np.minimum(num_tried, num_accepted + 1)[:, None]
        accepted = (position < num_accepted[:, None])[tried]
        own, cell = _bins(confidence[tried])
        position_class = np.broadcast_to(_classes(confidence.shape[1]), tried.shape)[tried]
        self._score(self._estimate(own, cell, position_class), accepted)
        np.add.at(self._tried, (position_class, cell), 1.0)
        np.add.at(self._accepted, (position_class, cell), accepted)
        excess = np.maximum(1.0, self._tried / _MEMORY)
        self._tried /= excess
        self._accepted /= excess
        self._lines = None

    def policy_updated(self) -> None:
        """The policy moved: old evidence counts for less."""
        for table in chain.from_iterable(self._evidence.values()):
            table *= _FORGET_AT_UPDATE
        self._lines = None

    def take_calibration(self) -> tuple[int, float]:
        """Drafts scored since the last call, and their expected calibration error (Guo et al., arXiv 1706.04599, eq. 3).

        Each estimate is scored before its outcome is learned from; the error is the mean over drafts of the distance
        between estimate and outcome, both averaged within tenths of the estimate.
        """
        tried, estimates, accepted = self._scores
        total = tried.sum()
        error = float(np.abs(estimates - accepted).sum() / total) if total else 0.0
        self._scores = np.zeros_like(self._scores)
        return int(total), error

    def _estimate(self, own: np.ndarray, cell: np.ndarray, position_class: np.ndarray) -> np.ndarray:
        """Shrunk twice, an estimate is a line in the confidence: `a + b * own` with `a`, `b` of the cell."""
        if self._lines is None:
            tried, accepted = self._tried.sum(axis=0), self._accepted.sum(axis=0)
            guess = _PRIOR_WEIGHT / (self._tried + _PRIOR_WEIGHT)
            anywhere = guess / (tried + _PRIOR_WEIGHT)
            self._lines = self._accepted / (self._tried + _PRIOR_WEIGHT) + anywhere * accepted, anywhere * _PRIOR_WEIGHT
        a, b = self._lines
        return a[position_class, cell] + b[position_class, cell] * own

    def _score(self, estimates: np.ndarray, accepted: np.ndarray) -> None:
        bins = np.minimum((estimates * _SCORE_BINS).astype(np.int64), _SCORE_BINS - 1)
        for row, weights in zip(self._scores, (None, estimates, accepted), strict=True):
            row += np.bincount(bins, weights=weights, minlength=_SCORE_BINS)


def _bins(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence as float64 inside (0, 1), and its bin."""
    own = np.clip(confidence.astype(np.float64), 1e-4, 1 - 1e-4)
    return own, np.searchsorted(_EDGES, np.log(own / (1 - own)))


def _classes(draft_len: int) -> np.ndarray:
    """Class of draft position 0, 1, ...: int64 `[draft_len]`."""
    return np.searchsorted(_POSITIONS, np.arange(draft_len), side="right") - 1
