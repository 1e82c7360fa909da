"""The EAGLE-3 head (Li et al., arXiv 2503.01840): one decoder layer that continues the policy's own features.

At position i the head reads the embedding of token x_{i+1} and a feature of position i, and predicts x_{i+2}. Where the
policy has run, the feature is `fc` of its hidden states below three layers (low, middle, high); elsewhere it is the
head's own output of the previous step. The output layer covers a reduced vocabulary; `d2t` maps it to the policy's.

Module and tensor names are those of the vLLM project's `speculators` layout, so that a state dict is a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from atlas_rl.speculators.eagle3.config import Eagle3Config
from atlas_rl.speculators.rotary import RotaryTables

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From rotated queries, keys and values `[batch, heads, tokens, dim]` to `[batch, tokens, heads, dim]`."""


class Eagle3Head(nn.Module):
    """EAGLE-3 head. `embed_tokens` is the checkpoint's own table, or None for the policy's.

    Args:
        config: Shape of the head.
        own_embeddings: Whether the checkpoint has its own input embedding.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: Eagle3Config, own_embeddings: bool = False) -> None:
        super().__init__()
        layer, num_parts = config.layer, len(config.layers)
        self.config = config
        self.input_norm = _norm(layer, num_parts * config.read_size) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(_norm(layer, config.read_size) for _ in range(num_parts)) if config.fc_norm else None
        )
        self.fc = nn.Linear(num_parts * config.read_size, layer.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = _norm(layer, layer.hidden_size)
        self.lm_head = nn.Linear(layer.hidden_size, config.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(layer.vocab_size, layer.hidden_size) if own_embeddings else None
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(layer.vocab_size, dtype=torch.bool))
        self.rotary = RotaryTables(LlamaRotaryEmbedding(layer))

    @property
    def token_ids(self) -> torch.Tensor:
        """The policy's id of every draft token: int64 `[draft_vocab]`."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_vocabulary(self, token_ids: torch.Tensor) -> None:
        """Set the reduced vocabulary: sorted policy tokens, int64 `[draft_vocab]`."""
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def fuse(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        """Features `[tokens, hidden]` from the policy's layer states, `[tokens, hidden]` per layer."""
        parts = [states[layer].to(self.fc.weight.dtype) for layer in self.config.layers]
        if self.input_norm is not None:
            parts = list(self.input_norm(torch.cat(parts, dim=-1)).chunk(len(parts), dim=-1))
        if self.fc_norm is not None:
            parts = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        return self.fc(torch.cat(parts, dim=-1))

    def forward(
        self, embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Features for the next step.

        Args:
            embeddings: `[batch, tokens, hidden]`, of the token after each position.
            features: `[batch, tokens, hidden]`, of each position.
            positions: int64 `[batch, tokens]`.
            attend: Attention, including the keys and values of earlier positions that the caller keeps.

        Returns:
            `[batch, tokens, hidden]`; `logits` turns them into predictions.
        """
        cos, sin = self.rotary(features, positions)
        out = self.layers[0](embeddings, features, cos, sin, attend)
        return self.norm(out) if self.config.norm_output else out

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits over the reduced vocabulary `[..., draft_vocab]`."""
        return self.lm_head(features if self.config.norm_output else self.norm(features))


def cached_sizes(config: LlamaConfig) -> tuple[int, int]:
    """Number and size of a layer's key and value heads."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads or config.num_attention_heads, size


class Eagle3Layer(nn.Module):
    """A Llama layer whose attention reads the embedding and the feature side by side."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        layer = config.layer
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = _Projections(layer, config.qk_norm)
        self.mlp = LlamaMLP(layer)
        self.input_layernorm = _norm(layer, layer.hidden_size)
        self.hidden_norm = _norm(layer, layer.hidden_size)
        self.post_attention_layernorm = _norm(layer, layer.hidden_size)

    def forward(
        self, embeddings: torch.Tensor, features: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """See `Eagle3Head.forward`; `cos` and `sin` are rotary tables of the positions."""
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        hidden = residual + self.self_attn(
            torch.cat([self.input_layernorm(embeddings), normed], dim=-1), cos, sin, attend
        )
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Projections(nn.Module):
    """Projections: queries, keys and values from twice the hidden size; the output from the heads."""

    def __init__(self, config: LlamaConfig, qk_norm: bool) -> None:
        super().__init__()
        num_kv_heads, self.head_dim = cached_sizes(config)
        heads, kv_heads = config.num_attention_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, heads, bias=config.attention_bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_heads, bias=config.attention_bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_bias)
        self.q_norm, self.k_norm = (_norm(config, self.head_dim) if qk_norm else None for _ in range(2))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        query, key, value = (
            projection(x).view(*x.shape[:2], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return self.o_proj(attend(query, key, value).flatten(2))


def _norm(config: LlamaConfig, size: int) -> nn.RMSNorm:
    # Llama's own norm is seven launches on a GPU, this is one.
    return nn.RMSNorm(size, eps=config.rms_norm_eps)
