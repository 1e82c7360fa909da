"""Recognises norms, rotary embeddings and gated layers that dozens of transformers families share, by their code.

transformers repeats layers in every family's file: 78 of its classes have Llama's norm, 73 of its files Llama's rotary
embedding. A function is recognised if it has the same instructions and its global names mean the same (`same_code`).
Nothing is inferred from a class's name, or from equal results: code that is written differently, in another release or
by others, is not recognised and runs unchanged.

The functions below are copies for comparison. They are never called.
"""

from __future__ import annotations

import builtins
import dis
import inspect
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from atlas_kernels.layer_reference import Activation
from atlas_rl.policy.guise import class_of


@dataclass(frozen=True, slots=True)
class NormForm:
    """How an RMS norm is written.

    Attributes:
        epsilon: Name of the attribute that holds its epsilon.
        adds_one, rounds_first: See `atlas_kernels.layer.rms_norm`.
    """

    epsilon: str
    adds_one: bool = False
    rounds_first: bool = False


def norm_form(own: type) -> NormForm | None:
    """The form of a norm's class; None if it is not a known one."""
    for known, form in _NORMS:
        methods = [name for name, value in vars(known).items() if isinstance(value, FunctionType)]
        if all(same_code(getattr(own, name, None), vars(known)[name]) for name in methods):
            return form
    return None


def rotates_halves(function: object) -> bool:
    """Whether a function is Llama's `apply_rotary_pos_emb`."""
    return same_code(function, apply_rotary_pos_emb)


def is_gated(function: object) -> bool:
    """Whether a function is the forward of Llama's `MLP`, which 122 classes have."""
    return same_code(function, _Gated.forward)


def activation_form(module: Any) -> Activation | None:
    """The activation that a module of `ACT2FN` computes; None if it is not known, or if it has hooks or was patched."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    own = class_of(module)
    forward = getattr(own, "forward", None)
    if same_code(forward, _Silu.forward):
        return "silu"
    act = getattr(module, "act", None)
    if not same_code(forward, _GeluTanh.forward) or not isinstance(act, partial) or act.args:
        return None
    return "gelu_tanh" if act.func is nn.functional.gelu and act.keywords == {"approximate": "tanh"} else None


def same_code(function: object, known: Any, unused: frozenset[str] = frozenset()) -> bool:
    """Whether two functions have the same instructions, defaults, and meanings of global names, but for `unused` ones."""
    if not isinstance(function, FunctionType):
        return False
    if function.__closure__ or (function.__defaults__, function.__kwdefaults__) != (
        known.__defaults__,
        known.__kwdefaults__,
    ):
        return False
    theirs, ours = _instructions(function.__code__), _instructions(known.__code__)
    if theirs != ours or _signature(function.__code__) != _signature(known.__code__):
        return False
    names = [name for operation, name in ours if operation == "LOAD_GLOBAL" and name not in unused]
    return all(_same_meaning(_global(function, name), _global(known, name)) for name in names)


def _same_meaning(theirs: object, ours: object) -> bool:
    return theirs is ours or (isinstance(ours, FunctionType) and same_code(theirs, ours))


def _global(function: FunctionType, name: Any) -> object:
    return function.__globals__.get(name, getattr(builtins, name, None))


@cache
def _instructions(code: CodeType) -> list[tuple[str, Any]]:
    return [(each.opname, each.argval) for each in dis.get_instructions(code)]


def _signature(code: CodeType) -> tuple[Any, ...]:
    kind = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    return code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, kind, code.co_varnames


class _Gated:
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class _Silu:
    def forward(self, input: Any) -> Any:
        return nn.functional.silu(input)


class _GeluTanh:
    act: Any

    def forward(self, input: Any) -> Any:
        return self.act(input)


class _Llama:
    weight: Any
    variance_epsilon: Any

    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Olmo2:
    weight: Any
    variance_epsilon: Any

    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class _Helium:
    weight: Any
    variance_epsilon: Any

    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)


class _Gemma:
    weight: Any
    eps: Any

    def _norm(self, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Any) -> Any:
        output = self._norm(x.float())
        # Llama does x.to(float16) * w whilst Gemma is (x * w).to(float16)
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


_NORMS: tuple[tuple[type, NormForm], ...] = (
    (_Llama, NormForm("variance_epsilon", rounds_first=True)),
    (_Olmo2, NormForm("variance_epsilon")),
    (_Helium, NormForm("variance_epsilon")),
    (_Gemma, NormForm("eps", adds_one=True)),
)


def rotate_half(x: Any) -> Any:
    """As in transformers."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """As in transformers."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
