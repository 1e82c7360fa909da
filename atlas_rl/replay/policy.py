"""The policy of a recorded run, as drafters read it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

from atlas_rl.policy.view import PolicyView
from atlas_rl.replay.record import Recorded


class RecordedPolicy(PolicyView):
    """Embeddings and configuration of a recorded run's policy, as far as recorded.

    Args:
        recorded: Any call of the run.
        like: The run's policy, at any version. Provides embeddings of tokens that the record lacks, which a drafter with
            state from elsewhere may propose; without `like` those embeddings are zero.
    """

    def __init__(self, recorded: Recorded, like: PolicyView | None = None) -> None:
        shape = recorded.sequences.vocab_size, recorded.inputs.shape[1]
        self._inputs = (
            torch.zeros(shape, dtype=torch.float32, device="cpu")
            if like is None
            else like.input_table.detach().float().clone()
        )
        self._outputs, self._biases = (
            torch.zeros(shape, dtype=torch.float32, device="cpu"),
            torch.zeros(shape[0], dtype=torch.float32, device="cpu"),
        )
        if like is not None:
            _, self._outputs, self._biases = like.rows_of(np.arange(shape[0]))
        # Only the recorded layers: a drafter that needs others gets an error.
        self.config = SimpleNamespace(num_hidden_layers=max(recorded.layers, default=-1) + 1)
        self.form = recorded.form
        self.follow(recorded)

    def follow(self, recorded: Recorded) -> None:
        """Switch to the policy of this recorded call."""
        index = torch.from_numpy(recorded.token_ids)
        self._inputs[index], self._outputs[index] = recorded.inputs, recorded.outputs
        self._biases[index] = recorded.biases

    @property
    def input_table(self) -> torch.Tensor:
        return self._inputs

    @property
    def output_table(self) -> torch.Tensor:
        return self._outputs

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(token_ids, self._inputs)

    def output_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._outputs[token_ids], self._biases[token_ids]
