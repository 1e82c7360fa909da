"""Recurrent layers that can run over a ragged batch, with the weights and formulas of transformers: three kinds.

| kind | layers |
|---|---|
| `ShortConv` | LFM2, with experts or not |
| `GatedDelta` | Qwen3-Next, Qwen3.5, with experts or not |
| `Mamba2` | Bamba, Falcon-H1, Granite 4 H, Nemotron-H |

A layer's forward has three parts: *project* maps each token, *mix* lets tokens interact, over the rows of the cache
(`recurrent_rows.py`), and *finish* maps each token again. Submodules are called as modules, so that adapters and faster
linear layers apply. The recurrence is transformers' own function, or the kernel that replaces it. A token that does not
exist is given as decay 1 and no update, which leaves the state exactly as it is.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from atlas_rl.policy.guise import class_of

Mix = Callable[[torch.Tensor], torch.Tensor]
"""From `[num_tokens, inputs]` to `[num_tokens, outputs]`, over the rows of a cache."""

_DELTA_CHUNK = 64  # transformers' own


class RecurrentLayer(ABC):
    """One recurrent layer of a policy.

    Args:
        module: The layer's mixer. Only read.
    """

    has_state = True
    function: str
    """Name of the recurrence, in the module that the mixer's class is from."""
    fields: tuple[str, ...]
    """Attributes of the mixer that are read."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a mixer has all attributes that are read; another version of transformers may have changed it."""
        source = sys.modules[class_of(module).__module__]
        return all(hasattr(module, name) for name in cls.fields) and (
            not cls.has_state or callable(getattr(source, cls.function, None))
        )

    @property
    def lead(self) -> int:
        """Number of preceding tokens that the convolution reads."""
        return int(self._convolution.weight.shape[-1]) - 1

    def forward(self, hidden_states: torch.Tensor, mix: Mix) -> torch.Tensor:
        """Run the mixer over packed tokens, `[1, num_tokens, hidden]` to the same shape."""
        inputs, rest = self._project(hidden_states)
        return self._finish(mix(inputs[0])[None], rest)

    def convolved(self, window: torch.Tensor) -> torch.Tensor:
        """See `Recurrence`; inputs beyond the convolution's channels are passed through."""
        weight, bias, channels = self._convolution.weight, self._convolution.bias, self._convolution.weight.shape[0]
        signal = window[..., :channels].transpose(1, 2).to(weight.dtype)
        out = functional.conv1d(signal, weight, bias, groups=channels)
        out = self._activated(out).to(window.dtype).transpose(1, 2)
        return torch.cat([out, window[:, self.lead :, channels:]], -1) if channels < window.shape[2] else out

    @abstractmethod
    def scan(
        self, mixed: torch.Tensor, live: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Recurrence`."""

    @abstractmethod
    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `[1, num_tokens, hidden]` to the recurrence's inputs, convolved ones first, and `_finish`'s inputs."""

    @abstractmethod
    def _finish(self, outputs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Map `[1, num_tokens, outputs]` to `[1, num_tokens, hidden]`."""

    @property
    def _convolution(self) -> Any:
        return self.module.conv1d

    def _activated(self, signal: torch.Tensor) -> torch.Tensor:
        return ACT2FN[self.module.activation](signal)

    def _recurrence(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(sys.modules[class_of(self.module).__module__], self.function)
        return function


class ShortConv(RecurrentLayer):
    """A gated convolution over the latest tokens, without further state (LFM2)."""

    has_state = False
    fields = ("in_proj", "conv", "out_proj")

    @property
    def _convolution(self) -> Any:
        return self.module.conv

    def _activated(self, signal: torch.Tensor) -> torch.Tensor:
        return signal

    def scan(
        self, mixed: torch.Tensor, live: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a short convolution has no state")

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before, after, values = self.module.in_proj(hidden_states).chunk(3, dim=-1)
        return before * values, after

    def _finish(self, outputs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return self.module.out_proj(rest * outputs)


class GatedDelta(RecurrentLayer):
    """The gated delta rule after a convolution (arXiv 2412.06464): Qwen3.5."""

    function = "torch_chunk_gated_delta_rule"
    fields: tuple[str, ...] = (
        "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "activation", "A_log", "dt_bias", "norm",
        "out_proj", "num_v_heads", "num_k_heads", "head_k_dim", "head_v_dim", "key_dim", "value_dim",
    )  # fmt: skip

    def scan(
        self, mixed: torch.Tensor, live: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.module
        sizes = [own.key_dim, own.key_dim, own.value_dim, own.num_v_heads, own.num_v_heads]
        query, key, value, b, a = mixed.split(sizes, dim=-1)
        query, key = (each.unflatten(-1, (-1, own.head_k_dim)) for each in (query, key))
        if (group := own.num_v_heads // own.num_k_heads) > 1:
            query, key = (each.repeat_interleave(group, dim=2) for each in (query, key))
        decay = -own.A_log.float().exp() * functional.softplus(a.float() + own.dt_bias)
        options: dict[str, Any] = {"g": torch.where(live[:, :, None], decay, 0)}
        options["beta"] = torch.where(live[:, :, None], b.sigmoid(), 0)
        options |= {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        rule = self._recurrence()
        if not mixed.is_cuda:  # kernels have their own chunk size
            options["chunk_size"] = min(_DELTA_CHUNK, _chunk(mixed))
        output, state = rule(query, key, value.unflatten(-1, (-1, own.head_v_dim)), **options)
        return output.flatten(2), state

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.module
        inputs = [own.in_proj_qkv, own.in_proj_b, own.in_proj_a]
        return torch.cat([project(hidden_states) for project in inputs], -1), own.in_proj_z(hidden_states)

    def _finish(self, outputs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        own, heads = self.module, (-1, self.module.head_v_dim)
        normed = own.norm(outputs.reshape(heads), rest.reshape(heads))
        return own.out_proj(normed.view(outputs.shape))


class GroupedGatedDelta(GatedDelta):
    """`GatedDelta` with the projections of a group of heads side by side: Qwen3-Next."""

    fields = (
        *(name for name in GatedDelta.fields if not name.startswith("in_proj")),
        "in_proj_qkvz", "in_proj_ba", "fix_query_key_value_ordering",
    )  # fmt: skip

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.module
        query, key, value, gate, b, a = own.fix_query_key_value_ordering(
            own.in_proj_qkvz(hidden_states), own.in_proj_ba(hidden_states)
        )
        return torch.cat([each.flatten(2) for each in (query, key, value)] + [b, a], -1), gate.flatten(2)


class Mamba2(RecurrentLayer):
    """Mamba-2 (arXiv 2405.21060) after a convolution: Bamba, Granite 4 H, Nemotron-H."""

    function = "mamba2_chunk_scan"
    fields: tuple[str, ...] = (
        "in_proj", "conv1d", "activation", "dt_bias", "A_log", "D", "norm", "out_proj", "num_heads", "head_dim", "n_groups",
        "ssm_state_size", "intermediate_size", "conv_dim", "chunk_size", "time_step_limit",
    )  # fmt: skip

    def scan(
        self, mixed: torch.Tensor, live: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.module
        group = own.n_groups * own.ssm_state_size
        values, b, c, steps = mixed.split([own.intermediate_size, group, group, own.num_heads], dim=-1)
        steps = functional.softplus(steps + own.dt_bias.to(steps.dtype)).clamp(*own.time_step_limit)
        b, c = (each.unflatten(-1, (own.n_groups, -1)) for each in (b, c))
        output, state = self._recurrence()(
            values.unflatten(-1, (own.num_heads, -1)),
            torch.where(live[:, :, None], steps, 0),
            -torch.exp(own.A_log.float()),
            b,
            c,
            chunk_size=min(own.chunk_size, _chunk(mixed)),
            D=own.D,
            initial_states=state,
            return_final_states=True,
        )
        return output.flatten(2), state

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.module
        gate, inputs = own.in_proj(hidden_states).split([own.intermediate_size, own.conv_dim + own.num_heads], dim=-1)
        return inputs, gate

    def _finish(self, outputs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        normed = self.module.norm(outputs, rest)
        return self.module.out_proj(normed.to(rest.dtype))


class ScaledMamba2(Mamba2):
    """`Mamba2` with scales around the projection, and an optional norm: Falcon-H1."""

    fields = (*Mamba2.fields, "ssm_in_multiplier", "mup_vector", "mamba_rms_norm")

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.module
        projected = own.in_proj(hidden_states * own.ssm_in_multiplier) * own.mup_vector
        gate, inputs = projected.split([own.intermediate_size, own.conv_dim + own.num_heads], dim=-1)
        return inputs, gate

    def _finish(self, outputs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        own = self.module
        normed = own.norm(outputs, rest) if own.mamba_rms_norm else outputs * functional.silu(rest)
        return own.out_proj(normed.to(rest.dtype))


_KNOWN: dict[str, type[RecurrentLayer]] = {
    "Lfm2ShortConv": ShortConv,
    "Lfm2MoeShortConv": ShortConv,
    "Qwen3NextGatedDeltaNet": GroupedGatedDelta,
    "Qwen3_5GatedDeltaNet": GatedDelta,
    "Qwen3_5MoeGatedDeltaNet": GatedDelta,
    "BambaMixer": Mamba2,
    "FalconH1Mixer": ScaledMamba2,
    "GraniteMoeHybridMambaLayer": Mamba2,
    "NemotronHMamba2Mixer": Mamba2,
}


def _chunk(mixed: torch.Tensor) -> int:
    """Chunk length for `[rows, tokens, mixed]`: no more than its tokens, because work is padded to whole chunks."""
    tokens = mixed.shape[1]
    return max(16, 1 << (tokens - 1).bit_length()) if mixed.is_cuda else tokens  # kernels multiply tiles of 16


def recurrent_layers(model: nn.Module) -> dict[int, RecurrentLayer]:
    """A policy's recurrent layers that can be run, by layer number."""
    found: dict[int, RecurrentLayer] = {}
    for module in model.modules():
        own = class_of(module)
        kind = _KNOWN.get(own.__name__) if own.__module__.startswith("transformers.models.") else None
        if kind is not None and kind.takes(module):
            found[int(module.layer_idx)] = kind(module)  # type: ignore[arg-type]
    return found
