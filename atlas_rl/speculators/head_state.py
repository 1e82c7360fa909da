"""Checks a head's saved weights and optimizer moments before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from atlas_rl.speculators.saved_state import SavedState

MAX_COUNT = 1e15
_MAX_WEIGHT = 1e4  # larger than any trained weight, yet finite in every number format of drafts


def learned_parameters(head: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}


def saved_weights(head: nn.Module, state: SavedState, owner: str) -> dict[str, torch.Tensor]:
    """Weights for `head`, by name; `ValueError` if they do not fit, or have values that no training produces.

    Args:
        head: Head that the weights are for.
        state: Saved weights by name.
        owner: Name used in errors.
    """
    own = learned_parameters(head)
    if state.names() != set(own):
        raise ValueError(f"{owner}: the weights are {sorted(map(str, state.names()))}, expected {sorted(own)}")
    return {name: _tensor(state, name, tensor.shape) for name, tensor in own.items()}


def saved_moments(head: nn.Module, state: SavedState, owner: str) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's moments, by parameter number; empty before the first step. `ValueError` as in `saved_weights`."""
    parameters = {str(index): parameter for index, parameter in enumerate(learned_parameters(head).values())}
    if not state.names() <= set(parameters):
        raise ValueError(f"{owner}: the optimizer has parameters {sorted(map(str, state.names()))}")
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
