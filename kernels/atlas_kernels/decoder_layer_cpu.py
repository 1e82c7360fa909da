"""A decoder layer of Llama's form on a CPU in float32, as one compiled function: norms, products, rotations, attention.

A decode step over a few rows spends up to a quarter of its time between the operations of its layers: in Python, in calls of
the kernels, in allocations. The kernels are the same ones here, in the same order (`few_rows_cpu`, `layer_cpu`,
`attend_cpu`, `gate_cpu`), so results are equal to the bit; only what is between them is compiled as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from atlas_kernels import attend_cpu, few_rows_cpu, gate_cpu
from atlas_kernels.addresses import floats_at, weight_address
from atlas_kernels.attend_cpu import Cache, attend
from atlas_kernels.few_rows_cpu import multiply
from atlas_kernels.gate_cpu import multiply_gates
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.layer_cpu import add_and_norm_rows, norm_rows, rotate_tokens

_BYTES = 4  # of a float32
_PLAIN = torch.Tensor, torch.nn.Parameter  # others may have no address


class Norm(NamedTuple):
    """An RMS norm: float32 `[columns]`, and see `layer.rms_norm`."""

    weight: torch.Tensor
    eps: float
    adds_one: bool


class Shape(NamedTuple):
    """Sizes of a layer: numbers of a hidden state, heads, key-value heads, numbers of a head and of the gate."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int

    @property
    def weights(self) -> list[tuple[int, int]]:
        """Shapes of the weights of queries, keys, values, attention's output, gate, up and down."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        hidden, inner = self.hidden, self.inner
        to_heads = [(queries, hidden), (keys, hidden), (keys, hidden)]
        return [*to_heads, (hidden, queries), (inner, hidden), (inner, hidden), (hidden, inner)]

    @property
    def norms(self) -> list[tuple[int]]:
        """Shapes of the norms of the input, of the first residual sum, of queries and of keys."""
        return [(self.hidden,), (self.hidden,), (self.dim,), (self.dim,)]

    @property
    def work_columns(self) -> int:
        """Numbers of working memory per token."""
        return 2 * (self.hidden + (self.heads + self.kv_heads) * self.dim + self.inner)


def fits(
    shape: Shape,
    weights: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    norms: Sequence[torch.Tensor | None],
) -> bool:
    """Whether `decoder_layer` takes these weights: contiguous float32 tensors on a CPU, of these shapes.

    Weights and biases are those of the projections to queries, keys and values, attention's output, gate, up and down.
    """
    sizes, norm_sizes = _sizes(shape)
    return (
        all(map(_is_plain, weights, sizes))
        and all(each is None or _is_plain(each, size[:1]) for each, size in zip(biases, sizes, strict=True))
        and all(map(_is_plain, norms, norm_sizes))
    )


@cache
def _sizes(shape: Shape) -> tuple[list[tuple[int, int]], list[tuple[int]]]:
    """Shapes of weights and norms, made once: every layer of every forward asks for them."""
    return shape.weights, shape.norms


def _is_plain(weight: Any, shape: tuple[int, ...]) -> bool:
    return (
        type(weight) in _PLAIN
        and weight.shape == shape
        and weight.dtype is torch.float32
        and weight.is_contiguous()
        and weight.is_cpu
    )


class Weights(NamedTuple):
    """A layer's weights by their addresses, from `weights_of`; valid while they stay there, and `fits` is true of them."""

    addresses: np.ndarray
    factors: np.ndarray


def weights_of(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norms: Sequence[Norm],
    scale: float,
    window: int | None,
) -> Weights:
    """What `decoder_layer` needs of a layer, for any number of calls. Nothing is checked but that memory is there.

    Args:
        weights: Of the projections, see `fits`.
        biases: Likewise.
        norms: Of the input and of the first residual sum; of each head's query and key, or without these two.
        scale: Factor on the scores of attention.
        window: Most cells that a query sees, its own included; None is all up to its own.

    Raises:
        RuntimeError: The memory of a weight was given back.
    """
    addresses = (
        *map(weight_address, weights),
        *[0 if bias is None else weight_address(bias) for bias in biases],
        window or 0,
        *[weight_address(norm.weight) for norm in norms],
        *[int(norm.adds_one) for norm in norms],
    )
    return Weights(np.array(addresses, np.int64), np.array([scale, *[norm.eps for norm in norms]]))


def plan_of(shape: Shape, tokens: int, forms: Sequence[int], work: torch.Tensor) -> np.ndarray:
    """What `decoder_layer` needs of a number of tokens, int64.

    Args:
        shape: Sizes of the layers.
        tokens: Number of tokens.
        forms: Forms of tiles (`few_rows_cpu.few_rows_linear`) for the products that make queries, keys and values, then
            attention's output, gate and up, and what down returns.
        work: Working memory, float32, of `tokens * shape.work_columns` numbers at least. Its content is lost. A plan does
            not keep it alive.
    """
    hidden, heads, kv_heads, dim, inner = shape
    parts = (
        few_rows_cpu.num_parts((heads + 2 * kv_heads) * dim * hidden),
        few_rows_cpu.num_parts(hidden * heads * dim),
        few_rows_cpu.num_parts(2 * hidden * inner),
        gate_cpu.num_parts(tokens * inner),
        few_rows_cpu.num_parts(hidden * inner),
    )
    return np.array((tokens, *shape, work.data_ptr(), *forms, *parts), np.int64)


def step_of(shape: Shape, angles: tuple[torch.Tensor, torch.Tensor], cache: Cache) -> np.ndarray:
    """What `decoder_layer` needs of a forward, int64; its tensors must live on.

    Args:
        shape: Sizes of the layers.
        angles: Cosines and sines, contiguous float32 `[tokens, dim]` on a CPU.
        cache: Where the tokens go; keys and values are not looked at.
    """
    places = cache.rows, cache.positions, cache.offsets
    parts = attend_cpu.num_parts(len(cache.rows) * cache.context * 2 * shape.kv_heads * shape.dim)
    at = [each.data_ptr() for each in (*angles, *places)]
    return np.array((*at, cache.context, len(cache.offsets) - 1, parts), np.int64)


def decoder_layer(
    x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, weights: Weights, plan: np.ndarray, step: np.ndarray
) -> torch.Tensor:
    """Run a layer and store its keys and values. Nothing is checked: memory is read and written by addresses.

    Args:
        x: Contiguous float32 `[tokens, hidden]` on a CPU.
        keys: The layer's cache, see `attend_cpu.attend_rows`.
        values: Likewise.
        weights: From `weights_of`, for weights that fit the plan's shape.
        plan: From `plan_of`, for this number of tokens.
        step: From `step_of`, for this forward.

    Returns:
        `[tokens, hidden]`, in new memory.
    """
    out = torch.empty_like(x)
    at, sizes = (keys.data_ptr(), values.data_ptr()), (*keys.shape[:2], *values.shape[:2])
    _run(x.data_ptr(), out.data_ptr(), (*at, *sizes), *weights, plan, step)
    return out


def compile_layer() -> None:
    """Compile the kernel."""
    none = np.zeros(0, np.int64)
    _run(0, 0, (0, 0, 0, 0, 0, 0), none, np.zeros(0), none, none)


@cached_njit(nogil=True)
def _run(x, out, cache, weights, factors, plan, step):
    if len(plan) == 0:
        return
    tokens, hidden, heads, kv_heads, dim, inner = plan[0], plan[1], plan[2], plan[3], plan[4], plan[5]
    forms, parts, biases, window = plan[7:11], plan[11:], weights[7:14], weights[14]
    cos, sin, rows, positions, offsets, context, batch = step[0], step[1], step[2], step[3], step[4], step[5], step[6]
    count = (len(weights) - 15) // 2
    norms, adds_one = weights[15 : 15 + count], weights[15 + count :] > 0

    queries, of_kv = heads * dim, kv_heads * dim
    row = tokens * _BYTES
    normed = plan[6]
    query = normed + row * hidden
    key = query + row * queries
    value = key + row * of_kv
    attended = value + row * of_kv
    gate = attended + row * queries
    up = gate + row * inner
    down = up + row * inner

    norm_rows(x, norms[0], normed, tokens, hidden, factors[1], adds_one[0])
    to_heads = [normed, tokens, hidden, forms[0], weights[0], query, queries]
    to_heads += [weights[1], key, of_kv, weights[2], value, of_kv]
    multiply(np.array(to_heads), parts[0])
    _add_bias(biases[0], query, tokens, queries)
    _add_bias(biases[1], key, tokens, of_kv)
    _add_bias(biases[2], value, tokens, of_kv)
    if count > 2:
        norm_rows(query, norms[2], query, tokens * heads, dim, factors[3], adds_one[2])
        norm_rows(key, norms[3], key, tokens * kv_heads, dim, factors[4], adds_one[3])
    rotate_tokens(query, cos, sin, tokens, heads, dim)
    rotate_tokens(key, cos, sin, tokens, kv_heads, dim)
    attention = [query, key, value, cache[0], cache[1], rows, positions, offsets, attended]
    attention += [tokens, heads, kv_heads, dim, dim, cache[2], cache[3], cache[4], cache[5]]
    attention += [context, window if window > 0 else context, batch]
    attend(np.array(attention), factors[0], step[7])
    multiply(np.array([attended, tokens, queries, forms[1], weights[3], out, hidden]), parts[1])
    _add_bias(biases[3], out, tokens, hidden)
    add_and_norm_rows(x, out, norms[1], normed, tokens, hidden, factors[2], adds_one[1])
    gate_and_up = [normed, tokens, hidden, forms[2], weights[4], gate, inner, weights[5], up, inner]
    multiply(np.array(gate_and_up), parts[2])
    _add_bias(biases[4], gate, tokens, inner)
    _add_bias(biases[5], up, tokens, inner)
    multiply_gates(gate, up, tokens, inner, parts[3])
    multiply(np.array([gate, tokens, inner, forms[3], weights[6], down, hidden]), parts[4])
    _add_bias(biases[6], down, tokens, hidden)
    _add(down, out, tokens * hidden)


@cached_njit(nogil=True)
def _add_bias(bias_at, to_at, tokens, columns):
    if bias_at != 0:
        bias, to = floats_at(bias_at, (columns,)), floats_at(to_at, (tokens, columns))
        for token in range(tokens):
            for column in range(columns):
                to[token, column] += bias[column]


@cached_njit(nogil=True)
def _add(x_at, to_at, count):
    x, to = floats_at(x_at, (count,)), floats_at(to_at, (count,))
    for index in range(count):
        to[index] += x[index]
