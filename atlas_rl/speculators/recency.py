"""Weights of training data by age: what an older policy drew teaches less about the present one."""

from __future__ import annotations

import numpy as np

_HALVED_AFTER_UPDATES = 4.0
_MOST_HALVINGS = 60.0  # a weight of 1e-18; a weight that is 0 could not be drawn at all


def recency(ages: np.ndarray) -> np.ndarray:
    """Relative weights, float64 `[n]`: halved every four policy updates, and 1 for the newest data.

    They count from the newest data, and none is 0: versions may jump by any number when a server or a stand-alone user
    names them.

    Args:
        ages: int64 `[n]`, policy versions between the one that drew each piece and the present one; at least one piece.
    """
    return 0.5 ** np.minimum((ages - ages.min()) / _HALVED_AFTER_UPDATES, _MOST_HALVINGS)
