"""Reads the MTP layer of a policy's checkpoint, which transformers does not load with the policy."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from atlas_rl.policy.sharded import is_sharded
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.identify import check_finite, read_shapes, read_tensors
from atlas_rl.speculators.mtp.head import MtpHead, Parts
from atlas_rl.speculators.mtp.layout import find_layer

logger = logging.getLogger(__name__)

_EXPERT = r"(block\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight"
_QUANTIZED = r".*\.(weight_scale(_inv)?|qweight|weight_packed|scales)"


def folder_of(policy: PolicyView) -> Path:
    """The folder that the policy was loaded from: a local one, or one in the local cache of the hub.

    Raises:
        ValueError: There is no such folder.
    """
    name = str(getattr(policy.model.config, "name_or_path", "") or "")
    if name and Path(name).is_dir():
        return Path(name)
    try:
        found = cached_file(name, "config.json", local_files_only=True) if name else None
    except (OSError, ValueError):
        found = None
    if found is None:
        raise ValueError(
            "draft_model='mtp' reads the checkpoint that the policy was loaded from, and "
            + (f"'{name}' is no folder of this machine" if name else "the policy does not say which that was")
            + ": give its folder, draft_model='mtp:FOLDER'"
        )
    return Path(found).parent


def load_mtp(folder: Path, policy: PolicyView) -> MtpHead:
    """The first MTP layer of a checkpoint, on the policy's device and in its number format.

    Args:
        folder: Checkpoint that the policy was trained from.
        policy: The policy, which must run in this process.

    Raises:
        ValueError: The layer is missing, damaged, or of another policy, or the policy is sharded.
    """
    if is_sharded(policy.model):
        raise ValueError(
            "draft_model='mtp' cannot draft for a policy that FSDP shards: leave it out, or train with DDP"
        )
    what = f"the MTP layer in '{folder}'"
    shapes = read_shapes(folder)
    found = find_layer(shapes)
    if found is None:
        raise ValueError(
            f"draft_model='mtp': no MTP layer in '{folder}' (tensors called mtp.layers.N, layers.N.eh_proj or "
            "mtp_layers.N). Most families have none; and transformers leaves it out when it saves a policy: give the folder "
            "of the published checkpoint, draft_model='mtp:FOLDER'"
        )
    if any(re.fullmatch(_QUANTIZED, name) for name in found.names):
        raise ValueError(f"{what} is quantized: give the checkpoint in bfloat16 or float32")
    if found.num_layers > 1:
        logger.warning(
            "atlas_rl: '%s' has %d MTP layers: the first drafts every token, the others are not used",
            folder,
            found.num_layers,
        )
    read = read_tensors(folder, found.names)
    tensors = _with_experts_together({ours: read[name] for name, ours in found.names.items()})
    head = _empty_head(policy, found.feature_first, any(".experts." in name for name in tensors))
    _check_fit(head, tensors, what, type(policy.model).__name__)
    _fill(head, tensors, policy.dtype)
    check_finite(head.state_dict(), what)
    return head.to(policy.device).eval()


def _empty_head(policy: PolicyView, feature_first: bool, has_experts: bool) -> MtpHead:
    """A head whose weights are on the meta device: takes no memory and no random numbers."""
    parts = Parts.of(policy.model, policy.num_layers)
    try:
        with torch.device("meta"):
            return MtpHead(parts, policy.config, feature_first=feature_first, has_experts=has_experts)
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"draft_model='mtp': no further {parts.layer_class.__name__} can be made from the policy's configuration "
            f"({' '.join(str(error).split())}): leave it out"
        ) from error


def _with_experts_together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack weights of separate experts as transformers 5 stores them: `[experts, out, in]`, gate above up."""
    each: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(_EXPERT, name)
        if match is None:
            rest[name] = tensor
        else:
            each.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
    for prefix in {prefix for prefix, _ in each}:
        kinds = {kind: each.get((prefix, kind), {}) for kind in ("gate", "up", "down")}
        if not all(kinds[kind].keys() == set(range(len(kinds["down"]))) for kind in kinds):
            continue  # some are missing: reported as a missing stacked tensor
        gate, up, down = (torch.stack([kinds[kind][n] for n in range(len(kinds[kind]))]) for kind in kinds)
        rest |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    return rest


def _check_fit(head: MtpHead, tensors: dict[str, torch.Tensor], what: str, policy: str) -> None:
    """Raise `ValueError` if the tensors do not match the head."""
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            reason = f"lacks '{name}'"
        elif name not in expected:
            reason = f"has '{name}', which the layers of {policy} have not"
        elif tuple(tensors[name].shape) != expected[name]:
            reason = f"has '{name}' of shape {tuple(tensors[name].shape)} instead of {expected[name]}"
        else:
            continue
        raise ValueError(f"{what} {reason}: give the checkpoint that this policy was trained from")


def _fill(head: MtpHead, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Load the weights into the head, in a number format. Buffers, such as router biases, keep float32."""
    weights = {name for name, _ in head.named_parameters()}
    head.load_state_dict(
        {name: tensor.to(dtype if name in weights else torch.float32) for name, tensor in tensors.items()}, assign=True
    )
    head.requires_grad_(False)
    left: list[str] = [name for name, tensor in _all_tensors(head) if tensor.is_meta]
    if left:
        raise ValueError(
            f"the policy's layers compute {', '.join(left)} when they are made: leave draft_model='mtp' out"
        )


def _all_tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(), *module.named_buffers()]
