"""Detects custom code in a policy's forward, which may depend on more than a row's own tokens and positions.

Except for attention, layers of the libraries below compute each position on its own. Other code may do so as well; it
only gets a closer check (`policy/probe.py`).
"""

from __future__ import annotations

from torch import nn

from atlas_rl.policy.guise import class_of
from atlas_rl.policy.unwrap import hooks_of, origin_of

_KNOWN = (
    "transformers.",
    "torch.",
    "peft.",
    "accelerate.",
    "bitsandbytes.",
    "deepspeed.",
    "torchao.",
    "trl.",
    "atlas_rl.",
)


def own_code(model: nn.Module) -> bool:
    """Whether `model` has a forward or a forward hook from outside the known libraries."""
    return any(not origin_of(code).startswith(_KNOWN) for module in model.modules() for code in _code_of(module))


def _code_of(module: nn.Module) -> list[object]:
    own = vars(module).get("forward")
    return [class_of(module).forward, *([] if own is None else [own]), *hooks_of(module)]
