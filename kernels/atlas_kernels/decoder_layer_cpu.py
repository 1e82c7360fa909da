"""A decoder layer of Llama's form on a CPU in float32, as one compiled function: norms, products, rotations, attention.

A decode step over a few rows spends a third of its time between the operations of its layers: in Python, in calls of the
kernels, in allocations. The kernels are the same ones here, in the same order (`few_rows_cpu`, `layer_cpu`, `attend_cpu`,
`gate_cpu`), so results are equal to the bit; only what is between them is compiled as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from atlas_kernels import attend_cpu, few_rows_cpu, gate_cpu
from atlas_kernels.addresses import floats_at, weight_address
from atlas_kernels.attend_cpu import Cache, attend, attention_call
from atlas_kernels.few_rows_cpu import multiply
from atlas_kernels.gate_cpu import multiply_gates
from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.layer_cpu import add_and_norm_rows, norm_rows, rotate_tokens

_BYTES = 4  # of a float32
# Where the parts of a call begin: the calls of other kernels, seven biases with what they are added to, the rest.
_TO_HEADS, _ATTENTION, _TO_OUT, _GATE_AND_UP, _DOWN, _BIASES, _REST = 0, 13, 34, 41, 51, 58, 79


class Projection(NamedTuple):
    """A linear layer: float32 `[out, in]`, and `[out]` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


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
    def work_columns(self) -> tuple[int, ...]:
        """Numbers per token of normed states, queries, keys, values, attention, gate, up, and of what down returns."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        return self.hidden, queries, keys, keys, queries, self.inner, self.inner, self.hidden


def fits(shape: Shape, projections: Sequence[Projection], norms: Sequence[Norm]) -> bool:
    """Whether `decoder_layer` takes these weights: contiguous float32 on a CPU, of these shapes."""
    return all(
        _is_plain(each.weight, size) and (each.bias is None or _is_plain(each.bias, size[:1]))
        for each, size in zip(projections, shape.weights, strict=True)
    ) and all(_is_plain(norm.weight, size) for norm, size in zip(norms, shape.norms, strict=False))


def _is_plain(weight: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return weight.shape == shape and weight.dtype is torch.float32 and weight.is_contiguous() and weight.is_cpu


class LayerCall(NamedTuple):
    """What a layer is run with.

    Attributes:
        shape: Sizes of the layer.
        projections: To queries, keys and values, attention's output, gate, up and down. See `fits`.
        norms: Of the input and of the first residual sum; of each head's query and key, or without these two.
        cache: Where keys and values are.
        scale: Factor on the scores of attention.
        window: Most cells that a query sees, its own included; None is all up to its own.
        forms: Forms of tiles (`few_rows_cpu.few_rows_linear`) for the products that make queries, keys and values, then
            attention's output, gate and up, and what down returns.
        work: Working memory, float32, of `tokens * sum(shape.work_columns)` numbers at least; its content is lost.
    """

    shape: Shape
    projections: Sequence[Projection]
    norms: Sequence[Norm]
    cache: Cache
    scale: float
    window: int | None
    forms: Sequence[int]
    work: torch.Tensor


def decoder_layer(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], layer: LayerCall) -> torch.Tensor:
    """Run a layer and store its keys and values.

    Nothing is checked, but that the memory of weights is there: memory is written by addresses.

    Args:
        x: Contiguous float32 `[tokens, hidden]` on a CPU.
        angles: Cosines and sines, likewise, `[tokens, dim]`.
        layer: Its weights, its cache, and so on.

    Returns:
        `[tokens, hidden]`, in new memory.

    Raises:
        RuntimeError: The memory of a weight was given back.
    """
    shape, projections, norms, cache, scale, window, forms, work = layer
    out = torch.empty_like(x)
    tokens, (hidden, heads, kv_heads, dim, inner) = x.shape[0], shape
    normed, query, key, value, attended, gate, up, down = (
        work.data_ptr() + tokens * _BYTES * before for before in accumulate(shape.work_columns[:-1], initial=0)
    )
    outs = query, key, value, out.data_ptr(), gate, up, down
    products = [
        (weight_address(each.weight), to, each.weight.shape[0]) for each, to in zip(projections, outs, strict=True)
    ]
    seen = tokens * cache.context * kv_heads * 2 * dim
    call = (
        *(normed, tokens, hidden, forms[0], *products[0], *products[1], *products[2]),
        *attention_call((query, key, value, attended), (heads, dim, dim), cache, window),
        *(attended, tokens, heads * dim, forms[1], *products[3]),
        *(normed, tokens, hidden, forms[2], *products[4], *products[5]),
        *(gate, tokens, inner, forms[3], *products[6]),
        *[
            number
            for each, (_, to, columns) in zip(projections, products, strict=True)
            for number in (0 if each.bias is None else weight_address(each.bias), to, columns)
        ],
        *(x.data_ptr(), normed, angles[0].data_ptr(), angles[1].data_ptr(), out.data_ptr(), dim),
        *(few_rows_cpu.num_parts((heads + 2 * kv_heads) * dim * hidden), attend_cpu.num_parts(seen)),
        *(few_rows_cpu.num_parts(hidden * heads * dim), few_rows_cpu.num_parts(2 * hidden * inner)),
        *(gate_cpu.num_parts(tokens * inner), few_rows_cpu.num_parts(hidden * inner)),
        *[weight_address(norm.weight) for norm in norms],
        *[int(norm.adds_one) for norm in norms],
    )
    _run(np.array(call, np.int64), np.array([scale, *[norm.eps for norm in norms]]))
    return out


def compile_layer() -> None:
    """Compile the kernel."""
    _run(np.zeros(0, np.int64), np.zeros(0))


@cached_njit(nogil=True)
def _run(call, factors):
    """`call` is described above; `factors` are the scale of attention's scores, and the epsilon of each norm."""
    if len(call) == 0:
        return
    to_heads, to_out = call[_TO_HEADS:_ATTENTION], call[_TO_OUT:_GATE_AND_UP]
    gate_and_up, down = call[_GATE_AND_UP:_DOWN], call[_DOWN:_BIASES]
    biases, rest = call[_BIASES:_REST], call[_REST:]
    tokens, hidden, inner = to_heads[1], to_heads[2], down[2]
    x, normed, cos, sin, out, dim = rest[0], rest[1], rest[2], rest[3], rest[4], rest[5]
    parts, norms = rest[6:12], rest[12:]
    count = len(norms) // 2
    weights, adds_one = norms[:count], norms[count:] > 0

    norm_rows(x, weights[0], normed, tokens, hidden, factors[1], adds_one[0])
    multiply(to_heads, parts[0])
    _add_biases(biases[:9], tokens)
    for index in range(2):  # queries, keys
        at, heads = to_heads[5 + 3 * index], to_heads[6 + 3 * index] // dim
        if count > 2:
            norm_rows(at, weights[2 + index], at, tokens * heads, dim, factors[3 + index], adds_one[2 + index])
        rotate_tokens(at, cos, sin, tokens, heads, dim)
    attend(call[_ATTENTION:_TO_OUT], factors[0], parts[1])
    multiply(to_out, parts[2])
    _add_biases(biases[9:12], tokens)
    add_and_norm_rows(x, out, weights[1], normed, tokens, hidden, factors[2], adds_one[1])
    multiply(gate_and_up, parts[3])
    _add_biases(biases[12:18], tokens)
    multiply_gates(gate_and_up[5], gate_and_up[8], tokens, inner, parts[4])
    multiply(down, parts[5])
    _add_biases(biases[18:], tokens)
    _add(down[5], out, tokens * hidden)


@cached_njit(nogil=True)
def _add_biases(biases, tokens):
    for index in range(0, len(biases), 3):
        if biases[index] != 0:
            columns = biases[index + 2]
            bias, to = floats_at(biases[index], (columns,)), floats_at(biases[index + 1], (tokens, columns))
            for token in range(tokens):
                for column in range(columns):
                    to[token, column] += bias[column]


@cached_njit(nogil=True)
def _add(x_at, to_at, count):
    x, to = floats_at(x_at, (count,)), floats_at(to_at, (count,))
    for index in range(count):
        to[index] += x[index]
