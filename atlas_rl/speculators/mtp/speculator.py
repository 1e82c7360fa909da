"""The policy's own layer for multi-token prediction as a speculator: published with the policy, unchanged by a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atlas_rl.core import Needs, SamplingParams
from atlas_rl.policy.base import Segments
from atlas_rl.policy.current_device import on_device
from atlas_rl.policy.ragged_attention import RaggedBatch, active
from atlas_rl.speculators.feature_head import FeatureHeadSpeculator
from atlas_rl.speculators.mtp.checkpoint import folder_of, load_mtp
from atlas_rl.speculators.mtp.head import Parts

if TYPE_CHECKING:
    from atlas_rl.policy.view import PolicyView


class MtpSpeculator(FeatureHeadSpeculator):
    """Drafts with the MTP layer of the policy's checkpoint, under the sampling parameters of the call.

    One layer drafts every token: its output for one token is its feature for the next. Embedding, final norm and LM
    head are the policy's own in their present state; the layer stays as published.

    Args:
        folder: Folder of the checkpoint; None takes the one that the policy was loaded from.

    Raises:
        ValueError: At `bind`: there is no such layer, it belongs to another policy, or the policy is sharded or does
            not run in this process.
    """

    name = "mtp"

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self._folder = None if folder is None else Path(folder)

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Load the layer for this policy."""
        super().bind(policy, couples_noise)
        if policy.model is None:
            raise ValueError("draft_model='mtp' needs a policy that runs in this process: leave it out here")
        self._keep(load_mtp(self._folder or folder_of(policy), policy))
        self._norm = Parts.of(policy.model, policy.num_layers).norm
        self.needs = Needs(layers=(policy.num_layers,))
        self._cell_bytes = self._run_once()

    def compile_for(self, sampling: SamplingParams) -> None:
        self._run_once()
        super().compile_for(sampling)

    @torch.no_grad()
    def _run_once(self) -> int:
        """Run the layer over one token to compile its kernels; returns the bytes per token in the cache."""
        with on_device(self._device):
            return self._run_on_device()

    def _run_on_device(self) -> int:
        cache = RaggedBatch(1, 1, honour_softcap=False)
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        cache.place(Segments(zero.numpy(), 0, zero.numpy(), zero.numpy() + 1, zero.numpy()), self._device)
        states = self.head.eh_proj.weight.new_zeros(1, self.head.eh_proj.out_features)
        with active(cache):
            self._step(states, states, zero.to(self._device))
        return cache.cell_bytes

    def _features_of(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        return self._norm(states[self._policy.num_layers]).to(self.head.eh_proj.weight.dtype)

    def _step(self, embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.head(embeddings[None], features[None], positions[None])[0]

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        return self._policy.logits(features)
