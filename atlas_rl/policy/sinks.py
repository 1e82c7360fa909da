"""Attention sinks (gpt-oss, arXiv 2309.17453): one more logit per head in each softmax, whose share goes to no cell.

So attention with a sink is attention without it, times what the sink leaves of the softmax. That takes the logarithm of the
softmax's denominator, which flash attention gives as well.
"""

from __future__ import annotations

import torch


def share_of_cells(log_sums: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What sinks leave of a softmax, float32: `exp(l) / (exp(l) + exp(sink))`, where l is the scores' log-sum-exp."""
    return torch.sigmoid(log_sums.float() - sinks.float())
