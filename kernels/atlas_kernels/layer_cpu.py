"""`layer` in float32 on a CPU, compiled: one pass; torch takes five to ten, each with an allocation.

Rows and tokens are computed one by one, so that no result depends on their number.
"""

from __future__ import annotations

import numpy as np
import torch

from atlas_kernels.addresses import floats_at, weight_address
from atlas_kernels.jit_cache import cached_njit


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float, adds_one: bool, rounds_first: bool) -> torch.Tensor:
    """See `layer.rms_norm`; in float32 there is no intermediate rounding."""
    out, weight = torch.empty_like(x), weight.contiguous()
    columns = len(weight)
    rows = x.numel() // max(1, columns)
    norm_rows(x.data_ptr(), weight_address(weight), out.data_ptr(), rows, columns, eps, adds_one)
    return out


def rotate_cpu(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layer.rotate`."""
    query, key = query.clone(), key.clone()
    rotate_in_place(query.flatten(1), key.flatten(1), cos, sin, query.shape[-1])
    return query, key


def rotate_in_place(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int) -> None:
    """`layer.rotate` of queries and keys that nobody else reads.

    Nothing is checked: all tensors are contiguous float32 of one number of tokens on a CPU, `[tokens, heads * dim]` and
    `[..., dim]`.
    """
    for x in (query, key):
        rotate_tokens(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), x.shape[0], x.shape[1] // dim, dim)


def add_and_norm(x: torch.Tensor, to: torch.Tensor, weight: torch.Tensor, eps: float, adds_one: bool) -> torch.Tensor:
    """Add `x` to `to`, which nobody else reads, and return the RMS norm of the sum.

    Nothing is checked: `x` and `to` are contiguous float32 `[rows, columns]` on a CPU.
    """
    out, weight = torch.empty_like(to), weight.contiguous()
    at = x.data_ptr(), to.data_ptr(), weight_address(weight), out.data_ptr()
    add_and_norm_rows(*at, *to.shape, eps, adds_one)
    return out


# `reassoc` lets sums be reordered and vectorised; the order is the same for every row.
@cached_njit(nogil=True, fastmath={"reassoc"})
def _squares(row):
    total = np.float32(0)
    for column in range(len(row)):
        total += row[column] * row[column]
    return total


@cached_njit(nogil=True, error_model="numpy")
def norm_rows(x_at, weight_at, out_at, rows, columns, eps, adds_one):
    """`rms_norm_cpu` of rows at an address; `out_at` may be that address, too."""
    x, out = floats_at(x_at, (rows, columns)), floats_at(out_at, (rows, columns))
    weight = floats_at(weight_at, (columns,))
    one = np.float32(1) if adds_one else np.float32(0)
    for row in range(rows):
        _norm_row(x[row], weight, out[row], eps, one)


@cached_njit(nogil=True, error_model="numpy")
def add_and_norm_rows(x_at, to_at, weight_at, out_at, rows, columns, eps, adds_one):
    """`add_and_norm` of rows at addresses."""
    x, to = floats_at(x_at, (rows, columns)), floats_at(to_at, (rows, columns))
    out, weight = floats_at(out_at, (rows, columns)), floats_at(weight_at, (columns,))
    one = np.float32(1) if adds_one else np.float32(0)
    for row in range(rows):
        for column in range(columns):
            to[row, column] += x[row, column]
        _norm_row(to[row], weight, out[row], eps, one)


@cached_njit(nogil=True, error_model="numpy")
def _norm_row(x, weight, out, eps, one):
    mean = _squares(x) / np.float32(len(x))
    scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
    for column in range(len(x)):
        out[column] = (x[column] * scale) * (one + weight[column])


@cached_njit(nogil=True)
def rotate_tokens(x_at, cos_at, sin_at, tokens, heads, dim):
    """Rotate the heads of tokens at an address, in place."""
    x, cos, sin = (
        floats_at(x_at, (tokens, heads, dim)),
        floats_at(cos_at, (tokens, dim)),
        floats_at(sin_at, (tokens, dim)),
    )
    half = dim // 2
    for token in range(tokens):
        for head in range(heads):
            for low in range(half):
                first, second = x[token, head, low], x[token, head, low + half]
                x[token, head, low] = first * cos[token, low] - second * sin[token, low]
                x[token, head, low + half] = second * cos[token, low + half] + first * sin[token, low + half]
