"""Logits of a few ragged steps of a policy, compared to the bit."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.in_process import InProcessRunner

LENGTHS = np.array([3, 1, 6]), np.array([1, 1, 1]), np.array([2, 1, 4]), np.array([1, 1, 1])
"""New tokens of three rows in each forward: prompts, then decode steps."""


def steps(model, between=lambda: None, taps=Taps, context=nullcontext):
    """Logits of prompts and of three ragged steps, with something done to the policy between them."""
    runner, rng, out = InProcessRunner(model), np.random.default_rng(3), []
    starts = np.zeros(3, np.int64)
    runner.row_bytes(1)  # probes
    with context(), runner.session(runner.new_cache(3, 64)):
        for lengths in LENGTHS:
            tokens = rng.integers(64, size=int(lengths.sum()))
            tapped = taps()
            out.append(runner.forward(Segments(tokens, 0, starts, lengths), np.arange(len(tokens)), tapped))
            out += [tapped.layers[layer] for layer in sorted(tapped.layers)]
            starts = starts + lengths
            between()
    return [each.clone() for each in out]


def same(ours, expected):
    return len(ours) == len(expected) and all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def with_hook(model, part):
    """A policy whose second layer has a part with a hook that changes what it returns, and the modules that it saw."""
    seen = []

    def hook(module, args, out):
        seen.append(module)
        return (1.25 * out[0], *out[1:]) if isinstance(out, tuple) else 1.25 * out

    model.model.layers[1].get_submodule(part).register_forward_hook(hook)
    return model, seen
