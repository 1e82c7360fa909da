"""The shapes of new heads: the settings of their policy that layers of a plain decoder can adopt."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen3Config

from atlas_rl.policy.supported import field_of
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.dflash.config import DFlashConfig, Span
from atlas_rl.speculators.eagle3.config import Eagle3Config

_POSITIONS = 1 << 17  # of a head whose policy has no limit (ALiBi); more than any call needs


def head_config(
    policy: PolicyView, layers: tuple[int, ...], draft_vocab_size: int, intermediate_size: int | None = None
) -> Eagle3Config:
    """Shape of an EAGLE-3 head for `policy`: like one of the policy's layers, as far as a Llama layer allows.

    Args:
        policy: Policy that the sizes are taken from.
        layers: Decoder layers of the policy that the head reads, ascending.
        draft_vocab_size: Number of tokens that the head can propose.
        intermediate_size: Size of the head's MLP; None takes the policy's, or four times the hidden size.

    Raises:
        ValueError: No head fits the policy: its embeddings are not as wide as its layers, or its attention heads have an
            odd size.
    """
    layer = LlamaConfig(**_layer_of(policy, intermediate_size), num_hidden_layers=1)
    return Eagle3Config(layer, draft_vocab_size, layers)


def dflash_config(
    policy: PolicyView,
    layers: tuple[int, ...],
    *,
    num_layers: int,
    block_size: int,
    mask_token_id: int,
    intermediate_size: int | None = None,
    markov_rank: int = 0,
) -> DFlashConfig:
    """Shape of a DFlash head for `policy`: layers like the policy's, as far as Qwen3 layers allow.

    Args:
        policy: Policy that the sizes are taken from.
        layers: Decoder layers of the policy that the head reads, ascending, from 1 on.
        num_layers: Layers of the head.
        block_size: Positions of a block.
        mask_token_id: Token that stands for a position to be drafted.
        intermediate_size: As for `head_config`.
        markov_rank: Rank of the Markov head; 0 for none.

    Raises:
        ValueError: As for `head_config`.
    """
    layer = Qwen3Config(**_layer_of(policy, intermediate_size), num_hidden_layers=num_layers)
    spans = (Span(),) * num_layers
    return DFlashConfig(layer, layers, block_size, mask_token_id, spans, policy.vocab_size, markov_rank=markov_rank)


def _layer_of(policy: PolicyView, intermediate_size: int | None) -> dict[str, Any]:
    """Settings of a decoder layer like one of the policy's."""
    config = policy.config
    hidden, num_heads = int(config.hidden_size), field_of(config, "num_attention_heads")
    if policy.hidden_size != hidden or policy.input_table.shape[1] != hidden:
        raise ValueError(
            f"the policy's layers are {hidden} wide, its embeddings {policy.input_table.shape[1]} and {policy.hidden_size}: "
            "a head needs them alike"
        )
    head_dim = field_of(config, "head_dim") or hidden // num_heads
    if head_dim % 2:
        raise ValueError(
            f"the policy's attention heads have the size {head_dim}, and rotary positions need an even one"
        )
    width = field_of(config, "intermediate_size")
    width = width[0] if isinstance(width, list) else width
    return {
        "vocab_size": policy.vocab_size,
        "hidden_size": hidden,
        # Some families have no such field (GPT-2), or one size per layer.
        "intermediate_size": intermediate_size or width or 4 * hidden,
        "num_attention_heads": num_heads,
        "num_key_value_heads": field_of(config, "num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": field_of(config, "max_position_embeddings") or _POSITIONS,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_parameters": _rope(config),
        "tie_word_embeddings": False,
    }


def _rope(config: Any) -> dict[str, Any] | None:
    """The policy's rotary settings if a Llama layer supports them; else plain ones with the policy's base."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # families with two kinds of layers
    if not rope:
        return None
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0
    if whole and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn"):
        return {name: value for name, value in rope.items() if not name.startswith("mrope")}  # texts have one dimension
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}
