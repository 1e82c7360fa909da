"""Averages the heads of several ranks, so that all drafts benefit from what one rank learned.

Hidden states are too large to exchange, weights are not. A head becomes a vector that ranks can sum. Ranks know
different tokens, so biases are stored by the policy's ids, each with a count of the ranks that have it.
"""

from __future__ import annotations

import numpy as np
import torch

from atlas_rl.speculators.recurrent.head import RecurrentHead


def summand(head: RecurrentHead, ids: np.ndarray, vocab_size: int, *, learned: bool) -> torch.Tensor:
    """A rank's summand: float32 `[n]`, of equal length for all heads of a policy.

    Args:
        head: This rank's head.
        ids: int64 `[vocab]`, the policy's ids of the tokens that it can propose.
        vocab_size: The policy's vocabulary size.
        learned: Whether it has learned since the last mean. If not, or if a weight is not finite, its summand is zero.
    """
    with torch.no_grad():
        biases, known = head.bias.new_zeros(2, vocab_size)
        index = torch.from_numpy(ids).to(biases.device)
        biases[index], known[index] = head.bias, 1.0
        vector = torch.cat([*(each.flatten() for each in _weights(head)), biases, known, known.new_ones(1)])
        return vector if learned and bool(torch.isfinite(vector).all()) else torch.zeros_like(vector)


def take_mean(head: RecurrentHead, ids: np.ndarray, total: torch.Tensor) -> bool:
    """Set a head to the mean of all heads that have learned; `total` is the sum over ranks.

    Returns:
        Whether any rank had learned; if not, nothing changes.
    """
    total = total.to(head.bias.device)
    num_learned = float(total[-1])
    if not num_learned:
        return False
    weights = _weights(head)
    sizes = [each.numel() for each in weights]
    vocab_size = (len(total) - 1 - sum(sizes)) // 2
    *parts, biases, known, _ = total.split([*sizes, vocab_size, vocab_size, 1])
    index = torch.from_numpy(ids).to(total.device)
    with torch.no_grad():
        for weight, part in zip(weights, parts, strict=True):
            weight.copy_((part / num_learned).view_as(weight))
        # A token that no rank's summand has keeps its bias on this rank.
        mean = biases[index] / known[index].clamp(min=1.0)
        head.bias.copy_(torch.where(known[index] > 0, mean, head.bias))
    return True


def _weights(head: RecurrentHead) -> list[torch.nn.Parameter]:
    """All learned weights except the biases of tokens."""
    return [parameter for parameter in head.parameters() if parameter is not head.bias]
