"""Reads DFlash and DSpark checkpoints in their own layouts and the vLLM project's `speculators` layout; writes z-lab's.

z-lab's checkpoints hold no embedding and no LM head: those of the policy are used. Checkpoints of the `speculators` layout
hold both, over the whole vocabulary or a reduced one (`d2t`). DSpark's confidence head is left out: the controller measures
in the run how likely drafts are accepted. Everything that a rollout relies on is checked here: names,
shapes and finiteness of the tensors, and that the head's tokens are tokens of the policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.dflash.config import DFlashConfig, parse_config
from atlas_rl.speculators.dflash.head import DFlashHead
from atlas_rl.speculators.head_checkpoint import VERIFIER, check_fit, draft_vocabulary, write_head
from atlas_rl.speculators.identify import DFLASH, DSPARK, check_finite, kind_of, read_config, read_tensors

_EMBEDDING, _OUTPUT = "embed_tokens.weight", "lm_head.weight"
_CONFIDENCE = "confidence_head."
_MASK_FILE = "mask_embedding.pt"


def load_dflash(folder: str | Path, policy: PolicyView) -> DFlashHead:
    """The head in `folder`, on the policy's device and in its number format.

    Raises:
        ValueError: There is no checkpoint, or it is damaged, of another kind, or for another policy; the message says
            which.
    """
    folder = Path(folder)
    what = f"the DFlash head in '{folder}'"
    config = _config(folder, policy.num_layers)
    named = {name.removeprefix("model."): tensor for name, tensor in read_tensors(folder).items()}
    tensors = {name: tensor for name, tensor in named.items() if not name.startswith((VERIFIER, _CONFIDENCE))}
    _check_belongs(config, tensors, policy, what)
    vocabulary: dict[str, torch.Tensor] = {name: tensors.pop(name) for name in ("d2t", "t2d") if name in tensors}
    if vocabulary or config.draft_vocab_size < policy.vocab_size:
        vocabulary = draft_vocabulary(vocabulary, config.draft_vocab_size, policy.vocab_size, what)
    head = DFlashHead(config, own_embeddings=_EMBEDDING in tensors, own_output=_OUTPUT in tensors)
    if head.reduced:
        tensors |= vocabulary
    elif vocabulary and bool(vocabulary["d2t"].any()):
        raise ValueError(f"{what} reorders the policy's tokens (d2t), which is not supported")
    check_fit(head, tensors, what)
    head.load_state_dict(tensors)
    head = head.to(device=policy.device, dtype=policy.dtype).eval()
    check_finite(head.state_dict(), what)
    return head


def dflash_layers(folder: str | Path, num_layers: int) -> tuple[int, ...]:
    """Policy layers, of `num_layers`, that a checkpoint's head reads; `ValueError` if it holds no head."""
    return _config(Path(folder), num_layers).layers


def save_dflash(folder: str | Path, head: DFlashHead, num_layers: int) -> None:
    """Write `head` in z-lab's layout, or in DeepSeek's of DSpark if it has a Markov head, weights in bfloat16.

    Args:
        folder: Gets `config.json` and `model.safetensors`.
        head: A head that uses the policy's embedding and LM head, and attends to the whole context without a window.
        num_layers: Decoder layers of the policy.

    Raises:
        ValueError: The head has tables of its own, or windows, or predicts from the newest token's position on.
    """
    config = head.config
    if head.embed_tokens is not None or head.lm_head is not None or head.reduced or config.target_hidden_size:
        raise ValueError("only a head that uses the policy's embedding and LM head can be written")
    if any(span.causal or span.window is not None for span in config.spans):
        raise ValueError("only a head whose blocks see all of the context and of themselves can be written")
    if config.samples_anchor:
        raise ValueError("only a head whose mask tokens predict their own positions can be written")
    rope: dict[str, Any] = dict(config.layer.rope_parameters or {})
    own = {"mask_token_id": config.mask_token_id, "target_layer_ids": [layer - 1 for layer in config.layers]}
    kind: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "num_target_layers": num_layers,
        "dflash_config": own,
    }
    if config.markov_rank:
        kind = {
            "architectures": ["Qwen3DSparkModel"],
            **own,
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": False,
            "sample_from_anchor": False,
        }
    settings = {
        **config.layer.to_dict(),
        **kind,
        "model_type": "qwen3",
        "block_size": config.block_size,
        "rope_theta": rope["rope_theta"],  # where readers before transformers 5 look
        "torch_dtype": "bfloat16",
    }
    write_head(folder, settings, head.state_dict())


def _config(folder: Path, num_layers: int) -> DFlashConfig:
    kind = kind_of(folder)
    if kind not in (DFLASH, DSPARK):
        raise ValueError(f"'{folder}' holds {kind}, no DFlash head: give the folder of one")
    if (folder / _MASK_FILE).exists():
        raise ValueError(f"'{folder}' has an embedding of its own for the mask token ({_MASK_FILE}): not supported")
    return parse_config(read_config(folder), num_layers, f"'{folder / 'config.json'}'", dspark=kind == DSPARK)


def _check_belongs(config: DFlashConfig, tensors: dict[str, torch.Tensor], policy: PolicyView, what: str) -> None:
    """Raise `ValueError` if the head cannot belong to this policy, or lacks a table that it needs."""
    for_this_one = "give a head that was trained for this policy"
    vocab_size, size = policy.vocab_size, config.layer.vocab_size
    if size != vocab_size or config.draft_vocab_size > vocab_size:
        raise ValueError(
            f"{what} drafts {config.draft_vocab_size} tokens of a vocabulary of {size}, the policy has one of "
            f"{vocab_size}: {for_this_one}"
        )
    if config.read_size != policy.hidden_size:
        raise ValueError(
            f"{what} reads a hidden size of {config.read_size}, the policy has {policy.hidden_size}: {for_this_one}"
        )
    for table, name in (("embedding", _EMBEDDING), ("LM head", _OUTPUT)):
        if name not in tensors and config.layer.hidden_size != policy.hidden_size:
            raise ValueError(
                f"{what} is {config.layer.hidden_size} wide, the policy {policy.hidden_size}, and the head has no {table} "
                f"of its own ({name}): add it"
            )
    if config.draft_vocab_size < vocab_size and _OUTPUT not in tensors:
        raise ValueError(
            f"{what} drafts {config.draft_vocab_size} of {vocab_size} tokens and has no LM head for them ({_OUTPUT}): add it"
        )
    rows = len(tensors[_EMBEDDING]) if _EMBEDDING in tensors else len(policy.input_table)
    if config.mask_token_id >= rows:
        raise ValueError(
            f"{what} marks positions by token {config.mask_token_id} (mask_token_id), and there are embeddings of {rows} "
            f"tokens: {for_this_one}, or enlarge the policy's embedding as it was for the head's training"
        )
