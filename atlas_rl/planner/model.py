"""Counts a decoder's parameters, cache and operations, from a `config.json` of the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_MOE = ("mixtral", "qwen2_moe", "qwen3_moe")
_DEEPSEEK = ("deepseek_v3",)
_MAX_COUNT = 10**9
ARCHITECTURES = _DENSE + _MOE + _DEEPSEEK


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Counts of one decoder. Norms and biases are left out: less than 0.1% of any model here.

    Attributes:
        name: The architecture, for messages.
        hidden_size: Width of the residual stream.
        num_dense_layers: Layers with one gated MLP.
        num_moe_layers: Layers with experts.
        vocab_size: Rows of the output matrix.
        tied: Whether embedding and output matrix are one.
        owns_embedding: False for a drafter that uses the target's embedding.
        attention_params: Weights of one layer's attention projections.
        mlp_params: Weights of the MLP of a dense layer, which a head may have even if no layer of the model does.
        shared_params: Weights of an MoE layer that every token uses: router and shared experts.
        expert_params: Weights of one routed expert.
        num_experts: Routed experts per MoE layer.
        experts_per_token: Routed experts that one token uses.
        kv_values_per_token: Values that one layer caches per token.
        kv_splits: Most parts into which tensor parallelism can cut the cache: the key-value heads; 1 for a latent
            cache.
        attention_flops_per_key: Operations of one layer's attention, per query token and cached token.
        num_local_layers: Layers that attend to the last `window` tokens only.
        window: Tokens that those layers attend to.
        kernels_attention: Kernels in a layer's attention.
        num_mtp_layers: The model's layers for multi-token prediction; the parameters do not include them.
    """

    name: str
    hidden_size: int
    num_dense_layers: int
    num_moe_layers: int
    vocab_size: int
    tied: bool
    owns_embedding: bool = True
    attention_params: float
    mlp_params: float = 0.0
    shared_params: float = 0.0
    expert_params: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    kv_values_per_token: int
    kv_splits: int
    attention_flops_per_key: float
    num_local_layers: int = 0
    window: int = 0
    kernels_attention: int = 4
    num_mtp_layers: int = 0

    @property
    def num_layers(self) -> int:
        return self.num_dense_layers + self.num_moe_layers

    @property
    def head_params(self) -> float:
        """Weights of the output matrix."""
        return float(self.vocab_size * self.hidden_size)

    @property
    def embedding_params(self) -> float:
        """Weights of a separate embedding; a forward reads only the rows of its tokens."""
        return 0.0 if self.tied or not self.owns_embedding else self.head_params

    @property
    def params(self) -> float:
        """All weights."""
        moe = self.num_moe_layers * (self.shared_params + self.num_experts * self.expert_params)
        return self._common_params + moe

    @property
    def active_params(self) -> float:
        """Weights that one token uses, counted as model cards do: with embedding and output matrix."""
        moe = self.num_moe_layers * (self.shared_params + self.experts_per_token * self.expert_params)
        return self._common_params + moe

    @property
    def _common_params(self) -> float:
        layers = self.num_layers * self.attention_params + self.num_dense_layers * self.mlp_params
        return layers + self.head_params + self.embedding_params

    def distinct_experts(self, num_tokens: float) -> float:
        """Expected number of a layer's experts that at least one of `num_tokens` tokens uses.

        `E (1 - (1 - A/E)^n)` for E experts of which each token draws A independently and evenly. The draws of
        neighbouring tokens are more alike, so this is an upper estimate.
        """
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - self.experts_per_token / self.num_experts) ** num_tokens)

    def cached_values(self, context: int) -> float:
        """Values in the cache of one request of `context` tokens, over all layers; local layers cache their window only."""
        return self.kv_values_per_token * self.cached_token_layers(context)

    def cached_token_layers(self, context: int) -> float:
        """Sum over layers of the cached tokens that a query sees."""
        num_global = self.num_layers - self.num_local_layers
        return float(num_global * context + self.num_local_layers * min(context, self.window))


def load_model(path: str | Path) -> ModelShape:
    """Read a model from a `config.json`, a folder that holds one, or by its name from the local hub cache.

    Raises:
        ValueError: There is no config, it is not JSON, or the planner does not know the architecture.
    """
    file = _config_file(Path(path))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is not JSON: give the config.json of a model on the hub") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{file}' is not a JSON object: give the config.json of a model on the hub")
    return parse_model(config)


def _config_file(path: Path) -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cached = sorted(home.glob(f"hub/models--{str(path).replace('/', '--')}/snapshots/*/config.json"))
    for file in (path, path / "config.json", *cached):
        if file.is_file():
            return file
    name = str(path) if len(path.parts) == 2 and not path.is_absolute() and path.suffix != ".json" else "OWNER/NAME"
    raise ValueError(
        f"no config at '{path}': give a config.json, a folder with one, or a model in the hub cache "
        f"(`hf download {name} config.json` puts it there)"
    )


def parse_model(config: Mapping[str, Any]) -> ModelShape:
    """Count the model of a hub config; for a multimodal config, its language model. A null field counts as absent.

    Raises:
        ValueError: The planner does not know the architecture, or a field is missing or not a number.
    """
    text = config.get("text_config")
    if text is not None and not isinstance(text, Mapping):
        raise ValueError(f"the config's field 'text_config' must be an object, got {text!r}")
    fields = _Fields(config if text is None else text)
    if fields.kind is None:
        raise ValueError("the config has no field 'model_type': give the config.json of a model on the hub")
    if fields.kind not in ARCHITECTURES:
        raise ValueError(f"unknown architecture '{fields.kind}': the planner knows {', '.join(ARCHITECTURES)}")
    return _deepseek(fields) if fields.kind in _DEEPSEEK else _grouped_query(fields)


class _Fields:
    """Reads the fields of a config and checks their types."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.kind = config.get("model_type")

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; `ValueError` if it is not one, or absent without a default."""
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            null = " (it is null)" if name in self._config else ""
            raise ValueError(f"the config of this '{self.kind}' model has no field '{name}'{null}")
        if type(value) is not int or value < least:
            raise ValueError(
                f"the config's field '{name}' must be a whole number of at least {least}, got {value!r}: correct config.json"
            )
        if value > _MAX_COUNT:
            raise ValueError(f"the config's field '{name}' must be at most {_MAX_COUNT:,}: correct config.json")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"the config's field '{name}' must be true or false, got {value!r}: correct config.json")
        return default if value is None else value

    def several(self, name: str) -> list[Any] | None:
        value = self._config.get(name)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"the config's field '{name}' must be a list, got {value!r}: correct config.json")
        return value


def _grouped_query(fields: _Fields) -> ModelShape:
    count = fields.count
    hidden, heads, layers = count("hidden_size"), count("num_attention_heads"), count("num_hidden_layers")
    kv_heads = count("num_key_value_heads", heads)
    head_dim = count("head_dim", max(1, hidden // heads))
    is_moe = fields.kind in _MOE
    experts = (count("num_local_experts", 0, least=0) or count("num_experts")) if is_moe else 0
    num_moe = 0
    if is_moe:
        step, dense_only = count("decoder_sparse_step", 1), fields.several("mlp_only_layers") or []
        num_moe = sum((index + 1) % step == 0 and index not in dense_only for index in range(layers))
    num_dense = layers - num_moe
    expert_width = count("moe_intermediate_size", 0, least=0) or count("intermediate_size") if is_moe else 0
    num_local = _num_local_layers(fields)
    return ModelShape(
        name=str(fields.kind),
        hidden_size=hidden,
        num_dense_layers=num_dense,
        num_moe_layers=num_moe,
        vocab_size=count("vocab_size"),
        tied=_tied(fields),
        attention_params=hidden * head_dim * (2 * heads + 2 * kv_heads),
        mlp_params=3 * hidden * _dense_width(fields, num_dense),
        shared_params=hidden * experts + 3 * hidden * count("shared_expert_intermediate_size", 0, least=0)
        if is_moe
        else 0.0,
        expert_params=3 * hidden * expert_width,
        num_experts=experts,
        experts_per_token=count("num_experts_per_tok") if is_moe else 0,
        kv_values_per_token=2 * kv_heads * head_dim,
        kv_splits=kv_heads,
        attention_flops_per_key=4 * heads * head_dim,
        num_local_layers=num_local,
        window=count("sliding_window") if num_local else 0,
    )


def _deepseek(fields: _Fields) -> ModelShape:
    """Count DeepSeek-V3 (arXiv 2412.19437): latent attention caches one compressed vector and one rotary key per token.

    While decoding, queries are projected into the latent space, and attention runs over the latent vectors. Without
    `q_lora_rank`, queries are projected directly from the hidden state.
    """
    count = fields.count
    hidden, heads, layers = count("hidden_size"), count("num_attention_heads"), count("num_hidden_layers")
    latent, rotary = count("kv_lora_rank"), count("qk_rope_head_dim")
    nope, value, query_rank = count("qk_nope_head_dim"), count("v_head_dim"), count("q_lora_rank", 0, least=0)
    per_query = heads * (nope + rotary)
    query = hidden * query_rank + query_rank * per_query if query_rank else hidden * per_query
    key_value = hidden * (latent + rotary) + latent * heads * (nope + value)
    experts, expert = count("n_routed_experts"), 3 * hidden * count("moe_intermediate_size")
    dense = min(count("first_k_dense_replace", least=0), layers)
    return ModelShape(
        name=str(fields.kind),
        hidden_size=hidden,
        num_dense_layers=dense,
        num_moe_layers=layers - dense,
        vocab_size=count("vocab_size"),
        tied=_tied(fields),
        attention_params=query + key_value + heads * value * hidden,
        mlp_params=3 * hidden * _dense_width(fields, dense),
        shared_params=hidden * experts + count("n_shared_experts", 0, least=0) * expert,
        expert_params=expert,
        num_experts=experts,
        experts_per_token=count("num_experts_per_tok"),
        kv_values_per_token=latent + rotary,
        kv_splits=1,
        attention_flops_per_key=2 * heads * (latent + rotary + latent),
        kernels_attention=9,
        num_mtp_layers=count("num_nextn_predict_layers", 0, least=0),
    )


def _dense_width(fields: _Fields, num_dense: int) -> int:
    """Width of dense MLPs; of a model without any, the one that a head would get."""
    return fields.count("intermediate_size", None if num_dense else 4 * fields.count("hidden_size"))


def _tied(fields: _Fields) -> bool:
    # The hub omits values that equal the class's default, and the Gemma classes tie by default.
    return fields.flag("tie_word_embeddings", str(fields.kind).startswith("gemma"))


def _num_local_layers(fields: _Fields) -> int:
    kind, layers = fields.kind, fields.count("num_hidden_layers")
    if not fields.count("sliding_window", 0, least=0) or not fields.flag("use_sliding_window", True):
        return 0
    layer_types = fields.several("layer_types")
    if layer_types is not None:
        return sum(kind == "sliding_attention" for kind in layer_types)
    if kind == "gemma2":
        return layers // 2  # every second layer is global
    if kind == "gemma3_text":
        return layers - layers // fields.count("sliding_window_pattern", 6)
    return layers if kind in ("mistral", "mixtral") else 0
