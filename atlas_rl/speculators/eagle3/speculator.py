"""EAGLE-3 as a speculator: static, trained before the run and never changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atlas_rl.core import Needs, SamplingParams
from atlas_rl.policy.ragged_attention import ragged_attention
from atlas_rl.speculators.eagle3.checkpoint import load_eagle3
from atlas_rl.speculators.eagle3.head import Eagle3Head, cached_sizes
from atlas_rl.speculators.feature_head import FeatureHeadSpeculator
from atlas_rl.speculators.warm_up import write_cache

if TYPE_CHECKING:
    from atlas_rl.policy.view import PolicyView


class Eagle3Speculator(FeatureHeadSpeculator):
    """Drafts with an EAGLE-3 head, under the sampling parameters of the call.

    Args:
        head: A loaded head, which is moved to the policy's device, or the folder of a checkpoint, which is read once
            the policy is known.

    Raises:
        ValueError: At `bind`: the checkpoint is damaged or belongs to another policy.
    """

    name = "eagle3"
    head: Eagle3Head

    def __init__(self, head: Eagle3Head | str | Path) -> None:
        super().__init__()
        self._given = head

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Load the head for this policy."""
        super().bind(policy, couples_noise)
        given = self._given
        self._keep(given.to(policy.device) if isinstance(given, Eagle3Head) else load_eagle3(given, policy))
        self.needs = Needs(layers=self.head.config.layers)
        self._token_ids = self.head.token_ids
        attention: Any = self.head.layers[0].self_attn
        self._cell_bytes = (
            attention.k_proj.out_features + attention.v_proj.out_features
        ) * attention.k_proj.weight.itemsize

    def compile_for(self, sampling: SamplingParams) -> None:
        write_cache(*cached_sizes(self.head.config.layer), self._logits_dtype, self._device)
        super().compile_for(sampling)

    @property
    def _logits_dtype(self) -> torch.dtype:
        return self.head.fc.weight.dtype

    def _features_of(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        return self.head.fuse(states)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return (self.head.embed_tokens or self._policy.embed)(token_ids)

    def _step(self, embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.head(embeddings[None], features[None], positions[None], _attend)[0]

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.head.logits(features)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return ragged_attention(_LAYER, query, key, value, None)[0]


class _Layer:
    """Stands for the head's one layer, which is number 0 in the cache."""

    layer_idx = 0


_LAYER: Any = _Layer()
