"""Runs decoder layers of known code as one function each, during a call, in one thread, on a CPU in float32.

A decoder layer takes thirteen module calls, and some sixty calls of Python around its products. A decode step with a few
rows spends a third of its time there. If the code of a layer and of its attention is known (`decoder_forms.py`), the
function below does the same: the same products, norms, rotations and attention, in the same order. Weights are read from
the modules at every call, so nothing can be stale.

A layer keeps its own code if one of its parts has hooks or was patched, and for arguments that the kernels do not take. A
projection that is no plain `nn.Linear` (LoRA), or has hooks, is called as a module. So is an MLP that is not a known gated
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules

from atlas_kernels.layer_cpu import add_and_norm, rms_norm_cpu, rotate_in_place
from atlas_rl.policy import ragged_attention
from atlas_rl.policy.cpu_linear import FastLinears
from atlas_rl.policy.decoder_forms import attention_form, is_decoder_layer
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.layer_forms import activation_form, is_gated, norm_form
from atlas_rl.policy.parts import HasModules
from atlas_rl.policy.threads import replaced_forwards

_MOST_NUMBERS = 1 << 20  # of hidden states: above, torch's threads gain more than fewer passes
_READ = ("attention_mask", "past_key_values", "scaling", "dropout", "sliding_window", "softcap", "s_aux")
"""Further arguments that a layer or `ragged_attention` reads; attention gets all others as well, and ignores them."""
_INACTIVE = "transformers.utils.output_capturing"
"""Whoever once asks a model for hidden states or attention weights leaves hooks of this module, which do nothing later."""
_Rows = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def flat(model: HasModules, linears: FastLinears) -> Iterator[None]:
    """Context in which this thread runs decoder layers of known code as one function each.

    Args:
        model: The policy.
        linears: Multiplies its linear layers; they are installed already.
    """
    known, forwards = _Known(), {}
    if not (torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks):
        for module in model.modules():
            own = class_of(module)
            if known.is_layer(own) and "forward" not in vars(module):
                parts = _parts_of(module, known, linears)
                if parts is not None:
                    forwards[module] = partial(_forward, own.forward, parts)
    with replaced_forwards(forwards):
        yield


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
    """The parts of a decoder layer, and its forward.

    Attributes:
        attention: Its attention layer, whose attributes attention reads.
        window: Most cells that a query sees; None is all.
        norms: Of the input and of the first residual sum.
        head_norms: Of each head's query and key; None without.
        projections: Products for queries, keys, values and the output.
        mlp: From `[rows, hidden]` to `[rows, hidden]`.
    """

    attention: Any
    window: int | None
    norms: tuple[_Norm, _Norm]
    head_norms: tuple[_Norm, _Norm] | None
    projections: tuple[_Rows, ...]
    mlp: _Rows

    def takes(self, hidden_states: torch.Tensor, angles: Any, others: dict[str, Any]) -> bool:
        """Whether these arguments are what the forward below takes; `others` are those by name."""
        if type(angles) is not tuple or len(angles) != 2:
            return False
        if any(others.get(name) is not None for name in _READ):
            return False
        attention, (cos, sin), shape = self.attention, angles, hidden_states.shape
        return (
            len(shape) == 3
            and shape[0] == 1
            and hidden_states.numel() <= _MOST_NUMBERS
            and cos.shape == sin.shape == (1, shape[1], attention.head_dim)
            and hidden_states.dtype == cos.dtype == sin.dtype == torch.float32
            and hidden_states.is_cpu
            and cos.is_cpu
            and sin.is_cpu
            and hidden_states.is_contiguous()
            and cos.is_contiguous()
            and sin.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and attention.config._attn_implementation == ragged_attention.NAME
        )

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`[1, num_tokens, hidden]` in and out; `cos` and `sin` are `[1, num_tokens, head_dim]`."""
        attention, x = self.attention, hidden_states[0]
        to_query, to_key, to_value, to_out = self.projections
        normed = self.norms[0](x)
        query, key, value = to_query(normed), to_key(normed), to_value(normed)
        if self.head_norms is not None:
            query, key = self.head_norms[0](query), self.head_norms[1](key)
        num_tokens, dim = x.shape[0], attention.head_dim
        rotate_in_place(query, key, cos, sin, dim)
        query, key, value = (each.view(num_tokens, -1, dim) for each in (query, key, value))
        attended = ragged_attention.attend_tokens(attention, query, key, value, attention.scaling, self.window)
        out = to_out(attended.reshape(num_tokens, -1))
        normed = self.norms[1].of_sum(x, out)
        return out.add_(self.mlp(normed))[None]


def _forward(own: Callable[..., torch.Tensor], parts: _Parts, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a decoder layer; its own code for arguments that are not taken."""
    others = dict(kwargs)
    hidden_states, angles = args[0] if args else others.pop("hidden_states"), others.pop("position_embeddings", None)
    if len(args) > 1 or not parts.takes(hidden_states, angles, others):
        return own(layer, *args, **kwargs)
    return parts.forward(hidden_states, *angles)


def _parts_of(layer: Any, known: _Known, linears: FastLinears) -> _Parts | None:
    """The parts of a decoder layer; None if one is not known, or is not on a CPU in float32."""
    attention = layer.self_attn
    form = known.attention(class_of(attention))
    if form is None or not _is_untouched(attention):
        return None
    first, second = known.norm(layer.input_layernorm), known.norm(layer.post_attention_layernorm)
    heads = (known.norm(attention.q_norm), known.norm(attention.k_norm)) if form.norms_heads else None
    if first is None or second is None or (heads is not None and None in heads):
        return None
    owner = {None: None, "layer": attention, "config": attention.config}[form.window]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return _Parts(
        attention,
        getattr(owner, "sliding_window", None),
        (first, second),
        heads,  # type: ignore[arg-type]  # no None inside
        tuple(_rows_of(each, linears) for each in projections),
        _mlp(layer.mlp, linears),
    )


def _rows_of(layer: Any, linears: FastLinears) -> _Rows:
    """A projection of rows, `[rows, in]`: a new tensor, contiguous."""
    if class_of(layer) is nn.Linear and _is_untouched(layer) and layer.weight.dtype == torch.float32:
        return partial(linears.product(layer), layer)
    return lambda rows: layer(rows[None])[0].clone(memory_format=torch.contiguous_format)


def _mlp(mlp: Any, linears: FastLinears) -> _Rows:
    activation = activation_form(mlp.act_fn) if is_gated(getattr(class_of(mlp), "forward", None)) else None
    if activation is None or not _is_untouched(mlp):
        return lambda rows: mlp(rows[None])[0]
    gate, up, down = (_rows_of(each, linears) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    act = functional.silu if activation == "silu" else partial(functional.gelu, approximate="tanh")
    return lambda rows: down(act(gate(rows)).mul_(up(rows)))


def _is_untouched(module: Any) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    hooks = module._forward_hooks.values()
    return not (
        module._forward_pre_hooks
        or "forward" in vars(module)
        or any(getattr(hook, "__module__", None) != _INACTIVE for hook in hooks)
    )
