"""Attention sinks (gpt-oss, arXiv 2309.17453): one extra logit per head in each softmax, without a value.

So attention with a sink is attention without it, times the share of the softmax that the sink leaves. This takes the
logarithm of the softmax's denominator, which flash attention returns as well.
"""

from __future__ import annotations

import torch


def share_of_cells(log_sums: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Share of a softmax left by sinks, float32: `exp(l) / (exp(l) + exp(sink))`, l the log-sum-exp of the scores."""
    return torch.sigmoid(log_sums.float() - sinks.float())
