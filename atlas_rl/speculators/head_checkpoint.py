"""What checkpoints of heads have in common: fields of a configuration, the reduced vocabulary, the fit of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_rl.whole_files import save_whole, write_whole

VERIFIER = "verifier_"
"""Prefix of policy tensors that some versions of the `speculators` training saved with a head."""

_WEIGHTS = "model.safetensors"


def whole(name: str, value: Any, where: str, *, optional: bool = False) -> Any:
    """Check that a field is a whole number of at least 1, or None if it is `optional`; `ValueError` otherwise."""
    if optional and value is None:
        return None
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: {name} must be a whole number of at least 1, got {value!r}")
    return value


def flag(source: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    """A field that is true or false; `default` if it is absent or null, `ValueError` for anything else."""
    value = source.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
    return value


def draft_vocabulary(
    tensors: Mapping[str, torch.Tensor], draft_vocab_size: int, vocab_size: int, what: str
) -> dict[str, torch.Tensor]:
    """`d2t` (offsets from draft tokens to the policy's, int64) and `t2d` (bool), from whichever the file has.

    Raises:
        ValueError: They have another type or length, contradict each other, point outside the vocabulary, map two draft
            tokens to one, or `d2t` alone can be read as offsets and as ids.
    """
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if t2d is not None and (t2d.shape != (vocab_size,) or t2d.is_floating_point() or bool((t2d != t2d.bool()).any())):
        raise ValueError(f"{what}: t2d must hold true or false for each of {vocab_size} tokens, got {_described(t2d)}")
    known = None if t2d is None else t2d.bool().nonzero().flatten()
    if d2t is None:
        if known is None and draft_vocab_size == vocab_size:
            known = torch.arange(vocab_size, device="cpu")
        if known is None or len(known) != draft_vocab_size:
            raise ValueError(
                f"{what} drafts {draft_vocab_size} of {vocab_size} tokens and lacks d2t, which says which ones"
            )
        d2t = known - torch.arange(draft_vocab_size, device="cpu")
    if d2t.shape != (draft_vocab_size,) or d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise ValueError(f"{what}: d2t must hold {draft_vocab_size} whole numbers, got {_described(d2t)}")
    d2t = d2t.to(torch.int64)
    ids = d2t + torch.arange(draft_vocab_size, device="cpu")
    outside = int(((ids < 0) | (ids >= vocab_size)).sum())
    twice = draft_vocab_size - len(ids.unique())
    differs = known is not None and not torch.equal(ids.sort().values, known)
    # Ids always rise. Offsets rise everywhere only if no two of the draft tokens are neighbours.
    if known is None and not outside and draft_vocab_size > 1 and bool((d2t.diff() > 0).all()):
        raise ValueError(
            f"{what}: d2t can be read as offsets and as token ids. Add t2d, which says for each of the policy's "
            f"{vocab_size} tokens whether it is drafted"
        )
    if outside or twice or differs:
        reason = (
            f"leads out of the policy's {vocab_size} tokens in {outside} places" if outside
            else f"leads to {twice} tokens more than once" if twice
            else "and t2d name different tokens"
        )  # fmt: skip
        raise ValueError(
            f"{what}: d2t {reason}. It must hold offsets, not ids: added to 0, 1, 2, ... they give the policy's token ids"
        )
    mask = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
    mask[ids] = True
    return {"d2t": d2t, "t2d": mask}


def check_fit(head: nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise `ValueError` if the tensors do not match the head that the configuration describes."""
    own = head.state_dict()
    faults = [
        *(f"{name} is missing" for name in own if name not in tensors),
        *(f"{name} is unknown" for name in tensors if name not in own),
        *(
            f"{name} is {list(tensor.shape)} instead of {list(own[name].shape)}"
            for name, tensor in tensors.items()
            if name in own and tensor.shape != own[name].shape
        ),
    ]
    if faults:
        raise ValueError(f"{what} does not fit its own config.json: {', '.join(faults)}")


def write_head(folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `config.json` and `model.safetensors` of a head, weights in bfloat16; the folder is made if need be.

    Raises:
        OSError: A write failed. Each file is then the new one or the previous one.
    """
    folder = Path(folder)
    written = {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_whole(folder / _WEIGHTS, written, {"format": "pt"})
    write_whole(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def public_name(policy: nn.Module) -> str | None:
    """The policy's name, without local folders."""
    config: Any = policy.config
    name = str(getattr(config, "name_or_path", "") or "")
    return (Path(name).name if Path(name).exists() else name) or None


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
