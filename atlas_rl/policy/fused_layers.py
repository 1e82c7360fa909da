"""Computes a policy's norms, rotary embeddings and gates in one pass each, during a call and in one thread.

As modules, a norm takes six torch operations, a rotary embedding ten and a gate two. Each is a launch on a GPU, and a
call and an allocation on a CPU. If a module's code is known (`layer_forms.py`), `atlas_kernels.layer` computes the same
in one pass. Weights are read from the module at every call, so nothing can be stale. Replacements are
kept for the sessions of one cache (`parts.py`), and not between calls.

A gated layer calls its projections as modules, and a GPU computes the gate between them in one pass. A CPU keeps torch's two
vectorised passes.

A rotary embedding is a global function in the attention module's file. So the attention's forward gets other globals,
not other code: what a family does around its rotation is unchanged.

Arguments that kernels do not support (other types or shapes, a requested gradient) run the module's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from atlas_kernels.dispatch import kernels_run_on
from atlas_kernels.layer import TYPES, gated, rms_norm, rotate
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.layer_forms import activation_form, is_gated, norm_form, rotates_halves
from atlas_rl.policy.parts import HasModules, kept
from atlas_rl.policy.threads import replaced_forwards

_Maker = Callable[[Any], Callable[..., Any] | None]
_ROTARY = "apply_rotary_pos_emb"
_MOST_COLUMNS = 1 << 14  # of a norm: a program of the kernel holds a whole row in registers
_MOST_NUMBERS = 1 << 20  # on a CPU: above, torch's threads gain more than fewer passes


@contextmanager
def fused(model: HasModules) -> Iterator[None]:
    """Context in which this thread computes norms, rotary embeddings and gates of known code in one pass each."""
    with replaced_forwards(kept(model, _forwards_of)):
        yield


def _forwards_of(model: HasModules) -> dict[Any, Callable[..., Any]]:
    """The replacements of all modules of known code."""
    makers: dict[type, _Maker] = {}  # by class; not kept between calls, as classes may be patched
    forwards = {}
    for module in model.modules():
        own = class_of(module)
        if own not in makers:
            makers[own] = _maker(own)
        made = None if "forward" in vars(module) else makers[own](module)
        if made is not None:
            forwards[module] = made
    return forwards


def _maker(own: Any) -> _Maker:
    """Makes the replacement forward for a module of a class; the replacement is None if the class is not known."""
    forward, form, made = getattr(own, "forward", None), norm_form(own), None
    if is_gated(forward):
        return _gate
    if form is not None:
        made = _norm(own.forward, form.epsilon, form.adds_one, form.rounds_first)
    elif isinstance(forward, FunctionType) and _ROTARY in forward.__code__.co_names:
        rotary = forward.__globals__.get(_ROTARY)
        made = _with_other_name(forward, _ROTARY, _rotation(rotary)) if rotates_halves(rotary) else None
    return lambda module: made


def _norm(own: Callable[..., Any], epsilon: str, adds_one: bool, rounds_first: bool) -> Callable[..., torch.Tensor]:
    def forward(module: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (x,) = args or kwargs.values()
        weight = module.weight
        if not (_taken(x, weight) and weight.shape == x.shape[-1:] and len(weight) <= _MOST_COLUMNS):
            return own(module, x)
        return rms_norm(x.contiguous(), weight, getattr(module, epsilon), adds_one=adds_one, rounds_first=rounds_first)

    return forward


def _gate(layer: Any) -> Callable[..., torch.Tensor] | None:
    """The replacement forward for a gated layer; None if its activation is not known."""
    activation = activation_form(layer.act_fn)
    if activation is None:
        return None

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        if gate.is_cuda and gate.shape == up.shape and gate.dtype == up.dtype and _taken(gate, up):
            return module.down_proj(gated(gate.contiguous(), up.contiguous(), activation))
        return module.down_proj(module.act_fn(gate) * up)

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
