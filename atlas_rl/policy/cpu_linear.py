"""Float32 linear layers for small batches on a CPU.

A decode step multiplies a few rows by every weight: it is bound by reading the weights. `F.linear(x, W)` hands BLAS the
few rows as the tall operand, and the library repacks all of W on every call. `(W @ x.T).T` is the same product with W as
the tall operand, which is streamed once. Up to three rows BLAS has a kernel of its own for the first form. Measured on a
2-core Xeon (AVX-512, fp32, MKL of torch 2.13), LM head of 49,152 x 576, ms:

    rows       1     2     3     4     8    12    16    24    32    48    64
    F.linear   7.1   7.2   7.6  13.2  20.8  32.9  35.7  41.8  45.4  48.4  38.3
    W @ x.T    7.1  14.2  13.9  12.1  15.1  16.6  18.1  25.4  29.0  37.2  36.3

The weights stay where they are: no packed copy that would have to follow every policy update.

Under autocast a layer computes in bfloat16 or float16, which has kernels of its own, adds its bias before it rounds, and is
no faster the other way round: there every layer keeps PyTorch's route.

Drafters' own weights are small and stay in the caches, and nothing else reads them. Stored column by column they need
neither repacking nor a product that is transposed afterwards. Weights of 1,728 x 576, there, microseconds:

    rows       1     3     4     8    16    32
    F.linear   115   129   867   893  1056  1387
    W @ x.T    127   475   421   319   400   670
    columns     97   115   147   130   208   385
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from atlas_rl.policy.guise import class_of
from atlas_rl.policy.threads import replaced_forwards

MIN_ROWS, MAX_ROWS = 4, 63


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, by whichever route is faster for this many rows, on a CPU; the other route is for float32 alone."""
    rows = math.prod(x.shape[:-1])
    if not MIN_ROWS <= rows <= MAX_ROWS or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, weight, bias)
    # Contiguous again, because every elementwise operation downstream would walk the transposed layout.
    out = (weight @ x.reshape(rows, -1).t()).t().contiguous()
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], -1)


def by_columns(weight: torch.Tensor) -> torch.Tensor:
    """The same weight `[out, in]`, on a CPU stored column by column; elsewhere as it is."""
    return weight.t().contiguous().t() if weight.device.type == "cpu" else weight


def _forward(linear: nn.Linear, input: torch.Tensor) -> torch.Tensor:  # some policies pass it by its name
    return linear_rows(input, linear.weight, linear.bias)


def streamed_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, float32 CPU `nn.Linear` layers of `model` take the route above in this thread; afterwards none does.

    A layer returns what it would return otherwise: the same type, and the same value up to the rounding of float32.
    """
    patched = [
        module
        for module in model.modules()
        if class_of(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    ]
    return replaced_forwards(dict.fromkeys(patched, _forward))
