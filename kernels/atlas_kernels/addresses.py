"""Lets compiled CPU kernels read tensors by their addresses.

A numpy view of a tensor costs a microsecond or two in every call. It also keeps torch from resizing the storage, which FSDP
does with weights that it gathered. An address costs a tenth of that and holds on to nothing.

A kernel cannot check an address. Its caller makes sure of type, shape, contiguity and device, and keeps the tensors alive.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

if config.DISABLE_JIT:

    def _pointer(address: Any) -> Any:
        return ctypes.c_void_p(int(address))

else:

    @intrinsic
    def _pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], cgutils.voidptr_t)

        return types.voidptr(address), generate


@numba.njit
def floats_at(address, shape):
    """The contiguous float32 array of a shape at an address."""
    return numba.carray(_pointer(address), shape, np.float32)


@numba.njit
def integers_at(address, shape):
    """The contiguous int64 array of a shape at an address."""
    return numba.carray(_pointer(address), shape, np.int64)


@numba.njit
def short_integers_at(address, shape):
    """The contiguous int32 array of a shape at an address."""
    return numba.carray(_pointer(address), shape, np.int32)


def weight_address(weight: torch.Tensor) -> int:
    """Address of a contiguous weight; `RuntimeError` if its memory was given back, as FSDP does with gathered weights."""
    if weight.untyped_storage().nbytes() < weight.nbytes:
        raise RuntimeError(f"a weight of {list(weight.shape)} has no memory: it was freed, or is not gathered")
    return weight.data_ptr()
