"""The Triton kernels of `layer`: one launch each, rounding at the same places as torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atlas_kernels.layer_reference import Activation, wider

HEADS = 8
"""Heads of a token that one program rotates."""
NUMBERS = 1024
"""Numbers that one program takes, of a token that is stored or of a gated layer."""
NUM_WARPS = 4
_ELEMENT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def norm_row(
    x, weight, out, columns, eps,
    ADDS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Norm of one row; grid over rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    numbers = tl.load(x + row * columns + column, mask=inside, other=0.0)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wide = numbers.to(tl.float32)
    wide = wide * tl.math.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    if ADDS_ONE:
        wide = wide * (1.0 + scale)
    else:
        if ROUNDS_FIRST:
            wide = wide.to(numbers.dtype).to(tl.float32)
        wide = wide * scale
    tl.store(out + row * columns + column, wide, mask=inside)


@triton.jit
def rotate_token(
    query, key, cos, sin, query_out, key_out, heads, kv_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Rotates some heads of one token, of queries and then of keys; grid over tokens and blocks of heads.

    `ELEMENT` is the wider type, to which every product and sum is rounded.
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    low = tl.arange(0, HALF)[None, :]
    inside = low < half
    is_query = (head < heads) & inside
    is_key = (head >= heads) & (head < heads + kv_heads) & inside
    query_at = (token * heads + head) * 2 * half + low
    key_at = (token * kv_heads + head - heads) * 2 * half + low
    first = tl.load(query + query_at, mask=is_query, other=0.0) + tl.load(key + key_at, mask=is_key, other=0.0)
    second = tl.load(query + query_at + half, mask=is_query, other=0.0)
    second += tl.load(key + key_at + half, mask=is_key, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    angle = token * 2 * half + low
    cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    left = (first * cos_low).to(ELEMENT).to(tl.float32) - (second * sin_low).to(ELEMENT).to(tl.float32)
    right = (second * cos_high).to(ELEMENT).to(tl.float32) + (first * sin_high).to(ELEMENT).to(tl.float32)
    tl.store(query_out + query_at, left.to(ELEMENT), mask=is_query)
    tl.store(query_out + query_at + half, right.to(ELEMENT), mask=is_query)
    tl.store(key_out + key_at, left.to(ELEMENT), mask=is_key)
    tl.store(key_out + key_at + half, right.to(ELEMENT), mask=is_key)


@triton.jit(do_not_specialize=["count"])
def gated_numbers(gate, up, out, count, SILU: tl.constexpr, NUMBERS: tl.constexpr):
    """Computes some numbers of a gated layer; grid over blocks of numbers.

    `gelu_tanh` is x (1 + tanh u) / 2, which is x sigmoid(2u).
    """
    number = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = number < count
    own = tl.load(gate + number, mask=inside, other=0.0)
    x = own.to(tl.float32)
    turned = x if SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    active = (x / (1.0 + tl.exp(-turned))).to(own.dtype).to(tl.float32)
    tl.store(out + number, active * tl.load(up + number, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["key_cells", "value_cells"], do_not_specialize_on_alignment=["rows", "cells"])
def store_token(
    keys, values, key, value, rows, cells, key_width, value_width, key_cells, value_cells, NUMBERS: tl.constexpr
):  # fmt: skip
    """Some elements of one token's key and value; grid over tokens and blocks of elements."""
    token = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    row, cell = tl.load(rows + token), tl.load(cells + token)
    new = tl.load(key + token * key_width + number, mask=number < key_width, other=0.0)
    tl.store(keys + (row * key_cells + cell) * key_width + number, new, mask=number < key_width)
    new_value = tl.load(value + token * value_width + number, mask=number < value_width, other=0.0)
    tl.store(values + (row * value_cells + cell) * value_width + number, new_value, mask=number < value_width)


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, adds_one: bool, rounds_first: bool
) -> torch.Tensor:
    """See `layer.rms_norm`."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    out = torch.empty_like(x, dtype=wider(x, weight) if rounds_first and not adds_one else x.dtype)
    if rows:
        whole = triton.next_power_of_2(columns)
        norm_row[(rows,)](
            x, weight.contiguous(), out, columns, eps,
            ADDS_ONE=adds_one, ROUNDS_FIRST=rounds_first, COLUMNS=whole,
            num_warps=max(NUM_WARPS, whole // 1024),
        )  # fmt: skip
    return out


def rotate_triton(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layer.rotate`."""
    (tokens, heads, dim), kv_heads, dtype = query.shape, key.shape[1], wider(query, cos)
    out = torch.empty_like(query, dtype=dtype), torch.empty_like(key, dtype=dtype)
    if tokens:
        rotate_token[tokens, triton.cdiv(heads + kv_heads, HEADS)](
            query, key, cos, sin, *out, heads, kv_heads, dim // 2,
            HEADS=HEADS, HALF=triton.next_power_of_2(dim // 2), ELEMENT=_ELEMENT[dtype], num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def gated_triton(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """See `layer.gated`."""
    out = torch.empty_like(gate)
    if out.numel():
        gated_numbers[(triton.cdiv(out.numel(), NUMBERS),)](
            gate, up, out, out.numel(), SILU=activation == "silu", NUMBERS=NUMBERS, num_warps=NUM_WARPS
        )
    return out


def store_triton(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    cells: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layer.store`."""
    tokens, widths = len(key), (key.shape[1] * key.shape[2], value.shape[1] * value.shape[2])
    if tokens:
        store_token[tokens, triton.cdiv(max(widths), NUMBERS)](
            keys, values, key.contiguous(), value.contiguous(), rows, cells, *widths, keys.shape[1], values.shape[1],
            NUMBERS=NUMBERS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return keys, values
