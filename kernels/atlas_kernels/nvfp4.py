"""NVFP4 weights: a quantizer, and a linear layer that reads four-bit values, a scale per sixteen, one scale per tensor.

The format (NVIDIA, "Introducing NVFP4", and PTX's `mxf4nvf4`): E2M1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives),
one E4M3 scale per 16 values along the inputs, one float32 scale per tensor,

    w[n, k] ~ e2m1[n, k] * e4m3[n, k // 16] * tensor_scale          4.5 bits per value

**Rounding**, the same in kernel and reference, bit for bit: `block_scale = e4m3(max |w| / (6 tensor_scale))`, saturating;
`value = e2m1(w / (block_scale * tensor_scale))`: every operation is correctly rounded float32, every format rounds to the
nearest, ties to even. A block whose scale rounds to zero is zero.

**One pass.** The tensor scale must be known before the first value is rounded, so `quantize` without a scale reads the
weight twice. A policy changes little between two syncs, so a refresh passes the previous scale and reads the weight
once. The same pass finds the largest magnitude, which shows whether the scale still fits (`saturated`).

The product of an E2M1 and an E4M3 number has six significant bits, so bfloat16 and float16 hold it exactly: the linear
layer unpacks weights in registers without rounding, sums in float32, and applies the tensor scale to the sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atlas_kernels import nvfp4_reference
from atlas_kernels.dispatch import Implementation, use_triton

E2M1_MAX, E4M3_MAX = 6.0, 448.0
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class NVFP4Weight:
    """A weight `[out_features, in_features]` in NVFP4; inputs are padded with zeros to a multiple of 16.

    Attributes:
        packed: uint8 `[out_features, groups * 8]`: two values each, that of the even input in the low four bits.
        scales: float8_e4m3fn `[out_features, groups]`, not negative.
        tensor_scale: float32 `[]`.
        amax: float32 `[]`, largest magnitude of the weight that was quantized.
        in_features: Inputs, without padding.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    amax: torch.Tensor
    in_features: int

    @property
    def saturated(self) -> torch.Tensor:
        """bool `[]` on the device: whether a magnitude exceeds the largest number of this tensor scale.

        A scale or magnitude that is not finite counts too: weights that were NaN for a while must not leave their scale
        behind.
        """
        largest = self.tensor_scale * (E2M1_MAX * E4M3_MAX)
        return ~((self.amax <= largest) & largest.isfinite())

    @property
    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        return self.packed.numel() + self.scales.numel() + self.tensor_scale.nbytes


def tensor_scale_for(weight: torch.Tensor, headroom: float = 1.0) -> torch.Tensor:
    """The tensor scale at which the largest magnitude times `headroom` is the largest NVFP4 number: float32 `[]`.

    Leave headroom, such as 2, if a refresh is to reuse the scale: block scales keep their precision over a range of
    2**14.

    Raises:
        ValueError: `headroom` is not a finite number >= 1.
    """
    if not (math.isfinite(headroom) and headroom >= 1):
        raise ValueError(f"headroom must be a finite number >= 1, got {headroom}")
    amax = weight.abs().amax().float() if weight.numel() else torch.zeros((), device=weight.device, dtype=torch.float32)
    scale = amax * (headroom / (E2M1_MAX * E4M3_MAX))
    # A weight of zeros, or of float32's smallest numbers, has no scale of its own: any normal number will do.
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def quantize(
    weight: torch.Tensor, tensor_scale: torch.Tensor | None = None, *, implementation: Implementation = "auto"
) -> NVFP4Weight:
    """Quantize a weight.

    Args:
        weight: float32, bfloat16 or float16 `[out_features, in_features]`, finite.
        tensor_scale: float32 `[]`, positive; None computes `tensor_scale_for(weight)`, which reads the weight once
            more.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or weight.dtype not in _WEIGHT_DTYPES:
        raise ValueError(
            "weight must be float32, bfloat16 or float16 [out_features, in_features], "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if tensor_scale is None:
        tensor_scale = tensor_scale_for(weight)
    if tensor_scale.shape != () or tensor_scale.dtype != torch.float32 or tensor_scale.device != weight.device:
        raise ValueError(
            f"tensor_scale must be one float32 number on {weight.device}, "
            f"got {tensor_scale.dtype} {list(tensor_scale.shape)} on {tensor_scale.device}"
        )
    if use_triton(weight, implementation):
        from atlas_kernels.nvfp4_triton import quantize_triton as run
    else:
        run = nvfp4_reference.quantize_reference
    packed, scales, amax = run(weight, tensor_scale)
    return NVFP4Weight(packed, scales, tensor_scale, amax, weight.shape[1])


def dequantize(weight: NVFP4Weight) -> torch.Tensor:
    """The weight in float32 `[out_features, in_features]`, each product of value and scales rounded once."""
    return nvfp4_reference.unscaled(weight.packed, weight.scales)[:, : weight.in_features] * weight.tensor_scale


def linear(inputs: torch.Tensor, weight: NVFP4Weight, *, implementation: Implementation = "auto") -> torch.Tensor:
    """`inputs @ dequantize(weight).T`, for the few rows of a decode step.

    Args:
        inputs: float32, bfloat16 or float16 `[rows, in_features]`.
        weight: The weight.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Returns:
        `[rows, out_features]` in the type of `inputs`; sums are float32.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    if inputs.ndim != 2 or inputs.shape[1] != weight.in_features or inputs.dtype not in _WEIGHT_DTYPES:
        raise ValueError(
            f"inputs must be float32, bfloat16 or float16 [rows, {weight.in_features}], "
            f"got {inputs.dtype} {list(inputs.shape)}"
        )
    if inputs.device != weight.packed.device:
        raise ValueError(f"inputs are on {inputs.device} and the weight on {weight.packed.device}: move them together")
    operands = (inputs, weight.packed, weight.scales, weight.tensor_scale)
    if use_triton(inputs, implementation):
        from atlas_kernels.nvfp4_triton import linear_triton

        return linear_triton(*operands)
    return nvfp4_reference.linear_reference(*operands)
