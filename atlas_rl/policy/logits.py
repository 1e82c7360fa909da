"""Finds logits that are not a distribution, and compares logits that have masked tokens.

A row of logits is not a distribution if it holds NaN or +inf, or only -inf. Its softmax is then NaN at every token, and
so is the row's largest probability. Sampling computes that largest probability for the report anyway, so the check is
free. A policy may mask tokens itself, by -inf or by the least number of its type.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

_SURELY_MASKED_NATS = 100.0  # below the likeliest token, where float32 resolves no probability


class NonFiniteLogits(ValueError):
    """The policy's logits are not a distribution, so no token can be drawn."""


def require_distributions(max_probs: np.ndarray, logits: torch.Tensor, rows: np.ndarray | None = None) -> None:
    """Raise unless every row of the policy's logits is a distribution.

    Args:
        max_probs: float32 `[n]`, the largest probability of each row's softmax (`atlas_kernels.verify` gives it too).
        logits: `[rows, vocab]`, raw or processed; read only if something is wrong.
        rows: int64 `[n]`, the row of `logits` for each of `max_probs`; None for all in order.

    Raises:
        NonFiniteLogits: A row is not a distribution; the message gives likely causes and what to do.
    """
    lost = np.flatnonzero(np.isnan(max_probs))
    if len(lost):
        found, cause = defect(logits[int(lost[0] if rows is None else rows[lost[0]])])
        raise NonFiniteLogits(
            f"the policy's logits are not finite: {found} at {len(lost)} of {len(max_probs)} positions of this step. "
            f"Nothing was returned. Likely causes: {cause}. This names the weights: "
            "[name for name, weight in model.named_parameters() if not weight.isfinite().all()]"
        )


def defect(row: torch.Tensor) -> tuple[str, str]:
    """Describes why a row of logits, `[vocab]`, is not a distribution, with likely causes."""
    if row.isnan().any():
        return (
            "NaN",
            "weights that are NaN or infinite (a diverged update, a damaged checkpoint), or a float16 overflow",
        )
    if row.isposinf().any():
        return "+inf", "infinite weights, a float16 overflow (use bfloat16), or a mask that adds infinity"
    return "-inf for every token", "a mask that excludes the whole vocabulary, or infinite weights"


def rows_not_finite(table: torch.Tensor, num_rows: int) -> np.ndarray | None:
    """Which of the first rows of a table hold NaN or infinity: bool `[num_rows]`; None if none does.

    Tables are large: one reduction checks the whole table, and rows are checked only if it finds something.
    """
    if type(table) not in (torch.Tensor, nn.Parameter) or table.dim() != 2 or not table.numel():
        return None  # sharded
    if not table.is_floating_point():
        return None  # quantised
    table = table.detach()[:num_rows]
    if all(bound.isfinite() for bound in torch.aminmax(table)):
        return None
    found = np.zeros(num_rows, bool)
    found[: len(table)] = (~torch.stack(table.aminmax(dim=1)).isfinite().all(dim=0)).cpu().numpy()
    return found


def rows_that_differ(logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Whether logits of two forwards differ by more than rounding, masked tokens aside: bool `[rows]`.

    A token 100 nats or more below the likeliest counts as masked, whatever its logit.

    Args:
        logits: float32 `[rows, vocab]`.
        expected: float32 `[rows, vocab]`, the reference. Rows that are not distributions are ignored.
        tolerance: Share of the spread of a row's logits.
    """
    ours, theirs, top = _floored(logits), _floored(expected), expected.amax(dim=-1, keepdim=True)
    shown = theirs.where(theirs > top - _SURELY_MASKED_NATS, top)
    spread = (top - shown).amax(dim=-1)
    # Where one token is likelier by far there is no spread, but the rounding of its own logit.
    rounding = 1e-5 * (1 + top[..., 0].abs())
    same = (ours - theirs).abs().amax(dim=-1) <= tolerance * spread + rounding
    return ~same & _distributions(expected)


def _distributions(logits: torch.Tensor) -> torch.Tensor:
    """Which rows are distributions: bool `[rows]`."""
    return logits.amax(dim=-1).isfinite()


def _floored(logits: torch.Tensor) -> torch.Tensor:
    """Logits with masked tokens raised to one finite number."""
    return logits.clamp(min=logits.amax(dim=-1, keepdim=True) - _SURELY_MASKED_NATS)
