"""Checks a head's saved weights and optimizer moments before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atlas_rl.speculators.recurrent.head import RecurrentHead
from atlas_rl.speculators.saved_state import SavedState

MAX_COUNT = 1e15
_MAX_WEIGHT = 1e4  # no training makes one as large, and it is finite in every number format that the head drafts in


def saved_weights(head: RecurrentHead, state: SavedState) -> dict[str, torch.Tensor]:
    """Weights for `head`, by name; `ValueError` for others, or for values that no training produces."""
    own = head.state_dict()
    if state.names() != set(own):
        raise ValueError(
            f"recurrent drafter: the weights are {sorted(map(str, state.names()))}, expected {sorted(own)}"
        )
    return {name: _tensor(state, name, tensor.shape) for name, tensor in own.items()}


def saved_moments(head: RecurrentHead, state: SavedState) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's moments, by the parameter's number; empty before the first step. Errors as in `saved_weights`."""
    parameters = {str(index): parameter for index, parameter in enumerate(head.parameters())}
    if not state.names() <= set(parameters):
        raise ValueError(f"recurrent drafter: the optimizer has parameters {sorted(map(str, state.names()))}")
    moments = {}
    for name in sorted(state.names()):
        part, shape = state.part(name), parameters[name].shape
        moments[int(name)] = {
            "step": _tensor(part, "step", (), low=0.0, high=MAX_COUNT),
            "exp_avg": _tensor(part, "exp_avg", shape),
            "exp_avg_sq": _tensor(part, "exp_avg_sq", shape, low=0.0),
        }
    return moments


def _tensor(
    state: SavedState, name: str, shape: Sequence[int], low: float = -_MAX_WEIGHT, high: float = _MAX_WEIGHT
) -> torch.Tensor:
    return torch.from_numpy(state.floats(name, shape, low, high)).float()
