"""Reads EAGLE-3 checkpoints in the vLLM project's `speculators` layout and the original one; writes the first.

The `speculators` layout has the tensor names of `Eagle3Head`. In the original one (SafeAILab/EAGLE) the layer is called
`midlayer`. Everything that a rollout relies on is checked here: names, shapes and finiteness of the tensors, and that `d2t`
maps to tokens of the policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.eagle3.config import Eagle3Config, parse_config
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.head_checkpoint import VERIFIER, check_fit, draft_vocabulary, public_name, write_head
from atlas_rl.speculators.identify import EAGLE3, check_finite, kind_of, read_config, read_tensors

_SPECULATORS_VERSION = "0.2.0"  # version of the layout
_NUM_USUAL_LAYERS = 3
_SUGGESTED_DRAFT_TOKENS = 3  # for engines that draft a fixed number


def load_eagle3(folder: str | Path, policy: PolicyView) -> Eagle3Head:
    """The head in `folder`, on the policy's device and in its number format.

    Raises:
        ValueError: There is no checkpoint, or it is damaged, of another kind, or for another policy; the message says
            which.
    """
    folder = Path(folder)
    what = f"the EAGLE-3 head in '{folder}'"
    settings = _settings(folder)
    tensors = {_name(name): tensor for name, tensor in read_tensors(folder).items() if not name.startswith(VERIFIER)}
    config = _config_for(policy, settings, tensors, what, f"'{folder / 'config.json'}'")
    tensors |= draft_vocabulary(tensors, config.draft_vocab_size, policy.vocab_size, what)
    # The original code has no biases, whatever a configuration copied from the policy's says.
    config.layer.attention_bias = "layers.0.self_attn.q_proj.bias" in tensors
    config.layer.mlp_bias = "layers.0.mlp.gate_proj.bias" in tensors
    head = Eagle3Head(config, own_embeddings="embed_tokens.weight" in tensors)
    check_fit(head, tensors, what)
    head.load_state_dict(tensors)
    head = head.to(device=policy.device, dtype=policy.dtype).eval()
    check_finite(head.state_dict(), what)
    return head


def eagle3_layers(folder: str | Path, num_layers: int) -> tuple[int, ...]:
    """Policy layers, of `num_layers`, that a checkpoint's head reads; `ValueError` if it holds no head."""
    folder = Path(folder)
    return parse_config(_settings(folder), num_layers, 1, f"'{folder / 'config.json'}'").layers


def save_eagle3(folder: str | Path, head: Eagle3Head, policy: nn.Module) -> None:
    """Write `head` in the `speculators` layout, weights in bfloat16.

    Args:
        folder: Gets `config.json` and `model.safetensors`.
        head: The head.
        policy: Named in the config as the verifier.
    """
    config, layer = head.config, {**head.config.layer.to_dict(), "torch_dtype": "bfloat16", "num_hidden_layers": 1}
    if len(config.layers) != _NUM_USUAL_LAYERS:
        # vLLM reads the number of layers from here, and assumes three without it.
        layer["num_aux_hidden_states"] = len(config.layers)
    if config.qk_norm:
        layer["model_type"] = "qwen3"
    settings = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.layers),
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": _SUGGESTED_DRAFT_TOKENS}],
            "verifier": {
                "name_or_path": public_name(policy),
                "architectures": [type(policy).__name__],
            },
        },
        "torch_dtype": "bfloat16",
    }
    tensors = head.state_dict()
    if config.draft_vocab_size == config.layer.vocab_size and not tensors["d2t"].any():
        # vLLM has no place for a mapping of all tokens to themselves, and would refuse the file.
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    write_head(folder, settings, tensors)


def _settings(folder: Path) -> dict[str, Any]:
    kind = kind_of(folder)
    if kind != EAGLE3:
        raise ValueError(f"'{folder}' holds {kind}, no EAGLE-3 head: give the folder of one")
    return read_config(folder)


def _config_for(
    policy: PolicyView, settings: dict[str, Any], tensors: dict[str, torch.Tensor], what: str, where: str
) -> Eagle3Config:
    """The head's configuration; `ValueError` if the head cannot belong to this policy."""
    vocab_size = policy.vocab_size
    head_weight = tensors.get("lm_head.weight")
    if head_weight is None:
        raise ValueError(
            f"{what} has no LM head (lm_head.weight), and sharing the policy's is not supported: save the rows of the "
            "policy's LM head for its tokens under that name"
        )
    covers_all = len(head_weight) == vocab_size
    config = parse_config(settings, policy.num_layers, vocab_size if covers_all else None, where)
    for_this_one = "give a head that was trained for this policy"
    if config.layer.vocab_size != vocab_size or config.draft_vocab_size > vocab_size:
        raise ValueError(
            f"{what} drafts {config.draft_vocab_size} tokens of a vocabulary of {config.layer.vocab_size}, the policy has "
            f"one of {vocab_size}: {for_this_one}"
        )
    if config.read_size != policy.hidden_size:
        raise ValueError(
            f"{what} reads a hidden size of {config.read_size}, the policy has {policy.hidden_size}: {for_this_one}"
        )
    if "embed_tokens.weight" not in tensors and config.read_size != config.layer.hidden_size:
        raise ValueError(
            f"{what} is {config.layer.hidden_size} wide, the policy {config.read_size}, and the head has no embeddings of "
            "its own (embed_tokens.weight): add them"
        )
    return config


def _name(name: str) -> str:
    """The name of a tensor in the `speculators` layout."""
    name = name.removeprefix("model.")
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
