"""Tiny real models of several families, built locally from configurations: no download, seeded, sharp.

Freshly initialised models are useless for tests of decoding: their distributions are near uniform and their attention
adds almost nothing, so a wrong cache or position would go unseen. Here the weights are large, so that every token of
the context matters, and the output layer is scaled so that logits spread by `logit_std` nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SLIDING_WINDOW = 8
_NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE = {
    "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, **_NO_SPECIAL_TOKENS,
}  # fmt: skip
"""Options of a configuration of any family that is not among those below."""


def build(model_class: type[PreTrainedModel], config: Any, *, seed: int = 0, logit_std: float = 2.0) -> PreTrainedModel:
    """A float32 model in eval mode, the same for the same arguments; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        tokens = torch.randint(config.vocab_size, (4, 24))
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for _ in range(2):  # twice, because tied embeddings change the input as well
            head.mul_(logit_std / model(tokens).logits.std(dim=-1).mean())
    return model


def tiny_llama(
    *,
    vocab: int = 64,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 128,
    seed: int = 0,
    logit_std: float = 2.0,
) -> PreTrainedModel:
    """Llama: grouped-query attention, rotary positions, untied output."""
    config = LlamaConfig(**_shape(vocab, layers, hidden, heads, kv_heads, context))
    return build(LlamaForCausalLM, config, seed=seed, logit_std=logit_std)


def tiny_bigram(*, seed: int = 0, logit_std: float = 4.0, **shape: int) -> PreTrainedModel:
    """Llama whose next token depends on the last one more than on all others: something that a drafter can learn."""
    model = tiny_llama(seed=seed, **shape)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
        logits = model(torch.arange(model.config.vocab_size)[None]).logits
        model.get_output_embeddings().weight.mul_(logit_std / logits.std(dim=-1).mean())
    return model


def tiny_qwen2(
    *, vocab: int = 64, layers: int = 2, hidden: int = 32, context: int = 128, seed: int = 0
) -> PreTrainedModel:
    """Qwen2: biases in the attention projections, tied embeddings."""
    config = Qwen2Config(**_shape(vocab, layers, hidden, 4, 2, context), tie_word_embeddings=True)
    return build(Qwen2ForCausalLM, config, seed=seed)


def tiny_qwen3(
    *, vocab: int = 64, layers: int = 2, hidden: int = 32, context: int = 128, seed: int = 0
) -> PreTrainedModel:
    """Qwen3: normalised queries and keys, a head size of its own."""
    config = Qwen3Config(**_shape(vocab, layers, hidden, 4, 2, context), head_dim=16)
    return build(Qwen3ForCausalLM, config, seed=seed)


def tiny_mistral(
    *, vocab: int = 64, layers: int = 2, hidden: int = 32, context: int = 128, seed: int = 0
) -> PreTrainedModel:
    """Mistral: every layer sees the last `SLIDING_WINDOW` tokens only."""
    config = MistralConfig(**_shape(vocab, layers, hidden, 4, 2, context), sliding_window=SLIDING_WINDOW)
    return build(MistralForCausalLM, config, seed=seed)


def tiny_gemma2(
    *, vocab: int = 64, layers: int = 2, hidden: int = 32, context: int = 128, seed: int = 0
) -> PreTrainedModel:
    """Gemma 2: alternating sliding and full layers, soft-capped attention and output logits, tied embeddings."""
    config = Gemma2Config(
        **_shape(vocab, layers, hidden, 4, 2, context),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=SLIDING_WINDOW,
        layer_types=_alternating(layers),
        tie_word_embeddings=True,
    )
    return build(Gemma2ForCausalLM, config, seed=seed)


def tiny_gemma3(
    *, vocab: int = 64, layers: int = 2, hidden: int = 32, context: int = 128, seed: int = 0
) -> PreTrainedModel:
    """Gemma 3 text: alternating layers with different rotary bases, normalised queries and keys."""
    config = Gemma3TextConfig(
        **_shape(vocab, layers, hidden, 4, 2, context),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=SLIDING_WINDOW,
        layer_types=_alternating(layers),
        tie_word_embeddings=True,
    )
    return build(Gemma3ForCausalLM, config, seed=seed)


def tiny_gpt2(
    *, vocab: int = 64, layers: int = 2, hidden: int = 32, context: int = 128, seed: int = 0
) -> PreTrainedModel:
    """GPT-2: learned absolute positions, dropout in training mode, tied embeddings."""
    config = GPT2Config(
        vocab_size=vocab,
        n_layer=layers,
        n_embd=hidden,
        n_head=4,
        n_positions=context,
        initializer_range=0.3,
        **_NO_SPECIAL_TOKENS,
    )
    return build(GPT2LMHeadModel, config, seed=seed)


FACTORIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "gpt2": tiny_gpt2,
}

HYBRIDS = (
    "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "bamba", "falcon_h1", "granitemoehybrid",
    "nemotron_h",
)  # fmt: skip
"""Model types whose layers have a running state, for `benchmarks.tiny_policies.build`."""


def _shape(vocab: int, layers: int, hidden: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        **_NO_SPECIAL_TOKENS,
    }


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
