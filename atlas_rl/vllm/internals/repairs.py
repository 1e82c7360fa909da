"""Fixes faults of vLLM's CPU backend."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from atlas_rl.vllm.internals.version import INSTALLED, check_version, since


def repair_cpu_sampler() -> None:
    """Fix how vLLM's CPU backend spreads per-request values over draft positions. Does nothing elsewhere.

    vLLM's stand-in for a Triton kernel writes into an int64 copy of the float output, so that temperature and top-p of
    every draft position are uninitialised memory. Every speculative method needs the fix at temperatures above 0.
    """
    check_version()
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu() or hasattr(rejection_sampler.expand_batch_to_tokens, INSTALLED):
        return

    @functools.wraps(rejection_sampler.expand_batch_to_tokens)
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(values, counts.long(), output_size=num_tokens)

    setattr(expand_batch_to_tokens, INSTALLED, True)
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def tolerate_numba() -> None:
    """Let vLLM's CPU backend start in a process that has loaded numba. Call it before building an engine.

    At start vLLM looks through every attribute of every module for kernels to replace. It fails on an object of
    llvmlite that answers to any attribute, `__dict__` included. Before 0.31 vLLM replaced the kernels by name.
    """
    if not since("0.31"):
        return
    from vllm.triton_utils import dispatcher

    original = dispatcher._rebind_kernels
    if hasattr(original, INSTALLED):
        return

    @functools.wraps(original)
    def rebind_kernels(overrides: Any) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "llvmlite.binding.ffi"}
        try:
            original(overrides)
        finally:
            sys.modules.update(hidden)

    setattr(rebind_kernels, INSTALLED, True)
    dispatcher._rebind_kernels = rebind_kernels
