"""`layer` in float32 on a CPU, compiled: one pass; torch takes five to ten, each with an allocation.

Rows and tokens are computed one by one, so that no result depends on their number.
"""

from __future__ import annotations

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float, adds_one: bool, rounds_first: bool) -> torch.Tensor:
    """See `layer.rms_norm`; in float32 there is no intermediate rounding."""
    out = torch.empty_like(x)
    columns = x.shape[-1]
    # A numpy view would pin the weight's storage, which FSDP has to free, so numpy gets a copy.
    own = _numbers(weight.detach().clone())
    _norm_rows(_numbers(x).reshape(-1, columns), own, eps, adds_one, _numbers(out).reshape(-1, columns))
    return out


def rotate_cpu(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layer.rotate`."""
    out = torch.empty_like(query), torch.empty_like(key)
    angles = _numbers(cos), _numbers(sin)
    _rotate_tokens(_numbers(query), *angles, _numbers(out[0]))
    _rotate_tokens(_numbers(key), *angles, _numbers(out[1]))
    return out


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


# `reassoc` lets sums be reordered and vectorised; the order is the same for every row.
@cached_njit(nogil=True, fastmath={"reassoc"})
def _squares(row):
    total = np.float32(0)
    for column in range(len(row)):
        total += row[column] * row[column]
    return total


@cached_njit(nogil=True, error_model="numpy")
def _norm_rows(x, weight, eps, adds_one, out):
    columns = x.shape[1]
    one = np.float32(1) if adds_one else np.float32(0)
    for row in range(x.shape[0]):
        mean = _squares(x[row]) / np.float32(columns)
        scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
        for column in range(columns):
            out[row, column] = (x[row, column] * scale) * (one + weight[column])


@cached_njit(nogil=True)
def _rotate_tokens(x, cos, sin, out):
    half = x.shape[2] // 2
    for token in range(x.shape[0]):
        for head in range(x.shape[1]):
            for low in range(half):
                first, second = x[token, head, low], x[token, head, low + half]
                out[token, head, low] = first * cos[token, low] - second * sin[token, low]
                out[token, head, low + half] = second * cos[token, low + half] + first * sin[token, low + half]
