"""Computes a policy's norms and rotary embeddings in one pass each, during a call and in one thread.

Written as modules, a norm is six operations of torch and a rotary embedding ten. On a GPU each is a launch, on a CPU a call
and an allocation. Where a module's code is known (`layer_forms.py`), `atlas_kernels.layer` computes the same instead.
Weights are read from the module at every call, so nothing can be stale, and nothing is kept between calls.

A rotary embedding is a function that attention modules find among the names of their file. So their forward gets other
names, not other code: whatever a family does around its rotation stays its own.

Arguments that kernels do not take (other types, shapes, a gradient that is asked for) go the module's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from atlas_kernels.dispatch import kernels_run_on
from atlas_kernels.layer import TYPES, rms_norm, rotate
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.layer_forms import norm_form, rotates_halves
from atlas_rl.policy.parts import HasModules
from atlas_rl.policy.threads import replaced_forwards

_ROTARY = "apply_rotary_pos_emb"
_MOST_COLUMNS = 1 << 14  # of a norm: a program of the kernel has a whole row in registers
_MOST_NUMBERS = 1 << 20  # on a CPU: beyond, torch's threads are worth more than fewer passes


@contextmanager
def fused(model: HasModules) -> Iterator[None]:
    """Context in which this thread computes norms and rotary embeddings of known code in one pass each."""
    stand_in: dict[
        type, Callable[..., Any] | None
    ] = {}  # by class; others may put functions of their own into them later
    forwards = {}
    for module in model.modules():
        own = class_of(module)
        if own not in stand_in:
            stand_in[own] = _fused_forward(own)
        if stand_in[own] is not None and "forward" not in vars(module):
            forwards[module] = stand_in[own]
    with replaced_forwards(forwards):  # type: ignore[arg-type]
        yield


def _fused_forward(own: Any) -> Callable[..., Any] | None:
    """The replacement forward for modules of a class; None if the class is not known."""
    form = norm_form(own)
    if form is not None:
        return _norm(own.forward, form.epsilon, form.adds_one, form.rounds_first)
    forward = own.forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    rotary = forward.__globals__.get(_ROTARY)
    return _with_other_name(forward, _ROTARY, _rotation(rotary)) if rotates_halves(rotary) else None


def _norm(own: Callable[..., Any], epsilon: str, adds_one: bool, rounds_first: bool) -> Callable[..., torch.Tensor]:
    def forward(module: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (x,) = args or kwargs.values()
        weight = module.weight
        if not (_taken(x, weight) and weight.shape == x.shape[-1:] and len(weight) <= _MOST_COLUMNS):
            return own(module, x)
        return rms_norm(x.contiguous(), weight, getattr(module, epsilon), adds_one=adds_one, rounds_first=rounds_first)

    return forward


def _rotation(own: Any) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _rotatable(q, k, cos, sin, unsqueeze_dim):
            return own(q, k, cos, sin, unsqueeze_dim)
        query, key = rotate(_by_token(q), _by_token(k), cos[0].contiguous(), sin[0].contiguous())
        return query.transpose(0, 1)[None], key.transpose(0, 1)[None]

    return apply_rotary_pos_emb


def _rotatable(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int) -> bool:
    """Whether this is a packed batch, `[1, heads, num_tokens, dim]`, with an angle for each element of a head."""
    return (
        unsqueeze_dim == 1
        and q.dim() == k.dim() == 4
        and len(q) == len(k) == 1
        and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
        and k.shape[2:] == q.shape[2:]
        and q.shape[3] % 2 == 0
        and (q.dtype, cos.dtype) == (k.dtype, sin.dtype)
        and _taken(q, cos)
    )


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """View as `[num_tokens, heads, dim]`, the memory layout in which projections wrote it."""
    return x[0].transpose(0, 1).contiguous()


def _taken(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether kernels accept these tensors: on a GPU with Triton, or few float32 elements on a CPU."""
    if torch.is_grad_enabled() or x.dtype not in TYPES or other.dtype not in TYPES or x.device != other.device:
        return False
    if hasattr(other, "device_mesh"):  # a shard
        return False
    if x.device.type == "cpu":
        return x.dtype == other.dtype == torch.float32 and x.numel() <= _MOST_NUMBERS
    return kernels_run_on(x.device)


def _with_other_name(forward: FunctionType, name: str, meaning: object) -> FunctionType:
    """A copy of a function in which one global name refers to something else."""
    names = {**forward.__globals__, name: meaning}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
