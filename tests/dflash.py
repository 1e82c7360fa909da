"""DFlash heads with random weights in the published layouts, and their forward written out, without a cache.

Nothing of the reader takes part: names, shapes and formulas are those of z-lab/dflash (`model.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from atlas_rl.speculators.dflash.config import parse_config
from atlas_rl.speculators.dflash.head import DFlashHead

BLOCK_SIZE, MASK = 6, 62
SHAPE: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "block_size": BLOCK_SIZE,
    "num_target_layers": 4,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2]},
}
"""`config.json` of a head for a policy of four layers, 32 wide, as z-lab writes it."""

NESTED = ("block_size", "num_target_layers", "dflash_config", "architectures")
"""Fields that the `speculators` layout does not have in `transformer_layer_config`."""


def random_tensors(seed: int = 5, **fields: Any) -> dict[str, torch.Tensor]:
    """Weights under the published names, large enough that every input matters."""
    shape = SHAPE | fields
    hidden, heads, kv_heads = (shape[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    dim, width = shape["head_dim"], shape["intermediate_size"]
    read = len(shape["dflash_config"]["target_layer_ids"]) * hidden
    shapes = {"fc.weight": (hidden, read), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for number in range(shape["num_hidden_layers"]):
        layer, attention = f"layers.{number}.", f"layers.{number}.self_attn."
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{attention}{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, width)
        rows = {"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden)}
        for name, size in (rows | {"o": (hidden, heads * dim)}).items():
            shapes[f"{attention}{name}_proj.weight"] = size
            if shape["attention_bias"]:
                shapes[f"{attention}{name}_proj.bias"] = size[:1]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in shapes.items():
        values = torch.randn(size, generator=generator)
        tensors[name] = 1.2 * size[-1] ** -0.5 * values if len(size) == 2 else 0.2 * values + ("norm" in name)
    return tensors


def markov_tensors(vocab_size: int = 64, draft_vocab_size: int = 64, rank: int = 4) -> dict[str, torch.Tensor]:
    """Weights of a Markov head under the published names."""
    generator = torch.Generator().manual_seed(8)
    return {
        "markov_head.markov_w1.weight": torch.randn(vocab_size, rank, generator=generator),
        "markov_head.markov_w2.weight": torch.randn(draft_vocab_size, rank, generator=generator),
    }


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """Write a head in z-lab's layout; `...` deletes a field."""
    folder.mkdir(exist_ok=True)
    settings = {name: value for name, value in (SHAPE | fields).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_dspark(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    """Write a head in DeepSeek's layout of DSpark."""
    own = {
        "architectures": ["Qwen3DSparkModel"],
        "dflash_config": ...,
        "num_target_layers": ...,
        **SHAPE["dflash_config"],
        "markov_rank": 4,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return write_checkpoint(folder, tensors, **own | fields)


def write_nested(folder: Path, tensors: dict[str, torch.Tensor], layer: Any = None, **fields: Any) -> Path:
    """Write a head in the `speculators` layout; `layer` are further fields of its layers, `...` deletes a field."""
    folder.mkdir(exist_ok=True)
    inner = {name: value for name, value in SHAPE.items() if name not in NESTED} | (layer or {})
    settings = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "draft_vocab_size": SHAPE["vocab_size"],
        "block_size": BLOCK_SIZE,
        "mask_token_id": MASK,
        "aux_hidden_state_layer_ids": [1, 3],
        "sliding_window_non_causal": False,
        "sample_from_anchor": False,
        "transformer_layer_config": {name: value for name, value in inner.items() if value is not ...},
    }
    settings = {name: value for name, value in (settings | fields).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


def head_for(model: nn.Module, *, markov_rank: int = 0, **fields: Any) -> DFlashHead:
    """A random head for a policy as narrow as the tiny ones; with a Markov head it is one of DSpark."""
    config: Any = model.config
    own = {"vocab_size": config.vocab_size, "num_target_layers": config.num_hidden_layers, **fields}
    tensors = random_tensors(**own)
    if markov_rank:
        own["markov_rank"] = markov_rank
        tensors |= markov_tensors(config.vocab_size, config.vocab_size, markov_rank)
    head = DFlashHead(parse_config(SHAPE | own, config.num_hidden_layers, "the head", dspark=markov_rank > 0))
    head.load_state_dict(tensors)
    return head.eval()


@torch.no_grad()
def plain_states(
    tensors: dict[str, torch.Tensor], model: nn.Module, tokens: torch.Tensor, spans: Any = None, **fields: Any
) -> torch.Tensor:
    """Inputs of the LM head, `[block_size, hidden]`, for the block that begins with the last token of a text.

    Args:
        tensors: The head's.
        model: The policy.
        tokens: int64 `[n]`, a text of at least two tokens.
        spans: `(window, causal)` of each layer; None for blocks that see everything.
        fields: Fields of the configuration that differ from `SHAPE`.
    """
    shape, w = SHAPE | fields, tensors
    dim, eps = shape["head_dim"], shape["rms_norm_eps"]
    group = shape["num_attention_heads"] // shape["num_key_value_heads"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return w[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * shape["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        cos, sin = (torch.cat([table, table], -1)[:, None] for table in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    states: Any = model(tokens[None], output_hidden_states=True).hidden_states
    read = torch.cat([states[n + 1][0, :-1] for n in shape["dflash_config"]["target_layer_ids"]], -1)
    context, size = norm("hidden_norm.weight", project("fc", read)), shape["block_size"]
    mask_id = shape["dflash_config"]["mask_token_id"]
    block = torch.cat([tokens[-1:], torch.full((size - 1,), mask_id)])
    x = model.get_input_embeddings()(block)
    positions = torch.arange(len(context) + size)
    own = positions[-size:]
    for number in range(shape["num_hidden_layers"]):
        layer, attention = f"layers.{number}.", f"layers.{number}.self_attn."
        h = norm(f"{layer}input_layernorm.weight", x)
        seen = torch.cat([context, h])
        inputs = {"q": h, "k": seen, "v": seen}
        q, k, v = (project(f"{attention}{name}_proj", y).unflatten(-1, (-1, dim)) for name, y in inputs.items())
        q = rotated(norm(f"{attention}q_norm.weight", q), own)
        k = rotated(norm(f"{attention}k_norm.weight", k), positions).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        window, causal = (None, False) if spans is None else spans[number]
        distance = own[:, None] - positions[None]
        if window is not None:
            scores = scores.masked_fill(distance.abs() >= window, float("-inf"))
        if causal:
            scores = scores.masked_fill(distance < 0, float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
        x = x + project(f"{attention}o_proj", out.flatten(1))
        y = norm(f"{layer}post_attention_layernorm.weight", x)
        gated = functional.silu(project(f"{layer}mlp.gate_proj", y)) * project(f"{layer}mlp.up_proj", y)
        x = x + project(f"{layer}mlp.down_proj", gated)
    return norm("norm.weight", x)
