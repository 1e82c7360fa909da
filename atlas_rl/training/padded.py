"""Texts of a recorded call as padded tensors, for the training of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from atlas_rl.replay.record import Recorded


@dataclass(slots=True)
class PaddedTexts:
    """Some requests of a recorded call, padded at their ends.

    Attributes:
        token_ids: int64 `[batch, tokens]`, zero-padded.
        features: Per layer float32 `[batch, tokens, hidden]`, of every position but the last of each text.
        drawn_from: float32 `[batch, tokens, hidden]`: hidden state that the token at each position was drawn from.
        drawn: bool `[batch, tokens]`, whether the token at each position was drawn by the policy.
        lengths: int64 `[batch]`.
        prompt_lengths: int64 `[batch]`.
    """

    token_ids: torch.Tensor
    features: dict[int, torch.Tensor]
    drawn_from: torch.Tensor
    drawn: torch.Tensor
    lengths: np.ndarray
    prompt_lengths: np.ndarray

    @classmethod
    def of(cls, recorded: Recorded, requests: np.ndarray, device: torch.device) -> Self:
        """The texts of requests, int64 `[batch]`, on a device."""
        sequences = recorded.sequences
        lengths, prompts = sequences.lengths, sequences.prompt_lengths
        layers_at, last_at = np.cumsum(lengths - 1) - (lengths - 1), np.cumsum(lengths - prompts) - (lengths - prompts)
        size, width, hidden = len(requests), int(lengths[requests].max()), recorded.head_inputs.shape[1]
        token_ids = torch.zeros(size, width, dtype=torch.int64, device="cpu")
        drawn_from = torch.zeros(size, width, hidden, dtype=torch.float32, device="cpu")
        drawn = torch.zeros(size, width, dtype=torch.bool, device="cpu")
        features = {
            layer: torch.zeros(size, width, hidden, dtype=torch.float32, device="cpu") for layer in recorded.layers
        }
        for row, request in enumerate(requests):
            n, prompt = int(lengths[request]), int(prompts[request])
            token_ids[row, :n] = torch.from_numpy(sequences.token_ids[request, :n].astype(np.int64))
            drawn_from[row, prompt:n] = recorded.head_inputs[last_at[request] : last_at[request] + n - prompt].float()
            drawn[row, prompt:n] = True
            for layer, states in recorded.layers.items():
                features[layer][row, : n - 1] = states[layers_at[request] : layers_at[request] + n - 1].float()
        there = {layer: states.to(device) for layer, states in features.items()}
        tensors = (token_ids.to(device), there, drawn_from.to(device), drawn.to(device))
        return cls(*tensors, lengths[requests], prompts[requests])
