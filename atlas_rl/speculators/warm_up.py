"""Launches the drafters' GPU kernels once on tiny inputs, so that Triton compiles them before a draft needs them.

Triton compiles a kernel again for other types, and depending on whether numbers are multiples of 16
(`docs/kernels.md`). The inputs here have the types and divisibility that drafts will have, and are otherwise as small
as possible.
"""

from __future__ import annotations

import numpy as np
import torch

from atlas_kernels.head_call import DraftHeadWeights
from atlas_kernels.layer import store
from atlas_kernels.noise import request_keys
from atlas_kernels.nvfp4 import linear, quantize, tensor_scale_for
from atlas_rl.core import SamplingParams, Sequences
from atlas_rl.speculators.drawing import Drawing
from atlas_rl.speculators.head_sampling import HeadSampling


def one_drawing(
    sampling: SamplingParams, vocab_size: int, device: torch.device, couples_noise: bool, token_ids: torch.Tensor | None
) -> Drawing:
    """A draft of one token for one request under these sampling parameters; arguments as in `Drawing`."""
    one = np.ones(1, np.int64)
    sequences = Sequences(
        token_ids=np.zeros((1, 2), np.int32),
        lengths=one,
        prompt_lengths=one,
        prompt_keys=0 * one,
        noise_keys=request_keys(0, 1),
        sampling=sampling,
        vocab_size=vocab_size,
        policy_version=0,
    )
    return Drawing("warm-up", sequences, 0 * one, one, device, couples_noise=couples_noise, token_ids=token_ids)


def draw_from_logits(
    sampling: SamplingParams,
    vocab_size: int,
    device: torch.device,
    *,
    couples_noise: bool,
    dtype: torch.dtype = torch.float32,
    token_ids: torch.Tensor | None = None,
) -> None:
    """Draw a token from logits of a type, as drafters do; other arguments as in `Drawing`."""
    columns = vocab_size if token_ids is None else len(token_ids)
    drawing = one_drawing(sampling, vocab_size, device, couples_noise, token_ids)
    drawing.draw(torch.zeros(1, columns, dtype=dtype, device=device))


def write_cache(kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Write a token's key and value of this shape and type into a cache."""
    keys, values = torch.zeros(2, 1, 1, kv_heads, dim, dtype=dtype, device=device)
    where = torch.zeros(1, dtype=torch.int64, device=device)
    store(keys, values, keys[0].clone(), values[0].clone(), where, where)


def draw_from_head(sampling: HeadSampling, sizes: tuple[int, int], device: torch.device, *, dtype: torch.dtype) -> None:
    """Draw a token with the draft head kernel.

    Args:
        sampling: How the head's tokens are drawn.
        sizes: Most tokens that the head can propose, and size of its state.
        device: Device of its weights.
        dtype: Type of its weights.
    """
    most_tokens, size = sizes
    # Small weights take one launch. The vocabulary may have any size: if it is truncated, its rows are aligned or not.
    small = [min(tokens, most_tokens) for tokens in (32, 33)]
    for tokens in {*small, most_tokens} if _is_whole(small[0], size, dtype) else set(small):
        empty = {"input_gates": (tokens + 1, 3 * size), "state_gates": (3 * size, size), "state_bias": (3 * size,)}
        empty |= {"outputs": (tokens, size), "bias": (tokens,)}
        made = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in empty.items()}
        weights = DraftHeadWeights(token_ids=torch.arange(tokens, device=device), **made)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        sampling.draw(weights, torch.zeros(1, size, device=device, dtype=torch.float32), zero, zero, zero, 1)


def multiply_in_four_bits(
    shape: torch.Size, stored: torch.dtype, computed: set[torch.dtype], device: torch.device
) -> None:
    """Quantize a weight of this shape and type, and multiply by it in each of the computed types."""
    out_features, in_features = shape
    weight = torch.zeros(_alike(out_features, 16), _alike(in_features, 256), dtype=stored, device=device)
    packed = quantize(weight, tensor_scale_for(weight, 1.0))
    for dtype in computed:
        linear(torch.zeros(1, weight.shape[1], dtype=dtype, device=device), packed, implementation="triton")


def kinds_of(shape: torch.Size) -> tuple[int, int]:
    """Key that is equal for weights that the four-bit kernels are compiled alike for."""
    return _alike(shape[0], 16), _alike(shape[1], 256)


def _is_whole(tokens: int, size: int, dtype: torch.dtype) -> bool:
    """Whether a head of this many tokens drafts in one launch."""
    from atlas_kernels.draft_head_triton import WHOLE_BYTES

    return (3 * size * size + 3 * size + tokens * size + tokens) * dtype.itemsize <= WHOLE_BYTES


def _alike(number: int, most: int) -> int:
    """The least number with the same power-of-two factor (up to `most`), except that 1 and 16 are kept."""
    if number in (1, 16):
        return number
    power = min(number & -number, most)
    return power if power > 16 else 32 if power == 16 else 2 * 16 + power
