"""The eager reference of `nvfp4`: torch's own E4M3 conversion, and E2M1 by comparison with the midpoints."""

from __future__ import annotations

import torch

_GROUP = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantize_reference(
    weight: torch.Tensor, tensor_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(packed, scales, amax)` of `atlas_kernels.nvfp4.NVFP4Weight`."""
    values = weight.float()
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % _GROUP))
    groups = values.view(len(values), -1, _GROUP)
    block_amax = groups.abs().amax(dim=-1)
    scales = (block_amax / (6 * tensor_scale)).clamp(max=448.0).to(torch.float8_e4m3fn)
    steps = (scales.float() * tensor_scale)[..., None]
    scaled = torch.where(steps > 0, groups / steps, 0.0)
    codes = e2m1_codes(scaled).view(len(values), -1)
    amax = block_amax.amax() if block_amax.numel() else tensor_scale.new_zeros(())
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, amax


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 number of float32 `values`, ties to even, saturating: uint8 codes below 16, sign in bit 3."""
    x = values.abs()
    code = (x > 0.25).byte() + (x >= 0.75) + (x > 1.25) + (x >= 1.75) + (x > 2.5) + (x >= 3.5) + (x > 5)
    return code | (values < 0).byte() << 3


def unscaled(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """E2M1 times E4M3, exactly: float32 `[out_features, groups * 16]`."""
    table = torch.tensor(
        [*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], device=packed.device, dtype=torch.float32
    )
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(len(packed), -1)
    return table[codes.int()] * scales.float().repeat_interleave(_GROUP, dim=1)


def linear_reference(
    inputs: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor
) -> torch.Tensor:
    """`inputs @ w.T` with sums in float32: `[rows, out_features]` in the type of `inputs`."""
    weight = unscaled(packed, scales)[:, : inputs.shape[1]]
    return (inputs.float() @ weight.T * tensor_scale).to(inputs.dtype)
