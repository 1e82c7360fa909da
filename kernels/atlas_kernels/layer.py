"""Operations of decoder layers between their matrix products: norms, rotary embeddings, gates, cache writes.

torch takes five to ten passes over the data for each. A decode step has little data, so the cost of a pass is its
overhead: launches on a GPU, calls and allocations on a CPU. Here each operation is one pass.
"""

from __future__ import annotations

from typing import get_args

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.layer_cpu import rms_norm_cpu, rotate_cpu
from atlas_kernels.layer_reference import (
    Activation,
    gated_reference,
    rms_norm_reference,
    rotate_reference,
    store_reference,
)

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    adds_one: bool = False,
    rounds_first: bool = True,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """`weight * x / sqrt(mean(x ** 2) + eps)` over the last dimension, computed in float32.

    Args:
        x: `[..., columns]`, contiguous.
        weight: `[columns]`.
        eps: Added to the mean of squares.
        adds_one: Multiply by `1 + weight` instead (Gemma).
        rounds_first: Round to the type of `x` before multiplying by the weight, as Llama does, instead of afterwards.
            No effect with `adds_one`.
        implementation: "auto" is a kernel on CUDA and on a CPU in float32, and the reference elsewhere.

    Returns:
        Like `x`; with `rounds_first`, in the wider of both types.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    if x.dtype not in TYPES or weight.dtype not in TYPES or weight.shape != x.shape[-1:] or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous and weight one number per column, got {x.dtype} {list(x.shape)} with strides "
            f"{x.stride()} and {weight.dtype} {list(weight.shape)}"
        )
    arguments = x, weight, eps, adds_one, rounds_first
    if use_triton(x, implementation):
        from atlas_kernels.layer_triton import rms_norm_triton

        return rms_norm_triton(*arguments)
    return (rms_norm_cpu if _compiled(x, weight, implementation) else rms_norm_reference)(*arguments)


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    implementation: Implementation = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embeddings (Su et al., arXiv 2104.09864): rotates pairs of elements that are half a head apart.

    Args:
        query: `[num_tokens, heads, dim]`, contiguous; dim is even.
        key: `[num_tokens, kv_heads, dim]`, contiguous, of the same type.
        cos: `[num_tokens, dim]`, contiguous.
        sin: Like `cos`.
        implementation: As for `rms_norm`.

    Returns:
        Rotated queries and keys, in the wider type of queries and angles; every product and sum is rounded to it.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    tensors = query, key, cos, sin
    tokens, dim = len(query), query.shape[-1]
    if (
        query.shape != (tokens, query.shape[1], dim)
        or key.shape != (tokens, key.shape[1], dim)
        or (cos.shape, sin.shape) != ((tokens, dim),) * 2
        or dim % 2
        or (query.dtype, cos.dtype) != (key.dtype, sin.dtype)
        or not all(tensor.dtype in TYPES and tensor.is_contiguous() for tensor in tensors)
    ):
        raise ValueError(
            "query and key must be contiguous [num_tokens, heads, dim] of one type, cos and sin [num_tokens, dim], got "
            + ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        )
    if use_triton(query, implementation):
        from atlas_kernels.layer_triton import rotate_triton

        return rotate_triton(*tensors)
    return (rotate_cpu if _compiled(query, cos, implementation) else rotate_reference)(*tensors)


def gated(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, *, implementation: Implementation = "auto"
) -> torch.Tensor:
    """`activation(gate) * up`, as in gated layers (Shazeer, arXiv 2002.05202).

    Args:
        gate: `[...]`, contiguous.
        up: Like `gate`, of the same type.
        activation: "silu", or "gelu_tanh", which approximates GELU by a tanh.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Returns:
        Like `gate`; the activation is rounded to its type before it is multiplied.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    fits = gate.shape == up.shape and gate.dtype == up.dtype and gate.dtype in TYPES
    if not fits or activation not in get_args(Activation) or not (gate.is_contiguous() and up.is_contiguous()):
        raise ValueError(
            f"gate and up must be contiguous, of one shape and type, and the activation one of {get_args(Activation)}, got "
            f"{gate.dtype} {list(gate.shape)}, {up.dtype} {list(up.shape)} and {activation!r}"
        )
    if use_triton(gate, implementation):
        from atlas_kernels.layer_triton import gated_triton

        return gated_triton(gate, up, activation)
    return gated_reference(gate, up, activation)


def store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    cells: torch.Tensor,
    implementation: Implementation = "auto",
) -> None:
    """Write new keys and values into a cache.

    Args:
        keys: `[rows, cells, kv_heads, dim]`, contiguous; written to.
        values: Likewise, with its own `dim`.
        key: `[num_tokens, kv_heads, dim]`, of the type of `keys`.
        value: Likewise for `values`.
        rows: int64 `[num_tokens]`, row of each token; must be inside the cache, which a kernel does not check.
        cells: int64 `[num_tokens]`, cell of each token; likewise.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Raises:
        ValueError: A shape or type does not fit, or the implementation cannot run here.
    """
    tensors = keys, values, key, value
    if (
        (key.shape, value.shape) != ((len(rows), *keys.shape[2:]), (len(rows), *values.shape[2:]))
        or (key.dtype, value.dtype) != (keys.dtype, values.dtype)
        or not keys.is_contiguous()
        or not values.is_contiguous()
    ):
        raise ValueError(
            "keys and values must be contiguous [rows, cells, kv_heads, dim], and what is written [num_tokens, kv_heads, "
            "dim] of their types, got " + ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        )
    if use_triton(keys, implementation):
        from atlas_kernels.layer_triton import store_triton

        store_triton(*tensors, rows, cells)
    else:
        store_reference(*tensors, rows, cells)


def _compiled(x: torch.Tensor, other: torch.Tensor, implementation: Implementation) -> bool:
    """Whether the compiled CPU version accepts these tensors."""
    return (
        implementation == "auto"
        and x.dtype == other.dtype == torch.float32
        and x.device.type == other.device.type == "cpu"
    )
