"""Builds tiny policies of every causal-LM class in transformers, and of every image-text class that contains one.

Each is built from its class's own configuration.

A configuration is shrunk by the names of its fields: widths, heads, layers, experts, windows. Weights are large, so that
every token of the context matters and a wrong mask or position shows. `build` gives the same policy for the same arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

WINDOW, CHUNK, POSITIONS, VOCAB = 8, 16, 128, 64
_LAYERS = 4

_TOKEN_IDS = {"pad": 0, "bos": 1, "cls": 1, "decoder_start": 0, "eos": 2, "sep": 2}

# The first pattern that matches a whole field name gives the value. A field whose default is None stays None, except
# windows and two fields that classes read without checking.
_ALWAYS = ("head_dim", "num_key_value_heads", "sliding_window")
_SHRUNK: tuple[tuple[str, Any], ...] = (
    *((f"{name}_token_id", value) for name, value in _TOKEN_IDS.items()),
    (r".*vocab_size.*|vocab_dim|n_vocab|entity_vocab_size|n_tokens|input_vocab_size", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_target_positions|seq_length"
     r"|max_source_positions|context_length|block_size_max", POSITIONS),
    (r"original_max_position_embeddings", POSITIONS),
    (r"sliding_window|window_size|attention_window_size|attention_window|keep_window_size", WINDOW),
    (r"attention_chunk_size", CHUNK),
    (r"index_topk", WINDOW),
    (r"(num_)?(hidden_layers|decoder_layers|encoder_layers|layers|blocks)|n_layers?|num_(en|de)coder_layers", _LAYERS),
    (r"num_key_value_heads|multi_query_group_num|num_kv_heads|num_global_key_value_heads", 2),
    (r"(num_)?attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|num_query_heads|index_n_heads", 4),
    (r"head_dim|attention_head_dim|head_size|global_head_dim|v_head_dim|kv_channels|d_kv|index_head_dim"
     r"|qk_nope_head_dim|qk_rope_head_dim|attention_head_size", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (r"(num|n)(_local|_routed|_total)?_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|num_experts_per_token|top_?k_experts|moe_topk|moe_k|num_selected_experts|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace|n_shared_experts|num_shared_experts", 1),
    (r"hidden_size_per_layer_input|embedding_size|embedding_dim|word_embed_proj_dim|d_embed", 32),
    (r"hidden_size|d_model|n_embd|dim|n_embed|hidden_dim|model_dim|emb_dim|attention_hidden_size|projection_dim", 32),
    (r".*intermediate_size|.*ffn_dim|d_ff|n_inner|ffn_hidden_size|feed_forward_size|dim_ff|d_inner|feedforward_.*", 64),
    (r"rotary_dim", 8),
    (r"image_size", 32),
    (r"patch_size", 16),
    (r"initializer_range|init_std", 0.2),
    (r"is_decoder", True),
)  # fmt: skip

# Fields that the patterns above get wrong, by model type.
_ALTERNATING = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_THREE_DIMENSIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_HALF_RECURRENT = ["linear_attention", "full_attention"] * (_LAYERS // 2)
_HALF_CONVOLVED = ["conv", "full_attention"] * (_LAYERS // 2)
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _ALTERNATING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _ALTERNATING},
    },
    "dbrx": {
        "d_model": 32,  # an alias that is read before `hidden_size`
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, "layer_types": _HALF_RECURRENT},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "gemma3n_text": {"layer_types": _ALTERNATING, "num_kv_shared_layers": 2, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], _LAYERS // 2]], "num_layers": _LAYERS},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": _HALF_CONVOLVED},
    "lfm2_moe": {"layer_types": _HALF_CONVOLVED},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8},
    **{
        f"{name}_text": {"rope_parameters": _THREE_DIMENSIONS}
        for name in ("glm4v", "glm_ocr", "paddleocr_vl", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl")
    },
    "glm4v_moe_text": {"rope_parameters": {**_THREE_DIMENSIONS, "mrope_section": [1, 1, 0]}},
    "qwen2_vl_vision": {"depth": 2, "embed_dim": 32, "num_heads": 4},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
}


def model_types() -> list[str]:
    """The model types in transformers' registry of causal LMs."""
    return sorted(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING)


def wrapper_types() -> list[str]:
    """The model types in its registry of image-text models, except classes that are also causal LMs."""
    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING.values())
    return sorted(
        {config.model_type for config, made in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.items() if made not in classes}
    )


def tiny_config(model_type: str, **options: Any) -> Any:
    """A tiny configuration of a model type; `options` take precedence."""
    default = AutoConfig.for_model(model_type)
    return type(default)(**{**_shrunk(default), **_OWN.get(model_type, {}), **options})


def _shrunk(config: Any) -> dict[str, Any]:
    """Small values for a configuration's fields and those of nested configurations."""
    parts = {name: type(part)(**{**_shrunk(part), **_OWN.get(part.model_type, {})}) for name, part in _parts(config)}
    names = {name for name in (*vars(config), *config.attribute_map) if not name.startswith("_")} - set(parts)
    fields = {}
    for name in names - set(config.attribute_map.values()) | (names & set(config.attribute_map)):
        for pattern, value in _SHRUNK:
            if re.fullmatch(pattern, name):
                if name in _ALWAYS or _plain(config, name) is not None:
                    fields[name] = value
                break
    if "kv_lora_rank" in fields:  # latent attention: every query head has its own keys
        fields["num_key_value_heads"] = 4
    return {**fields, **parts}


def _plain(config: Any, name: str) -> Any:
    read = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return read(name, None) if read else getattr(config, name, None)


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, Mapping):
            yield name, part


def build(
    model_type: str, *, seed: int = 0, logit_std: float = 2.0, wrapper: bool = False, **options: Any
) -> PreTrainedModel:
    """A float32 policy in evaluation mode.

    Args:
        model_type: Model type of its configuration.
        seed: Seed of its weights.
        logit_std: Spread of its logits, nats.
        wrapper: Whether to build the image-text model instead of the causal LM.
        options: Fields of its configuration.

    Raises:
        Exception: Any error that the class raises for such a configuration.
        ArithmeticError: Its plain forward gives numbers that are not finite.
    """
    config = tiny_config(model_type, **options)
    model_class = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if wrapper else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    if not isinstance(config, model_class.config_class):  # registered for the whole model, built from its text part
        config = next(part for _, part in _parts(config) if isinstance(part, model_class.config_class))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and min(parameter.shape) > 1:
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        tokens = torch.randint(min(VOCAB, model.get_input_embeddings().num_embeddings), (2, 24))
    head = model.get_output_embeddings()
    with torch.no_grad():
        for _ in range(2):  # twice, because tied embeddings change the input as well
            logits = model(input_ids=tokens, use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                raise ArithmeticError("a plain forward of the tiny policy gives logits that are not finite")
            if head is not None and isinstance(getattr(head, "weight", None), torch.Tensor):
                head.weight.mul_(logit_std / logits.std(dim=-1).mean())
    return model
