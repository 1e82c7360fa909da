"""Acceptance, calibrated online: from a speculator's own confidence to the probability that the position is accepted."""

from __future__ import annotations

import numpy as np

_EDGES = np.linspace(-5.0, 5.0, 21)  # in logits of the confidence: fine where it is decided whether a draft pays
_NUM_BINS = len(_EDGES) + 1
_POSITIONS = np.array([0, 1, 2, 4, 8])  # the first draft position of each class
_PRIOR_WEIGHT = 8.0  # observations that a guess is worth in a cell without data
_MEMORY = 2000.0  # observations after which a cell forgets the oldest
_FORGET_AT_UPDATE = 0.7  # what a policy update leaves of the evidence
_SCORE_BINS = 10


class AcceptanceModel:
    """The share of verified drafts that were accepted, by confidence and draft position.

    A cell of little data is shrunk towards its confidence bin over all positions, and that towards the confidence itself:
    a speculator that estimates itself well needs no data, one that boasts at far positions is found out there.

    A position is seen only while every draft before it was accepted (censoring), so what is estimated is acceptance given
    that the prefix stood, which is what a decision about the next slot needs.
    """

    def __init__(self) -> None:
        self._tried = np.zeros((len(_POSITIONS), _NUM_BINS))
        self._accepted = np.zeros((len(_POSITIONS), _NUM_BINS))
        self._scores = np.zeros((3, _SCORE_BINS))  # tried, sum of estimates, accepted; by estimate

    def estimate(self, confidence: np.ndarray) -> np.ndarray:
        """Acceptance probability of each position given its prefix: float64 `[batch, draft_len]`.

        Args:
            confidence: float32 `[batch, draft_len]`, the columns are draft positions 0, 1, ...
        """
        return self._estimate(*_bins(confidence))

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
        accepted = position < num_accepted[:, None]
        tried = position < np.minimum(num_tried, num_accepted + 1)[:, None]
        own, cell = _bins(confidence)
        self._score(self._estimate(own, cell)[tried], accepted[tried])
        flat = _classes(confidence.shape[1])[None] * _NUM_BINS + cell
        size, shape = self._tried.size, self._tried.shape
        self._tried += np.bincount(flat[tried], minlength=size).reshape(shape)
        self._accepted += np.bincount(flat[accepted & tried], minlength=size).reshape(shape)
        excess = np.maximum(1.0, self._tried / _MEMORY)
        self._tried /= excess
        self._accepted /= excess

    def policy_updated(self) -> None:
        """The policy moved: old evidence counts for less."""
        self._tried *= _FORGET_AT_UPDATE
        self._accepted *= _FORGET_AT_UPDATE

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

    def _estimate(self, own: np.ndarray, cell: np.ndarray) -> np.ndarray:
        tried, accepted = self._tried.sum(axis=0)[cell], self._accepted.sum(axis=0)[cell]
        anywhere = (accepted + _PRIOR_WEIGHT * own) / (tried + _PRIOR_WEIGHT)
        where = (_classes(cell.shape[1])[None], cell)
        return (self._accepted[where] + _PRIOR_WEIGHT * anywhere) / (self._tried[where] + _PRIOR_WEIGHT)

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
