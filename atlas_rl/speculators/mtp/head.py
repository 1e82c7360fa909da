"""One layer for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2), around a decoder layer.

The decoder layer has transformers' own class for the policy's family, so that experts, gated or latent attention, and
partial rotation are as in the policy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atlas_rl.policy import ragged_attention
from atlas_rl.policy.in_process import decoder_layers
from atlas_rl.speculators.rotary import RotaryTables


@dataclass(frozen=True, slots=True)
class Parts:
    """Classes and modules of a policy that an MTP layer needs.

    Attributes:
        layer_class: Class of its decoder layers.
        norm: The norm after its last layer.
        rotary_class: Class of its rotary tables.
    """

    layer_class: type[nn.Module]
    norm: nn.Module
    rotary_class: type[nn.Module]

    @staticmethod
    def of(model: nn.Module, num_layers: int) -> Parts:
        """Look them up; `ValueError` if the policy does not have such parts."""
        layers = decoder_layers(model, num_layers)
        decoder: Any = next(module for module in model.modules() if any(child is layers for child in module.children()))
        norm, rotary = getattr(decoder, "norm", None), getattr(decoder, "rotary_emb", None)
        if not isinstance(norm, nn.Module) or not isinstance(rotary, nn.Module):
            missing = "norm" if not isinstance(norm, nn.Module) else "rotary_emb"
            raise ValueError(
                f"multi-token prediction needs a policy with a final norm and rotary positions: {type(decoder).__name__} "
                f"has no {missing}. Leave draft_model='mtp' out"
            )
        return Parts(type(layers[-1]), norm, type(rotary))


class MtpHead(nn.Module):
    """MTP layer; see the module docstring and `layout.py`.

    Args:
        parts: Parts of the policy.
        config: The policy's text configuration; copied.
        feature_first: Whether the projection reads the feature before the embedding.
        has_experts: Whether the block's feed-forward part has experts.

    Raises:
        Exception: Any error of the policy's own class for such a layer.
    """

    def __init__(self, parts: Parts, config: Any, *, feature_first: bool, has_experts: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        norm_class, eps = type(parts.norm), {"eps": config.rms_norm_eps}
        self.feature_first = feature_first
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.enorm, self.hnorm, self.norm = (norm_class(hidden, **eps) for _ in range(3))
        config = _of_one_layer(config, has_experts)
        self.block: Any = parts.layer_class(config, 0)
        with torch.device("cpu"):  # computed, not loaded
            self.rotary = RotaryTables(parts.rotary_class(config))

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Features for the next step, which are also the inputs of the policy's LM head.

        Args:
            embeddings: `[batch, tokens, hidden]`, of the token after each position.
            features: `[batch, tokens, hidden]`, of each position.
            positions: int64 `[batch, tokens]`.

        Returns:
            `[batch, tokens, hidden]`.
        """
        pair = [self.enorm(embeddings), self.hnorm(features)]
        states = self.eh_proj(torch.cat(pair[::-1] if self.feature_first else pair, dim=-1))
        out = self.block(
            states,
            position_embeddings=self.rotary(states, positions),
            attention_mask=None,
            position_ids=positions,
            past_key_values=None,
        )
        return self.norm(out[0] if isinstance(out, tuple) else out)


def _of_one_layer(config: Any, has_experts: bool) -> Any:
    """A configuration of one layer with full attention over a ragged cache, with experts or without."""
    config = copy.deepcopy(config)
    config._attn_implementation = ragged_attention.NAME
    settings = {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "mlp_layer_types": ["sparse" if has_experts else "dense"],
        "mlp_only_layers": [] if has_experts else [0],
        "decoder_sparse_step": 1,
        "first_k_dense_replace": 0 if has_experts else 1,
    }
    for name, value in settings.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    return config
