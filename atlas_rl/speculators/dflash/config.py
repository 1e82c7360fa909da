"""Shape of a DFlash or DSpark head, and how to read it from its configuration.

    z-lab's DFlash   a flat Qwen3 configuration with `block_size`, `num_target_layers` and `dflash_config`
                    (`mask_token_id`, `target_layer_ids`; newer ones have `block_size` there)
    DeepSeek's      the same without `dflash_config`: all fields are beside the layers', `markov_rank` among them
    DSpark
    `speculators`   the Qwen3 configuration in `transformer_layer_config`, beside it `block_size`, `mask_token_id`,
                    `aux_hidden_state_layer_ids`, `draft_vocab_size`, `sliding_window_non_causal`

All are read as z-lab/dflash (`model.py`), vllm-project/speculators (`models/dflash`, `models/dspark`) and vLLM's loaders
(`qwen3_dflash.py`, `qwen3_dspark.py`) read them. Where these disagree about a field, or a field changes the head in a way
that is not supported, the checkpoint is refused by name. Layers are counted differently: `target_layer_ids` names
layers whose outputs are read, `aux_hidden_state_layer_ids` those whose inputs are. A null field counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3Config

from atlas_rl.speculators.head_checkpoint import flag, whole

_SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
_NOT_OF_THE_LAYERS = (
    "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "dflash_config", "block_size",
    "num_target_layers", "mask_token_id", "is_causal", "target_layer_ids", "sample_from_anchor",
    "markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov",
)  # fmt: skip
_KNOWN = frozenset(
    {
        "mask_token_id", "target_layer_ids", "block_size", "causal", "use_swa", "swa_window_size", "sample_from_anchor",
        "use_aux_hidden_state", "attention_sink_bias", "attention_value_scale",
    }
)  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Span:
    """What the queries of a block see in one layer.

    Attributes:
        window: Only positions less than this far away, on either side; None for all.
        causal: Whether a query sees no later positions of its block.
    """

    window: int | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class DFlashConfig:
    """Shape of a head.

    Attributes:
        layer: Its decoder layers, as a Qwen3 configuration; `vocab_size` is the policy's.
        layers: Decoder layers of the policy whose inputs it reads, ascending.
        block_size: Positions of a block: the newest token, and one mask token for each token that can be drafted.
        mask_token_id: Token that stands for a position to be drafted.
        spans: Per layer of the head, what a block's queries see.
        draft_vocab_size: Tokens the head can propose.
        target_hidden_size: Hidden size of the policy, if it differs from the head's.
        samples_anchor: Whether each position predicts the token behind it, from the newest token's on; otherwise each mask
            token predicts its own.
        markov_rank: Rank of the bias that the previous token puts on the logits (DSpark); 0 for none.
    """

    layer: Qwen3Config
    layers: tuple[int, ...]
    block_size: int
    mask_token_id: int
    spans: tuple[Span, ...]
    draft_vocab_size: int
    target_hidden_size: int | None = None
    samples_anchor: bool = False
    markov_rank: int = 0

    @property
    def read_size(self) -> int:
        """Hidden size of the policy."""
        return self.target_hidden_size or self.layer.hidden_size

    @property
    def first_place(self) -> int:
        """Position in the block that predicts the first token."""
        return 0 if self.samples_anchor else 1

    @property
    def max_draft_tokens(self) -> int:
        """Most tokens of a draft."""
        return self.block_size - self.first_place


def parse_config(settings: Mapping[str, Any], num_layers: int, where: str, *, dspark: bool = False) -> DFlashConfig:
    """Read a head's configuration in either layout.

    Args:
        settings: Content of `config.json`.
        num_layers: Number of layers of the policy.
        where: Names the file; begins every message.
        dspark: Whether it is a DSpark head.

    Raises:
        ValueError: A field is missing, has another type, or asks for something that this head does not support.
    """
    nested = _object(settings, "transformer_layer_config", where)
    dflash = _object(settings, "dflash_config", where) or {}
    layer = {name: value for name, value in (nested or settings).items() if value is not None}
    fields = {**layer, **{name: value for name, value in settings.items() if value is not None}}
    missing = [name for name in _SIZES if name not in layer]
    if missing:
        raise ValueError(f"{where} describes no {'DSpark' if dspark else 'DFlash'} head: {', '.join(missing)} missing")
    _refuse_other_heads(fields, layer, dflash, where)
    trained_for = whole("num_target_layers", fields.get("num_target_layers"), where, optional=True)
    if trained_for not in (None, num_layers) and not dspark:  # some DSpark heads count there what they read
        raise ValueError(
            f"{where}: the head is for a policy of {trained_for} layers, this one has {num_layers}: give a head that was "
            "trained for this policy"
        )
    qwen3 = _qwen3(layer, where)
    return DFlashConfig(
        layer=qwen3,
        layers=_layers(settings, dflash, nested is not None, num_layers, where),
        block_size=_block_size(fields, dflash, where),
        mask_token_id=_mask_token(fields, dflash, where),
        spans=_trained_spans(qwen3, settings, where) if nested is not None else _spans(qwen3, fields, dflash, where),
        draft_vocab_size=whole("draft_vocab_size", fields.get("draft_vocab_size", qwen3.vocab_size), where),
        target_hidden_size=whole("target_hidden_size", fields.get("target_hidden_size"), where, optional=True),
        samples_anchor=_samples_anchor(fields, dflash, dspark, nested is not None, where),
        markov_rank=_markov_rank(fields, where) if dspark else 0,
    )


def _object(settings: Mapping[str, Any], name: str, where: str) -> Any:
    value = settings.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be an object, got {value!r}")
    return {key: each for key, each in value.items() if each is not None}


def _refuse_other_heads(
    fields: Mapping[str, Any], layer: Mapping[str, Any], dflash: Mapping[str, Any], where: str
) -> None:
    """Raise `ValueError` for heads with a different forward."""
    both = {**fields, **dflash}
    rope = {
        name: value
        for each in ("rope_scaling", "rope_parameters")
        for name, value in (_object(layer, each, where) or {}).items()
    }
    types = layer.get("layer_types", [])
    odd = [kind for kind in types if kind not in (_FULL, _SLIDING)] if isinstance(types, list) else [types]
    unknown = sorted(name for name, value in dflash.items() if name not in _KNOWN and value is not False)
    reasons = (
        (
            layer.get("model_type", "qwen3") != "qwen3",
            f"its layers are of the type '{layer.get('model_type')}', and those of qwen3 are supported",
        ),
        (bool(odd), f"it has layers of the type {odd[0]!r}, which is not supported" if odd else ""),
        (bool(unknown), f"dflash_config has {', '.join(unknown)}, which may change the head and is not known"),
        (
            both.get("use_aux_hidden_state", True) is not True,
            "it reads the policy's last hidden state only (use_aux_hidden_state is false), which is not supported",
        ),
        (
            bool(both.get("attention_sink_bias")) or bool(fields.get("add_swa_attention_sink_bias")),
            "its attention has sinks (attention_sink_bias), which is not supported",
        ),
        ("attention_value_scale" in both, "it scales its values (attention_value_scale), which is not supported"),
        (fields.get("is_neox_style", True) is not True, "its rotary pairs interleave (is_neox_style): not supported"),
        (fields.get("logit_scale", 1.0) != 1.0, "it scales its logits (logit_scale), which is not supported"),
        (
            rope.get("partial_rotary_factor", layer.get("partial_rotary_factor", 1.0)) != 1.0,
            "it rotates a part of each head only (partial_rotary_factor), which is not supported",
        ),
        ("mrope_section" in rope, "its positions have three dimensions (mrope_section), which is not supported"),
        (
            any(isinstance(value, dict) for value in rope.values()),
            "its rotary settings differ by type of layer (rope_parameters), which is not supported",
        ),
        (
            "rope_theta" not in {**layer, **rope},
            "it does not say its rotary base (rope_theta), for which readers take different values: add it",
        ),
        (
            "quantization_config" in fields or "compression_config" in fields,
            "its weights are quantized: give the head in bfloat16 or float32",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise ValueError(f"{where}: {reason}")


def _qwen3(layer: Mapping[str, Any], where: str) -> Qwen3Config:
    for name in (*_SIZES, "max_position_embeddings"):
        whole(name, layer.get(name), where, optional=name not in _SIZES)
    try:
        config = Qwen3Config(**{name: value for name, value in layer.items() if name not in _NOT_OF_THE_LAYERS})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} describes no Qwen3 layers: {' '.join(str(error).split())}") from error
    if len(config.layer_types or ()) != config.num_hidden_layers:
        raise ValueError(
            f"{where}: layer_types must name the type of each of {config.num_hidden_layers} layers, got "
            f"{config.layer_types!r}"
        )
    return config


def _layers(
    settings: Mapping[str, Any], dflash: Mapping[str, Any], is_nested: bool, num_layers: int, where: str
) -> tuple[int, ...]:
    """The policy's layers whose inputs are read."""
    name = "aux_hidden_state_layer_ids" if is_nested else "dflash_config.target_layer_ids"
    named = settings.get(name) if is_nested else dflash.get("target_layer_ids", settings.get("target_layer_ids"))
    if not isinstance(named, list) or not named or not all(type(layer) is int for layer in named):
        raise ValueError(f"{where}: {name} must list decoder layers by number, got {named!r}")
    if sorted(set(named)) != named:
        raise ValueError(
            f"{where}: {name} must ascend, got {named}: readers put the states of other lists into different orders"
        )
    layers = tuple(named) if is_nested else tuple(layer + 1 for layer in named)
    for layer in (layers[0], layers[-1]):
        if not 0 <= layer <= num_layers or (layer == 0 and not is_nested):
            raise ValueError(f"{where}: {name} names layer {named[layers.index(layer)]}, the policy has {num_layers}")
    if layers[-1] == num_layers:
        raise ValueError(
            f"{where}: {name} names the output of the policy's last layer, which some readers take before its final norm "
            "and some after: not supported"
        )
    also = settings.get("eagle_aux_hidden_state_layer_ids")
    if also is not None and list(also) != list(layers):
        raise ValueError(
            f"{where} names the inputs of layers {list(layers)} in {name} and those of {also} in "
            "eagle_aux_hidden_state_layer_ids: leave out the wrong ones"
        )
    return layers


def _block_size(fields: Mapping[str, Any], dflash: Mapping[str, Any], where: str) -> int:
    named = [value for value in (fields.get("block_size"), dflash.get("block_size")) if value is not None]
    if not named or named[0] != named[-1]:
        said = f"the block sizes {named[0]} and {named[-1]}" if named else "no block_size"
        raise ValueError(f"{where} has {said}: give the one that the head was trained with")
    size: int = whole("block_size", named[0], where)
    if size < 2:
        raise ValueError(f"{where}: block_size must be at least 2, got {size}: a block of one token drafts nothing")
    return size


def _mask_token(fields: Mapping[str, Any], dflash: Mapping[str, Any], where: str) -> int:
    token = dflash.get("mask_token_id", fields.get("mask_token_id"))
    if type(token) is not int or token < 0:
        raise ValueError(f"{where}: mask_token_id must be a token's number, got {token!r}")
    return token


def _samples_anchor(
    fields: Mapping[str, Any], dflash: Mapping[str, Any], dspark: bool, is_nested: bool, where: str
) -> bool:
    both = {**fields, **dflash}
    if dspark and is_nested and "sample_from_anchor" not in both:
        raise ValueError(
            f"{where} does not say which position predicts a token (sample_from_anchor): add it, readers take different "
            "values without it"
        )
    return flag(both, "sample_from_anchor", dspark, where)


def _markov_rank(fields: Mapping[str, Any], where: str) -> int:
    if fields.get("markov_head_type", "vanilla") != "vanilla":
        raise ValueError(
            f"{where}: its Markov head is of the type '{fields['markov_head_type']}', and 'vanilla' is supported"
        )
    rank = fields.get("markov_rank")
    if type(rank) is not int or rank < 0:
        raise ValueError(f"{where}: markov_rank must be a whole number of at least 0, got {rank!r}")
    return rank


def _spans(config: Qwen3Config, fields: Mapping[str, Any], dflash: Mapping[str, Any], where: str) -> tuple[Span, ...]:
    """Spans in z-lab's layout, as vLLM resolves them (`_resolve_layer_attention`)."""
    types = list(config.layer_types or ())
    everywhere = flag(dflash, "use_swa", False, where) and _SLIDING not in types
    said = flag(fields, "is_causal", False, where) if "is_causal" in fields else None
    if said is None and "causal" in dflash:
        said = flag(dflash, "causal", False, where)
    window = dflash.get("swa_window_size", config.sliding_window)
    spans = []
    for kind in types:
        causal = kind == _SLIDING if said is None else said
        sliding = everywhere or kind == _SLIDING
        spans.append(Span(_window(window, where) if sliding else None, causal))
    return tuple(spans)


def _trained_spans(config: Qwen3Config, settings: Mapping[str, Any], where: str) -> tuple[Span, ...]:
    """Spans in the `speculators` layout, as its training has them: only windows can be causal."""
    spans = []
    for kind in config.layer_types or ():
        if kind != _SLIDING:
            spans.append(Span())
            continue
        if settings.get("sliding_window_non_causal") is None:
            raise ValueError(
                f"{where} does not say whether its windows are causal (sliding_window_non_causal): add it, readers take "
                "different values without it"
            )
        causal = not flag(settings, "sliding_window_non_causal", False, where)
        spans.append(Span(_window(config.sliding_window, where), causal))
    return tuple(spans)


def _window(size: Any, where: str) -> int:
    if type(size) is not int or size < 1:
        raise ValueError(
            f"{where}: its layers attend to a window, and its size (sliding_window with use_sliding_window, or "
            f"dflash_config.swa_window_size) is {size!r}"
        )
    return size
