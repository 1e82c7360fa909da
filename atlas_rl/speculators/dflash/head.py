"""The DFlash head (arXiv 2602.06036): a few decoder layers that draft a whole block of tokens in one forward.

A block is the newest token and mask tokens behind it; the output at each mask position predicts the token of that very
position, or in some heads the output at each position the token behind it (`DFlashConfig.first_place`).

Queries come from the block alone. Keys and values come from the context and from the block: those of the context are
projections of one feature per position, `hidden_norm(fc(...))` of the policy's hidden states at several layers, and they
are the same features for every layer of the head. The newest token has no feature yet, so the context ends before it.
Within the block nothing is causal, unless a layer says so (`Span`).

DSpark adds a Markov head, and a confidence head, which is not used here.

Module and tensor names are those of the published checkpoints (z-lab/dflash, vllm-project/speculators).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RotaryEmbedding, rotate_half

from atlas_rl.speculators.dflash.config import DFlashConfig
from atlas_rl.speculators.rotary import RotaryTables

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of a layer, by its number: from rotated queries, keys and values of the block, `[batch, heads, tokens, dim]`
each, to `[batch, tokens, heads, dim]`. It adds the context's keys and values, which the caller keeps."""

Keep = Callable[[int, torch.Tensor, torch.Tensor], object]
"""Keeps the context's rotated keys and values of a layer, `[batch, kv_heads, tokens, dim]` each."""


class DFlashHead(nn.Module):
    """DFlash head. Its tables are None where those of the policy are used.

    Args:
        config: Shape of the head.
        own_embeddings: Whether the checkpoint has its own input embedding.
        own_output: Whether the checkpoint has its own LM head.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: DFlashConfig, own_embeddings: bool = False, own_output: bool = False) -> None:
        super().__init__()
        layer = config.layer
        self.config = config
        self.fc = nn.Linear(len(config.layers) * config.read_size, layer.hidden_size, bias=False)
        self.hidden_norm = _norm(layer, layer.hidden_size)
        self.layers = nn.ModuleList(DFlashLayer(layer) for _ in range(layer.num_hidden_layers))
        self.norm = _norm(layer, layer.hidden_size)
        self.embed_tokens = nn.Embedding(layer.vocab_size, layer.hidden_size) if own_embeddings else None
        self.lm_head = nn.Linear(layer.hidden_size, config.draft_vocab_size, bias=False) if own_output else None
        rank = config.markov_rank
        self.markov_head = MarkovHead(layer.vocab_size, config.draft_vocab_size, rank) if rank else None
        self.reduced = config.draft_vocab_size < layer.vocab_size
        if self.reduced:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(layer.vocab_size, dtype=torch.bool))
        self.rotary = RotaryTables(Qwen3RotaryEmbedding(layer))

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The policy's id of every draft token: int64 `[draft_vocab]`; None for the whole vocabulary."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device) if self.reduced else None

    def fuse(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        """Features `[..., hidden]` of positions, from the policy's layer states, `[..., hidden]` per layer."""
        parts = [states[layer].to(self.fc.weight.dtype) for layer in self.config.layers]
        return self.hidden_norm(self.fc(torch.cat(parts, dim=-1)))

    def read(self, features: torch.Tensor, positions: torch.Tensor, keep: Keep) -> None:
        """Make every layer's keys and values of context positions.

        Args:
            features: `[batch, tokens, hidden]`.
            positions: int64 `[batch, tokens]`.
            keep: Receives them, layer by layer.
        """
        cos, sin = self.rotary(features, positions)
        layers: Any = self.layers
        for number, layer in enumerate(layers):
            keep(number, *layer.self_attn.keys_and_values(features, cos, sin))

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Inputs of the LM head, at every position of a block.

        Args:
            embeddings: `[batch, tokens, hidden]`, of the block's tokens.
            positions: int64 `[batch, tokens]`.
            attend: Attention.

        Returns:
            `[batch, tokens, hidden]`.
        """
        cos, sin = self.rotary(embeddings, positions)
        hidden = embeddings
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, number, attend)
        return self.norm(hidden)


class MarkovHead(nn.Module):
    """DSpark's first addition: what the previous token adds to the logits, as a product of two thin matrices.

    Args:
        vocab_size: The policy's vocabulary.
        draft_vocab_size: Tokens the head can propose.
        rank: Rank of the product.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Addends `[n, draft_vocab]` to the logits behind the policy's tokens, int64 `[n]`."""
        return self.markov_w2(self.markov_w1(token_ids))


class DFlashLayer(nn.Module):
    """A Qwen3 layer whose attention is the caller's."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Projections(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = _norm(config, config.hidden_size)
        self.post_attention_layernorm = _norm(config, config.hidden_size)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, number: int, attend: Attend
    ) -> torch.Tensor:
        """See `DFlashHead.forward`; `cos` and `sin` are rotary tables of the positions."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, number, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Projections(nn.Module):
    """Projections of attention, with normed queries and keys."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads = config.num_attention_heads * self.head_dim
        kv_heads = (config.num_key_value_heads or config.num_attention_heads) * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_bias)
        self.q_norm, self.k_norm = _norm(config, self.head_dim), _norm(config, self.head_dim)

    def keys_and_values(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, `[batch, kv_heads, tokens, dim]` each, of `[batch, tokens, hidden]`."""
        key, value = (self._heads(projection(x)) for projection in (self.k_proj, self.v_proj))
        return _rotated(self.k_norm(key).transpose(1, 2), cos, sin), value.transpose(1, 2)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, number: int, attend: Attend
    ) -> torch.Tensor:
        """Attention of layer `number`: `[batch, tokens, hidden]` in and out."""
        query = _rotated(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), cos, sin)
        return self.o_proj(attend(number, query, *self.keys_and_values(x, cos, sin)).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[:, None], sin[:, None]
    return x * cos + rotate_half(x) * sin


def _norm(config: Qwen3Config, size: int) -> nn.RMSNorm:
    # Qwen3's own norm is seven launches on a GPU, this is one.
    return nn.RMSNorm(size, eps=config.rms_norm_eps)
