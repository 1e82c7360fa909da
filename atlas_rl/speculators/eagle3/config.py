"""Shape of an EAGLE-3 head, and how to read it from either configuration layout.

The `speculators` layout (vllm-project/speculators) keeps the layer's shape in `transformer_layer_config`. The original one
(SafeAILab/EAGLE) is a flat Llama configuration, which others have extended by an `eagle_config`. A null field counts as
absent. Fields are read as vLLM's loaders read them; unknown fields that change a head are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from atlas_rl.speculators.head_checkpoint import flag, whole

_LAYERS_FIELD = "eagle_aux_hidden_state_layer_ids"
_NOT_OF_THE_LAYER = ("architectures", "model_type", "auto_map", "torch_dtype", "dtype")
_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "num_hidden_layers")


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape of a head.

    Attributes:
        layer: The decoder layer, as a Llama configuration; its `vocab_size` is the policy's.
        draft_vocab_size: Tokens the head can propose.
        layers: Decoder layers of the policy whose inputs are fused.
        norm_before_residual: Whether the residual stream starts from the normed feature (some checkpoints) or the raw one.
        target_hidden_size: Hidden size of the policy, if it differs from the head's.
        norm_before_fc: Whether the fused input is normed as a whole.
        fc_norm: Whether each layer's part of the fused input is normed separately (EAGLE-3.1).
        norm_output: Whether the feature for the next step is the normed output (EAGLE-3.1) or the raw one.
        qk_norm: Whether queries and keys are normed, as in Qwen3.
    """

    layer: LlamaConfig
    draft_vocab_size: int
    layers: tuple[int, ...]
    norm_before_residual: bool = False
    target_hidden_size: int | None = None
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False

    @property
    def read_size(self) -> int:
        """Hidden size of the policy."""
        return self.target_hidden_size or self.layer.hidden_size


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high layer, for checkpoints that name none; as in EAGLE-3's code and vLLM."""
    return (2, num_layers // 2, num_layers - 3)


def new_layers(num_layers: int) -> tuple[int, ...]:
    """Layers that a new head reads: `default_layers` if they are three in ascending order, else the last ones."""
    low, middle, high = default_layers(num_layers)
    return (low, middle, high) if low < middle < high else tuple(range(max(0, num_layers - 3), num_layers))


def check_layers(layers: Any, num_layers: int, where: str) -> tuple[int, ...]:
    """Check decoder layers to read; returns them in ascending order, as vLLM passes them.

    Args:
        layers: From a user or a file.
        num_layers: Number of layers of the policy.
        where: Names their source; begins the message.

    Raises:
        ValueError: Not a list of different numbers from 0 to `num_layers - 1`.
    """
    if not isinstance(layers, list | tuple) or not layers or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{where} must list decoder layers by number, got {layers!r}")
    for layer in (min(layers), max(layers)):
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"{where} names layer {layer}: the policy has {num_layers}, and their inputs are counted from 0 to "
                f"{num_layers - 1}"
            )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{where} names a layer twice: {list(layers)}")
    return tuple(sorted(layers))


def parse_config(
    settings: Mapping[str, Any], num_layers: int, draft_vocab_size: int | None, where: str
) -> Eagle3Config:
    """Read a head's configuration in either layout.

    Args:
        settings: Content of `config.json`.
        num_layers: Number of layers of the policy.
        draft_vocab_size: Size according to the tensors, used if the configuration has none; None if it is unknown there
            too.
        where: Names the file; begins every message.

    Raises:
        ValueError: A field is missing, has another type, or asks for something that this head does not support.
    """
    nested = settings.get("transformer_layer_config")
    if nested is not None and not isinstance(nested, dict):
        raise ValueError(f"{where}: transformer_layer_config must be an object, got {nested!r}")
    layer = {name: value for name, value in (nested or settings).items() if value is not None}
    eagle = settings.get("eagle_config") or layer.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise ValueError(f"{where}: eagle_config must be an object, got {eagle!r}")
    fields = {**layer, **{name: value for name, value in settings.items() if value is not None}}
    missing = [name for name in _SIZES if name not in layer]
    if missing:
        raise ValueError(f"{where} describes no EAGLE-3 head: {', '.join(missing)} missing")
    _refuse_other_heads(fields, layer, eagle, where)
    size = fields.get("draft_vocab_size", draft_vocab_size)
    if size is None:
        raise ValueError(
            f"{where} has no draft_vocab_size, and the LM head does not cover the policy's whole vocabulary: add the "
            "number of its rows, if the head belongs to this policy"
        )
    named = fields.get(_LAYERS_FIELD) or eagle.get(_LAYERS_FIELD)
    usual = default_layers(num_layers)
    if not named and not 0 <= usual[0] < usual[1] < usual[2]:
        raise ValueError(
            f"{where} does not say which layers the head reads, and a policy of {num_layers} has not the usual ones: "
            f'add "{_LAYERS_FIELD}"'
        )
    return Eagle3Config(
        layer=_llama(layer, where),
        draft_vocab_size=whole("draft_vocab_size", size, where),
        layers=check_layers(named or usual, num_layers, f"{where}: {_LAYERS_FIELD}"),
        # As in vLLM: heads in the `speculators` layout norm before the residual unless they say otherwise.
        norm_before_residual=flag(settings, "norm_before_residual", nested is not None, where),
        target_hidden_size=whole("target_hidden_size", fields.get("target_hidden_size"), where, optional=True),
        norm_before_fc=flag(eagle if "norm_before_fc" in eagle else settings, "norm_before_fc", False, where),
        fc_norm=flag(settings, "fc_norm", False, where),
        norm_output=flag(settings, "norm_output", False, where),
        qk_norm=layer.get("model_type") == "qwen3",
    )


def _refuse_other_heads(
    fields: Mapping[str, Any], layer: Mapping[str, Any], eagle: Mapping[str, Any], where: str
) -> None:
    """Raise `ValueError` for EAGLE-3 heads with a different forward."""
    reasons = (
        (
            layer.get("num_hidden_layers", 1) != 1,
            f"it has {layer.get('num_hidden_layers')} layers, and one is supported",
        ),
        (
            layer.get("model_type", "llama") not in ("llama", "qwen3", "eagle", "eagle3"),
            f"its layer is of the type '{layer.get('model_type')}', and those of llama and qwen3 are supported",
        ),
        (
            eagle.get("use_aux_hidden_state", True) is False,
            "it reads the policy's last hidden state only (use_aux_hidden_state is false), which is not supported",
        ),
        (
            "sliding_attention" in (layer.get("layer_types") or ()),
            "its layer attends to a sliding window, which is not supported",
        ),
        (fields.get("logit_scale", 1.0) != 1.0, "it scales its logits (logit_scale), which is not supported"),
        (
            "quantization_config" in fields or "compression_config" in fields,
            "its weights are quantized: give the head in bfloat16 or float32",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise ValueError(f"{where}: {reason}")


def _llama(layer: Mapping[str, Any], where: str) -> LlamaConfig:
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        whole(name, layer.get(name), where, optional=name in _OPTIONAL_SIZES)
    try:
        return LlamaConfig(**{name: value for name, value in layer.items() if name not in _NOT_OF_THE_LAYER})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} describes no Llama layer: {' '.join(str(error).split())}") from error
