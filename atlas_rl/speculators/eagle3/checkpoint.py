"""EAGLE-3 checkpoints: reads the `speculators` layout of the vLLM project and the original one, writes the first.

The `speculators` layout names its tensors as `Eagle3Head` does and keeps the layer's shape in `transformer_layer_config`.
The original one (SafeAILab/EAGLE) is a flat Llama configuration with `draft_vocab_size`, and its layer is called `midlayer`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.eagle3.head import Eagle3Config, Eagle3Head

_SPECULATORS_VERSION = "0.2.0"  # of the layout
_WEIGHTS, _PICKLE = "model.safetensors", "pytorch_model.bin"


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high layer where a checkpoint names none: as EAGLE-3's authors and vLLM have it."""
    return (2, num_layers // 2, num_layers - 3)


def is_eagle3(folder: str | Path) -> bool:
    """Whether a folder holds an EAGLE-3 head rather than a causal LM: its config names a draft vocabulary."""
    path = Path(folder) / "config.json"
    return path.is_file() and "draft_vocab_size" in path.read_text()


def load_eagle3(folder: str | Path, policy: PolicyView) -> Eagle3Head:
    """The head in `folder`, on the policy's device and in its number format.

    Raises:
        ValueError: No such checkpoint, a damaged one, or one for another policy; says which.
    """
    folder = Path(folder)
    settings, tensors = _read_config(folder), _read_tensors(folder)
    vocab_size, num_layers = policy.vocab_size, policy.num_layers
    config = _config(folder, settings, num_layers)
    if config.layer.vocab_size != vocab_size:
        raise ValueError(
            f"the EAGLE-3 head in '{folder}' is for a vocabulary of {config.layer.vocab_size} tokens, the policy has "
            f"{vocab_size}: it belongs to another policy"
        )
    if config.read_size != policy.hidden_size:
        raise ValueError(
            f"the EAGLE-3 head in '{folder}' reads a hidden size of {config.read_size}, the policy has "
            f"{policy.hidden_size}: it "
            "belongs to another policy"
        )
    if max(config.layers) >= num_layers:
        raise ValueError(
            f"the EAGLE-3 head in '{folder}' reads layer {max(config.layers)}, the policy has {num_layers}"
        )
    tensors = {_name(name): tensor for name, tensor in tensors.items()}
    head = Eagle3Head(config, own_embeddings="embed_tokens.weight" in tensors)
    if "t2d" not in tensors and "d2t" in tensors:
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        tensors["t2d"][tensors["d2t"] + torch.arange(len(tensors["d2t"]))] = True
    if "d2t" not in tensors and config.draft_vocab_size == vocab_size:
        tensors |= {"d2t": torch.zeros(vocab_size, dtype=torch.int64), "t2d": torch.ones(vocab_size, dtype=torch.bool)}
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the EAGLE-3 head in '{folder}' does not fit its own config.json: {error}") from error
    return head.to(device=policy.device, dtype=policy.dtype).eval()


def eagle3_layers(folder: str | Path, num_layers: int) -> tuple[int, ...]:
    """Layers of a policy with `num_layers` layers that a checkpoint's head reads; `ValueError` if it holds no head."""
    folder = Path(folder)
    return _config(folder, _read_config(folder), num_layers).layers


def save_eagle3(folder: str | Path, head: Eagle3Head, policy: nn.Module, *, num_draft_tokens: int = 3) -> None:
    """Write `head` in the `speculators` layout, weights in bfloat16.

    Args:
        folder: Gets `config.json` and `model.safetensors`.
        head: The head.
        policy: Named in the config as the verifier.
        num_draft_tokens: Suggested to engines that draft a fixed number.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, layer = head.config, head.config.layer
    settings = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.layers),
        "transformer_layer_config": {**layer.to_dict(), "torch_dtype": "bfloat16"},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}],
            "verifier": {
                "name_or_path": _public_name(policy),
                "architectures": [type(policy).__name__],
            },
        },
        "torch_dtype": "bfloat16",
    }
    tensors = {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in head.state_dict().items()
    }
    partial = folder / (_WEIGHTS + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / _WEIGHTS)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _public_name(policy: nn.Module) -> str | None:
    """The policy's name, without the folders of this machine."""
    name = str(getattr(policy.config, "name_or_path", "") or "")
    return (Path(name).name if Path(name).exists() else name) or None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no EAGLE-3 checkpoint in '{folder}': config.json is missing")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not JSON ({error}): download the checkpoint again") from error


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / _WEIGHTS).is_file():
        try:
            return load_file(folder / _WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"'{folder / _WEIGHTS}' is damaged ({error}): download the checkpoint again") from error
    if (folder / _PICKLE).is_file():
        try:
            return torch.load(folder / _PICKLE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"'{folder / _PICKLE}' is damaged ({error}): download the checkpoint again") from error
    raise ValueError(f"no EAGLE-3 checkpoint in '{folder}': neither {_WEIGHTS} nor {_PICKLE} is there")


def _config(folder: Path, settings: dict[str, Any], num_layers: int) -> Eagle3Config:
    """From either layout."""
    layer = settings.get("transformer_layer_config", settings)
    missing = [name for name in ("hidden_size", "vocab_size", "num_attention_heads") if name not in layer]
    if missing or "draft_vocab_size" not in settings:
        raise ValueError(
            f"'{folder / 'config.json'}' describes no EAGLE-3 head: {missing or ['draft_vocab_size']} missing"
        )
    known = {name: value for name, value in layer.items() if name not in ("architectures", "model_type", "auto_map")}
    named = settings.get("eagle_aux_hidden_state_layer_ids") or settings.get("eagle_config", {}).get(
        "eagle_aux_hidden_state_layer_ids"
    )
    return Eagle3Config(
        layer=LlamaConfig(**known),
        draft_vocab_size=int(settings["draft_vocab_size"]),
        layers=tuple(named) if named else default_layers(num_layers),
        norm_before_residual=bool(settings.get("norm_before_residual", False)),
        target_hidden_size=settings.get("target_hidden_size"),
    )


def _name(name: str) -> str:
    """The name of a tensor in the `speculators` layout."""
    name = name.removeprefix("model.")
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
