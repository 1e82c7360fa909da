"""Runs decoder layers of known code as one function each, during a call, in one thread, on a CPU in float32.

A decoder layer takes thirteen module calls, and some sixty calls of Python around its products. A decode step with a few
rows spends a third of its time there. If the code of a layer and of its attention is known (`decoder_forms.py`), the
function below does the same: the same products, norms, rotations and attention, in the same order, or all in one kernel
where that is faster (`whole_layers.py`). Weights, or where they are, are read from the modules at every call, so nothing
can be stale.

A layer keeps its own code if one of its parts has hooks or was patched, for arguments that the kernels do not take, and
while one of its parts runs as something else than when the session began, such as a copy in four bits that drafts. A
projection that is no plain `nn.Linear` (LoRA), or has hooks, is called as a module. So is an MLP that is not a known gated
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules

from atlas_kernels.gate_cpu import silu_times
from atlas_kernels.layer_cpu import add_and_norm, rms_norm_cpu, rotate_in_place
from atlas_kernels.layer_reference import Activation
from atlas_rl.policy import ragged_attention
from atlas_rl.policy.cpu_linear import FastLinears, Group
from atlas_rl.policy.decoder_forms import attention_form, is_decoder_layer
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.layer_forms import activation_form, is_gated, norm_form
from atlas_rl.policy.parts import HasModules, kept
from atlas_rl.policy.threads import num_changes, replaced_forwards, stand_ins_of
from atlas_rl.policy.whole_layers import WholeLayer, WholeLayers

_MOST_NUMBERS = 1 << 20  # of hidden states: above, torch's threads gain more than fewer passes
_READ = ("attention_mask", "past_key_values", "scaling", "dropout", "sliding_window", "softcap", "s_aux")
"""Further arguments that a layer or `ragged_attention` reads; attention gets all others as well, and ignores them."""
_INACTIVE = "transformers.utils.output_capturing"
"""Whoever once asks a model for hidden states or attention weights leaves hooks of this module, which do nothing later."""
_Rows = Callable[[torch.Tensor], torch.Tensor]
_ACTS: dict[Activation, _Rows] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


@contextmanager
def flat(model: HasModules, linears: FastLinears) -> Iterator[None]:
    """Context in which this thread runs decoder layers of known code as one function each.

    Args:
        model: The policy.
        linears: Multiplies its linear layers; they are installed already.
    """
    found = kept(model, _Found)
    linears.together(found.groups)
    with replaced_forwards(found.forwards(linears)):
        yield


class _Found:
    """The decoder layers of known code, their linear layers that multiply the same rows, and their replacements."""

    def __init__(self, model: HasModules) -> None:
        self.parts: dict[Any, _Parts] = {}
        self._without_routes: dict[Any, partial[torch.Tensor]] | None = None
        known = _Known()
        if not (torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks):
            for module in model.modules():
                if known.is_layer(class_of(module)) and "forward" not in vars(module):
                    parts = _parts_of(module, known)
                    if parts is not None:
                        self.parts[module] = parts
        every = [group for parts in self.parts.values() for group in parts.groups]
        self.groups = [group for group in every if all(map(_is_plain, group))]

    def forwards(self, linears: FastLinears) -> dict[Any, partial[torch.Tensor]]:
        """The replacements in the present session; the same in every session without routes of linear layers."""
        if linears.has_routes:  # they end with the session, and so must what holds them
            return self._made(linears)
        if self._without_routes is None:
            self._without_routes = self._made(linears)
        for forward in self._without_routes.values():
            forward.args[0].look()
        return self._without_routes

    def _made(self, linears: FastLinears) -> dict[Any, partial[torch.Tensor]]:
        whole, angles = WholeLayers(linears), _Angles()
        return {
            layer: partial(_forward, _Layer(layer, parts, linears, whole, angles))
            for layer, parts in self.parts.items()
        }


class _Known:
    """What is known of the classes of a model; not kept between calls, as classes may be patched."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, type], Any] = {}

    def _ask(self, question: Callable[[Any], Any], own: type) -> Any:
        if (question, own) not in self._found:
            self._found[question, own] = question(own)
        return self._found[question, own]

    def is_layer(self, own: type) -> bool:
        return bool(self._ask(is_decoder_layer, own))

    def attention(self, own: type) -> Any:
        return self._ask(attention_form, own)

    def norm(self, module: Any) -> _Norm | None:
        """A norm that the kernels compute; None if they do not."""
        form = self._ask(norm_form, class_of(module))
        if form is None or not _is_untouched(module):
            return None
        weight = module.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or hasattr(weight, "device_mesh"):
            return None
        return _Norm(module, getattr(module, form.epsilon), form.adds_one)


@dataclass(slots=True)
class _Norm:
    module: Any
    eps: float
    adds_one: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_cpu(x, self.module.weight, self.eps, self.adds_one, True)

    def of_sum(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """Add `x` to `to`, and return the norm of the sum."""
        return add_and_norm(x, to, self.module.weight, self.eps, self.adds_one)


@dataclass(slots=True)
class _Parts:
    """The parts of a decoder layer.

    Attributes:
        own: The forward of its class.
        attention: Its attention layer, whose attributes attention reads.
        window: Most cells that a query sees; None is all.
        norms: Of the input and of the first residual sum.
        head_norms: Of each head's query and key; None without.
        to_heads: Projections to queries, keys and values.
        mlp: A module from `[1, rows, hidden]` to the same.
        act: The activation of a gated MLP of known code; None for any other MLP.
    """

    own: Callable[..., torch.Tensor]
    attention: Any
    window: int | None
    norms: tuple[_Norm, _Norm]
    head_norms: tuple[_Norm, _Norm] | None
    to_heads: Group
    mlp: Any
    act: _Rows | None

    @property
    def groups(self) -> list[Group]:
        """Layers that multiply the same rows."""
        return [self.to_heads, *([] if self.act is None else [(self.mlp.gate_proj, self.mlp.up_proj)])]


class _Angles:
    """Checks the angles of rotations, once for all layers of a forward: they are given the same tuple."""

    def __init__(self) -> None:
        self._fit: tuple[Any, int, int] = None, 0, 0

    def fit(self, angles: Any, num_tokens: int, dim: int) -> bool:
        """Whether these are contiguous float32 cosines and sines `[1, num_tokens, dim]` on a CPU."""
        known, *sizes = self._fit
        if known is angles and sizes == [num_tokens, dim]:
            return True
        if (
            type(angles) is not tuple
            or len(angles) != 2
            or not all(_are_angles(each, num_tokens, dim) for each in angles)
        ):
            return False
        self._fit = angles, num_tokens, dim
        return True


def _are_angles(each: torch.Tensor, num_tokens: int, dim: int) -> bool:
    fits = each.shape == (1, num_tokens, dim) and each.dtype == torch.float32
    return fits and each.is_cpu and each.is_contiguous()


class _Layer:
    """A decoder layer and its forward."""

    def __init__(
        self, layer: nn.Module, parts: _Parts, linears: FastLinears, whole: WholeLayers, angles: _Angles
    ) -> None:
        self.own, self.attention, self.window = parts.own, parts.attention, parts.window
        self.norms, self.head_norms = parts.norms, parts.head_norms
        self.to_heads = _multiplied(parts.to_heads, linears)
        self.to_out = _multiplied((parts.attention.o_proj,), linears)
        self.mlp = _mlp(parts, linears)
        self.whole, self._angles = _whole(parts, whole), angles
        self._modules = [part for part in layer.modules() if part is not layer]
        self.look()

    def look(self) -> None:
        """Remember as what the parts run now."""
        self._run_as, self._looked_at = stand_ins_of(self._modules), num_changes()

    def _run_as_before(self) -> bool:
        if self._looked_at != num_changes():
            if stand_ins_of(self._modules) != self._run_as:
                return False
            self._looked_at = num_changes()
        return True

    def takes(self, hidden_states: torch.Tensor, angles: Any, others: dict[str, Any]) -> bool:
        """Whether these arguments are what the forward below takes; `others` are those by name."""
        if any(others.get(name) is not None for name in _READ):
            return False
        shape = hidden_states.shape
        return (
            len(shape) == 3
            and shape[0] == 1
            and hidden_states.numel() <= _MOST_NUMBERS
            and self._angles.fit(angles, shape[1], self.attention.head_dim)
            and hidden_states.dtype == torch.float32
            and hidden_states.is_cpu
            and hidden_states.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and self.attention.config._attn_implementation == ragged_attention.NAME
            and self._run_as_before()
        )

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`[1, num_tokens, hidden]` in and out; `cos` and `sin` are `[1, num_tokens, head_dim]`."""
        x = hidden_states[0]
        by_parts = partial(self._by_parts, x, cos, sin)
        return (by_parts() if self.whole is None else self.whole.run(x, cos, sin, by_parts))[None]

    def _by_parts(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        attention = self.attention
        query, key, value = [each.contiguous() for each in self.to_heads(self.norms[0](x))]
        if self.head_norms is not None:
            query, key = self.head_norms[0](query), self.head_norms[1](key)
        num_tokens, dim = x.shape[0], attention.head_dim
        rotate_in_place(query, key, cos, sin, dim)
        query, key, value = (each.view(num_tokens, -1, dim) for each in (query, key, value))
        attended = ragged_attention.attend_tokens(attention, query, key, value, attention.scaling, self.window)
        (out,) = self.to_out(attended.reshape(num_tokens, -1))
        normed = self.norms[1].of_sum(x, out)
        return out.add_(self.mlp(normed))


def _forward(layer: _Layer, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a decoder layer; its own code for arguments that are not taken."""
    others = dict(kwargs)
    hidden_states, angles = args[0] if args else others.pop("hidden_states"), others.pop("position_embeddings", None)
    if len(args) > 1 or not layer.takes(hidden_states, angles, others):
        return layer.own(module, *args, **kwargs)
    return layer.forward(hidden_states, *angles)


def _parts_of(layer: Any, known: _Known) -> _Parts | None:
    """The parts of a decoder layer; None if one is not known, or is not on a CPU in float32."""
    attention, mlp = layer.self_attn, layer.mlp
    form = known.attention(class_of(attention))
    if form is None or not _is_untouched(attention):
        return None
    first, second = known.norm(layer.input_layernorm), known.norm(layer.post_attention_layernorm)
    heads = (known.norm(attention.q_norm), known.norm(attention.k_norm)) if form.norms_heads else None
    if first is None or second is None or (heads is not None and None in heads):
        return None
    return _Parts(
        own=class_of(layer).forward,
        attention=attention,
        window=getattr(
            {None: None, "layer": attention, "config": attention.config}[form.window], "sliding_window", None
        ),
        norms=(first, second),
        head_norms=heads,  # type: ignore[arg-type]  # no None inside
        to_heads=(attention.q_proj, attention.k_proj, attention.v_proj),
        mlp=mlp,
        act=_act(mlp) if is_gated(getattr(class_of(mlp), "forward", None)) and _is_untouched(mlp) else None,
    )


def _act(mlp: Any) -> _Rows | None:
    form = activation_form(mlp.act_fn)
    return None if form is None else _ACTS[form]


def _mlp(parts: _Parts, linears: FastLinears) -> _Rows:
    mlp, act = parts.mlp, parts.act
    if act is None:
        return lambda rows: mlp(rows[None])[0]
    gate_and_up, down = _multiplied((mlp.gate_proj, mlp.up_proj), linears), _multiplied((mlp.down_proj,), linears)
    is_silu = act is functional.silu

    def gated(rows: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up(rows)
        if is_silu and all(map(_is_flat, (gate, up))) and gate.shape == up.shape:
            return down(silu_times(gate, up))[0]
        return down(act(gate).mul_(up))[0]

    return gated


def _whole(parts: _Parts, shared: WholeLayers) -> WholeLayer | None:
    """The layer as one kernel; None if one of its parts is called, or has no kernel."""
    attention, mlp = parts.attention, parts.mlp
    if parts.act is not functional.silu:
        return None
    if not all(map(_is_plain, (*parts.to_heads, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))):
        return None
    norms = [(norm.module, norm.eps, norm.adds_one) for norm in (*parts.norms, *(parts.head_norms or ()))]
    groups = parts.to_heads, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
    form_of = [form for group in groups if (form := shared.linears.streamed(group)) is not None]
    if len(form_of) < len(groups):
        return None
    return WholeLayer(attention, mlp, norms, parts.window, form_of, shared)


def _is_flat(rows: torch.Tensor) -> bool:
    """Whether these are rows that a compiled loop may read: a projection that is called may return others."""
    return rows.dtype is torch.float32 and rows.is_contiguous()


def _multiplied(group: tuple[Any, ...], linears: FastLinears) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """What multiplies the layers with rows, `[rows, in]`: new tensors, or views of a new one."""
    if all(map(_is_plain, group)):
        return partial(linears.products(group), group)
    if len(group) == 1:
        (layer,) = group
        return lambda rows: (layer(rows[None])[0].clone(memory_format=torch.contiguous_format),)
    each = [_multiplied((layer,), linears) for layer in group]
    return lambda rows: [multiplied(rows)[0] for multiplied in each]


def _is_plain(layer: Any) -> bool:
    """Whether this is a linear layer whose product may be computed without calling it."""
    return class_of(layer) is nn.Linear and _is_untouched(layer) and layer.weight.dtype == torch.float32


def _is_untouched(module: Any) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    hooks = module._forward_hooks.values()
    return not (
        module._forward_pre_hooks
        or "forward" in vars(module)
        or any(getattr(hook, "__module__", None) != _INACTIVE for hook in hooks)
    )
