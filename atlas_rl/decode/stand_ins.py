"""Replaces draft tokens that the policy cannot run, such as unused rows of padded tables with non-finite embeddings.

Such a policy does not sample them, but a drafter may propose them. Their keys and values would be NaN, and a masked
cell of the attention cache still enters as 0 * NaN, at every position of its row. So another token is run in their
place. The draft itself is verified like any other, by the logits before it. The logits after it are not known. They
become NaN, so that a call that reaches them fails as it does without drafts.
"""

from __future__ import annotations

import numpy as np


def stand_in(tokens: np.ndarray, lengths: np.ndarray, unrunnable: np.ndarray) -> np.ndarray:
    """Replace drafts that cannot be run by the last committed token of their request, in place.

    Args:
        tokens: int64 `[sum(lengths)]`, request by request the last committed token and its drafts.
        lengths: int64 `[batch]`.
        unrunnable: bool `[vocab]`, see `PolicyRunner.unrunnable`.

    Returns:
        int64 `[n]`, the places in `tokens` whose logits are not known.
    """
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    replaced = unrunnable[tokens] & (np.arange(len(tokens)) > first)
    so_far = np.cumsum(replaced)
    tokens[replaced] = tokens[first[replaced]]
    return np.flatnonzero(so_far > so_far[first])
