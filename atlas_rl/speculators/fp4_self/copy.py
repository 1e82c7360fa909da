"""An NVFP4 copy of a policy's linear layers, which runs inside the policy's own modules.

Only the matrix products are replaced. Norms, rotary positions, biases, adapters, the embedding table (a lookup reads
one row: four bits would save no time) and the attention cache are the policy's own. So any architecture keeps working,
and the copy costs 9/16 byte per weight. The format is that of `atlas_kernels.nvfp4`.

On a GPU the layers run as the NVFP4 kernel. Elsewhere they run with the dequantized weight, which computes the same
function at the cost of the policy and of a second copy of it: for tests and for measuring acceptance.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from atlas_kernels.dispatch import kernels_run_on
from atlas_kernels.nvfp4 import NVFP4Weight, dequantize, linear, quantize, tensor_scale_for
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.in_process import decoder_layers
from atlas_rl.policy.threads import replaced_forwards
from atlas_rl.speculators.warm_up import kinds_of, multiply_in_four_bits

HEADROOM = 2.0  # factor on tensor scales: a refresh reads each weight once unless a magnitude outgrows its scale


class FourBitCopy:
    """Four-bit copy of a policy's linear layers, in place in its modules.

    Args:
        policy: A causal LM whose decoder layers multiply by `nn.Linear` only; unchanged except within `running`.
        quantize_head: Whether the copy has its own LM head instead of the policy's.
        quantize_embeddings: Whether it reads a quantized embedding table: for measurements, it saves nothing.
        kernels: Whether the layers run as kernels; None: if the policy is on a GPU and Triton is installed.

    Raises:
        ValueError: A weight of the decoder layers or of the head does not belong to a plain `nn.Linear`.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        quantize_head: bool = True,
        quantize_embeddings: bool = False,
        kernels: bool | None = None,
    ) -> None:
        config = policy.config.get_text_config()  # type: ignore[operator, union-attr]
        self._linears = [m for layer in decoder_layers(policy, config.num_hidden_layers) for m in _linears(layer)]
        if quantize_head:
            self._linears += _linears(policy.get_output_embeddings())  # type: ignore[operator]
        self._embeddings = [policy.get_input_embeddings()] if quantize_embeddings else []  # type: ignore[operator]
        self._kernels = kernels
        self._weights: list[NVFP4Weight] = []
        self._forwards: list[Any] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of the four-bit weights; 0 before the first `requantize`."""
        return sum(weight.num_bytes for weight in self._weights)

    def compile_kernels(self) -> None:
        """Compile the kernels of `requantize` and of the layers."""
        weights = [module.weight.detach() for module in self._linears]
        device = weights[0].device
        if not (kernels_run_on(device) if self._kernels is None else self._kernels):
            return
        kinds = {(kinds_of(weight.shape), weight.dtype): weight.shape for weight in weights}
        for (_, stored), shape in kinds.items():
            # Whether float32 weights run under autocast is known only in a forward; TRL's autocast is bfloat16.
            computed = {stored, torch.bfloat16} if stored == torch.float32 else {stored}
            multiply_in_four_bits(shape, stored, computed, device)

    def requantize(self) -> None:
        """Quantize the policy's present weights, reading each once, or twice if it outgrew its scale."""
        modules = self._linears + self._embeddings
        weights = [module.weight.detach() for module in modules]
        scales = [weight.tensor_scale for weight in self._weights]
        if not scales or scales[0].device != weights[0].device:
            scales = [tensor_scale_for(weight, HEADROOM) for weight in weights]
        self._weights = []  # free the old copy first
        self._weights = [quantize(weight, scale) for weight, scale in zip(weights, scales, strict=True)]
        saturated = torch.stack([weight.saturated for weight in self._weights]).tolist()  # one wait for all
        for index in [index for index, outgrown in enumerate(saturated) if outgrown]:
            self._weights[index] = quantize(weights[index], tensor_scale_for(weights[index], HEADROOM))
        kernels = kernels_run_on(weights[0].device) if self._kernels is None else self._kernels
        self._forwards = [
            _packed(weight) if kernels else _dense(weight, module.weight.dtype)
            for module, weight in zip(self._linears, self._weights, strict=False)
        ]
        self._forwards += [_looked_up(weight) for weight in self._weights[len(self._linears) :]]

    def running(self) -> AbstractContextManager[None]:
        """Context in which the policy's modules compute with the four-bit weights, in this thread only."""
        modules = self._linears + self._embeddings
        assert self._forwards, "running() before requantize()"
        return replaced_forwards(dict(zip(modules, self._forwards, strict=True)))


def _linears(root: nn.Module) -> list[Any]:
    """The `nn.Linear` modules below `root`, itself included, except adapters, which are small and stay as they are."""
    adapters = {
        id(part)
        for module in root.modules()
        for name in getattr(module, "adapter_layer_names", ())  # PEFT's layers list their additions here
        if isinstance(getattr(module, name, None), nn.Module)
        for part in getattr(module, name).modules()
    }
    found = []
    for name, module in root.named_modules():
        if id(module) in adapters:
            continue
        if class_of(module) is nn.Linear:
            found.append(module)
            continue
        matrices = [key for key, parameter in module.named_parameters(recurse=False) if _is_matrix(parameter)]
        if matrices:
            where = ".".join(part for part in (name, matrices[0]) if part)
            raise ValueError(
                f"draft_model='fp4' cannot copy this policy: '{where}' is the weight of a {type(module).__name__}, not of a "
                "plain nn.Linear. Give the folder of a draft LM or of an EAGLE-3 head instead, or no static speculator"
            )
    return found


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1 and min(parameter.shape) > 1


def _packed(weight: NVFP4Weight) -> Any:
    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        x = input
        if torch.is_autocast_enabled(x.device.type):  # autocast converts the inputs of the original layers
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = linear(x.reshape(-1, x.shape[-1]), weight, implementation="triton").view(*x.shape[:-1], -1)
        return out if module.bias is None else out + module.bias.to(out.dtype)

    return forward


def _dense(weight: NVFP4Weight, dtype: torch.dtype) -> Any:
    dense = dequantize(weight).to(dtype)

    def forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, dense, module.bias)

    return forward


def _looked_up(weight: NVFP4Weight) -> Any:
    dense = dequantize(weight)

    def forward(module: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
        found, scale = functional.embedding(input, dense.to(module.weight.dtype)), getattr(module, "embed_scale", 1.0)
        return found * (scale.to(found.dtype) if isinstance(scale, torch.Tensor) else scale)  # Gemma rounds it first

    return forward
