"""The Triton kernels of `nvfp4`: a quantizer, and a linear layer that unpacks its weight in registers.

Both formats are converted by integer operations, so that every GPU and the interpreter round the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

QUANTIZE_TILE = (8, 32)
"""Rows and groups of 16 per program of the quantizer."""
LINEAR_TILE = (32, 16, 8)
"""Outputs, rows and groups of 16 per step of the linear layer (16 rows are the least `tl.dot` takes)."""
QUANTIZE_WARPS, LINEAR_WARPS = 4, 4
_COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NATIVE = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def e4m3_code(x):
    """E4M3 code of float32 in [0, 448], to the nearest, ties to even: int32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the step is 2**-9, the last place of 2**14, so the addition rounds.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def e4m3_value(code):
    """Float16 of a positive E4M3 code (int16), without its exponent's offset: the number times 2**-8."""
    return (code << 7).to(tl.float16, bitcast=True)


@triton.jit
def e2m1_code(x):
    """E2M1 code of float32, to the nearest, ties to even, saturating: int32 below 16."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code + (x < 0).to(tl.int32) * 8


@triton.jit
def e2m1_value(code):
    """Float16 of an E2M1 code (int16 below 16), without its exponent's offset: the number times 2**-14."""
    return (((code & 7) << 9) | ((code & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def quantize_weight(
    weight, tensor_scale, packed, scales, amax,
    out_features, in_features, groups, stride,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Packs `[ROWS, GROUPS * 16]` values and their scales, and raises `amax` (as int32 bits); grid over both dimensions."""
    step = tl.load(tensor_scale)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    pair = tl.arange(0, 8)[None, None, :]
    even = group * 16 + 2 * pair
    source = weight + row * stride + even
    x0 = tl.load(source, mask=(row < out_features) & (even < in_features), other=0.0).to(tl.float32)
    x1 = tl.load(source + 1, mask=(row < out_features) & (even + 1 < in_features), other=0.0).to(tl.float32)

    block_amax = tl.max(tl.maximum(tl.abs(x0), tl.abs(x1)), axis=2)
    code = e4m3_code(tl.minimum(tl.div_rn(block_amax, 6.0 * step), 448.0))
    block_step = e4m3_value(code.to(tl.int16)).to(tl.float32) * 256.0 * step
    divisor = tl.where(block_step > 0, block_step, 1.0)[:, :, None] + tl.zeros_like(x0)
    live = (block_step > 0)[:, :, None]
    low = e2m1_code(tl.where(live, tl.div_rn(x0, divisor), 0.0))
    high = e2m1_code(tl.where(live, tl.div_rn(x1, divisor), 0.0))
    inside = (row < out_features) & (group < groups)
    tl.store(packed + (row * groups + group) * 8 + pair, (low | (high << 4)).to(tl.uint8), mask=inside)
    row_2d, group_2d = tl.reshape(row, [ROWS, 1]), tl.reshape(group, [1, GROUPS])
    inside_2d = (row_2d < out_features) & (group_2d < groups)
    tl.store(scales + row_2d * groups + group_2d, code.to(tl.uint8), mask=inside_2d)
    # Magnitudes have the same order as their bits.
    tl.atomic_max(amax, tl.max(tl.max(block_amax, axis=1), axis=0).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["rows"])
def linear_rows(
    inputs, packed, scales, tensor_scale, outputs,
    rows, in_features, out_features, groups,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, COMPUTE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Computes `[OUTPUTS, ROWS]` of the transposed product; grid over outputs and rows.

    The weight is the left operand, so that the few rows are the small side of the matrix instruction. Even and odd
    inputs are two products, so that the two values of a byte are never interleaved. `NATIVE` is the name of the inputs'
    format for `tl.dot_scaled`, which converts the weight by Blackwell's own instruction; the empty string unpacks it by
    shifts.
    """
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    byte = tl.arange(0, GROUPS * 8)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for first in range(0, groups, GROUPS):
        inside = (output[:, None] < out_features) & (first * 8 + byte[None, :] < groups * 8)
        packed_at = packed + output[:, None] * groups * 8 + first * 8 + byte[None, :]
        pairs = tl.load(packed_at, mask=inside, other=0)
        group = first + tl.arange(0, GROUPS)
        inside_groups = (output[:, None] < out_features) & (group[None, :] < groups)
        codes = tl.load(scales + output[:, None] * groups + group[None, :], mask=inside_groups, other=0)
        if NATIVE != "":
            feature = (first * 16 + tl.arange(0, GROUPS * 16))[:, None]
            source = inputs + row[None, :] * in_features + feature
            x = tl.load(source, mask=(row[None, :] < rows) & (feature < in_features), other=0.0)
            total = tl.dot_scaled(pairs, codes.to(tl.float8e4nv, bitcast=True), "e2m1", x, None, NATIVE, total)
        else:
            scale = e4m3_value(codes.to(tl.int16)).to(tl.float32) * 4194304.0  # 2**8 of E4M3, 2**14 of E2M1
            scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [OUTPUTS, GROUPS, 8]), [OUTPUTS, GROUPS * 8])
            low = (e2m1_value(pairs.to(tl.int16) & 15).to(tl.float32) * scale).to(COMPUTE)
            high = (e2m1_value(pairs.to(tl.int16) >> 4).to(tl.float32) * scale).to(COMPUTE)
            even = 2 * (first * 8 + byte)[:, None]
            source = inputs + row[None, :] * in_features + even
            x0 = tl.load(source, mask=(row[None, :] < rows) & (even < in_features), other=0.0).to(COMPUTE)
            x1 = tl.load(source + 1, mask=(row[None, :] < rows) & (even + 1 < in_features), other=0.0).to(COMPUTE)
            # "ieee" is for float32 inputs, which tf32 would round.
            total = tl.dot(low, x0, total, input_precision="ieee")
            total = tl.dot(high, x1, total, input_precision="ieee")
    target = outputs + row[None, :] * out_features + output[:, None]
    inside = (row[None, :] < rows) & (output[:, None] < out_features)
    tl.store(target, (total * tl.load(tensor_scale)).to(outputs.dtype.element_ty), mask=inside)


def quantize_triton(
    weight: torch.Tensor, tensor_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(packed, scales, amax)` of `atlas_kernels.nvfp4.NVFP4Weight`."""
    out_features, in_features = weight.shape
    groups = triton.cdiv(in_features, 16)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    packed = torch.empty(out_features, groups * 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, groups, dtype=torch.uint8, device=weight.device)
    amax = torch.zeros((), dtype=torch.int32, device=weight.device)
    tile_rows, tile_groups = QUANTIZE_TILE
    if out_features:
        quantize_weight[(triton.cdiv(out_features, tile_rows), triton.cdiv(groups, tile_groups))](
            weight,
            tensor_scale,
            packed,
            scales,
            amax,
            out_features,
            in_features,
            groups,
            weight.stride(0),
            ROWS=tile_rows,
            GROUPS=tile_groups,
            num_warps=QUANTIZE_WARPS,
        )
    return packed, scales.view(torch.float8_e4m3fn), amax.view(torch.float32)


def linear_triton(
    inputs: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    tensor_scale: torch.Tensor,
    *,
    native: bool = False,
) -> torch.Tensor:
    """`inputs @ w.T`: `[rows, out_features]` in the type of `inputs`.

    `native` converts by Blackwell's instructions. It is not the default because it has not been run: the interpreter
    treats every scale of `tl.dot_scaled` as a power of two.
    """
    rows, in_features = inputs.shape
    out_features, groups = scales.shape
    outputs = torch.empty(rows, out_features, dtype=inputs.dtype, device=inputs.device)
    tile_outputs, tile_rows, tile_groups = LINEAR_TILE
    compute = _COMPUTE[inputs.dtype]
    if inputs.device.type != "cuda":
        compute = tl.float32  # the interpreter stores bfloat16 as integers, and would multiply those
    if rows and out_features:
        linear_rows[(triton.cdiv(out_features, tile_outputs), triton.cdiv(rows, tile_rows))](
            inputs.contiguous(),
            packed,
            scales.view(torch.uint8),
            tensor_scale,
            outputs,
            rows,
            in_features,
            out_features,
            groups,
            OUTPUTS=tile_outputs,
            ROWS=tile_rows,
            GROUPS=tile_groups,
            COMPUTE=compute,
            NATIVE=_NATIVE.get(inputs.dtype, "") if native else "",
            num_warps=LINEAR_WARPS,
        )
    return outputs
