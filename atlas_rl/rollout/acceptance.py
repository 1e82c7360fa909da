"""Acceptance, calibrated online: from a speculator's own confidence to the probability that the position is accepted."""

from __future__ import annotations

import numpy as np

_EDGES = np.linspace(-5.0, 5.0, 21)  # in logits of the confidence: fine where it is decided whether a draft pays
_PRIOR_WEIGHT = 8.0  # observations that the speculator's own confidence is worth in a bin without data
_MEMORY = 2000.0  # observations after which a bin forgets the oldest
_FORGET_AT_UPDATE = 0.7  # what a policy update leaves of the evidence


class AcceptanceModel:
    """Per confidence bin, the share of verified drafts that were accepted, shrunk towards the confidence itself.

    A position is seen only while every draft before it was accepted (censoring), so what is estimated is acceptance given
    that the prefix stood, which is what a decision about the next slot needs.
    """

    def __init__(self) -> None:
        self._tried = np.zeros(len(_EDGES) + 1)
        self._accepted = np.zeros(len(_EDGES) + 1)

    def estimate(self, confidence: np.ndarray) -> np.ndarray:
        """Acceptance probability of each position given its prefix: float64, shape of `confidence`."""
        own = np.clip(confidence.astype(np.float64), 1e-4, 1 - 1e-4)
        cell = self._bins(own)
        return (self._accepted[cell] + _PRIOR_WEIGHT * own) / (self._tried[cell] + _PRIOR_WEIGHT)

    def observe(self, confidence: np.ndarray, num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """Learn from verified drafts.

        Args:
            confidence: float32 `[batch, draft_len]`.
            num_drafted: int64 `[batch]`, verified draft tokens.
            num_accepted: int64 `[batch]`.
        """
        if confidence.shape[1] == 0:
            return
        position = np.arange(confidence.shape[1])[None]
        accepted = position < num_accepted[:, None]
        rejected = (position == num_accepted[:, None]) & (position < num_drafted[:, None])
        cell = self._bins(np.clip(confidence.astype(np.float64), 1e-4, 1 - 1e-4))
        size = len(self._tried)
        hits = np.bincount(cell[accepted], minlength=size)
        self._accepted += hits
        self._tried += hits + np.bincount(cell[rejected], minlength=size)
        excess = np.maximum(1.0, self._tried / _MEMORY)
        self._tried /= excess
        self._accepted /= excess

    def policy_updated(self) -> None:
        """The policy moved: old evidence counts for less."""
        self._tried *= _FORGET_AT_UPDATE
        self._accepted *= _FORGET_AT_UPDATE

    @staticmethod
    def _bins(probability: np.ndarray) -> np.ndarray:
        return np.searchsorted(_EDGES, np.log(probability / (1 - probability)))
