"""The noise in Triton is the reference's, bit for bit: block minima, excesses, exponentials of single tokens, uniforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels.noise import BLOCK, Stream, exponentials, exponentials_of, request_keys, uniforms

triton = pytest.importorskip("triton", reason="the kernels need Triton")
tl = pytest.importorskip("triton.language")
noise_triton = pytest.importorskip("atlas_kernels.noise_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [(0, 0, Stream.TARGET), (2**40 + 3, 2**31 + 5, Stream.RECOVER)]
"""Seed, position and stream: the smallest, and some that need more than 32 bits."""


@triton.jit
def draw_blocks(key, position, minima, lanes, excesses, STREAM: tl.constexpr):
    blocks, tokens = tl.arange(0, 16), tl.arange(0, 2048)
    minimum, lane = noise_triton.block_minima(tl.load(key), tl.load(position), blocks, STREAM)
    tl.store(minima + blocks, minimum)
    tl.store(lanes + blocks, lane)
    tl.store(excesses + tokens, noise_triton.excesses(tl.load(key), tl.load(position), 0, STREAM, 2048))


@triton.jit
def draw_tokens(key, position, ids, e, u, STREAM: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(e + at, noise_triton.exponentials_of(tl.load(key), tl.load(position), tl.load(ids + at), STREAM))
    tl.store(u, noise_triton.uniform(tl.load(key), tl.load(position), STREAM))


def key_and_position(seed: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.from_numpy(request_keys(seed, 2)[1:].view(np.int64))
    return key.to(DEVICE), torch.tensor([position], device=DEVICE)


@pytest.mark.parametrize(("seed", "position", "stream"), ROWS)
def test_blocks_drawn_from_their_minimum_inwards(seed, position, stream):
    key, at = key_and_position(seed, position)
    minima, excesses = torch.empty(16, device=DEVICE), torch.empty(2048, device=DEVICE)
    lanes = torch.empty(16, dtype=torch.int32, device=DEVICE)
    draw_blocks[(1,)](key, at, minima, lanes, excesses, STREAM=int(stream))
    e = minima.repeat_interleave(BLOCK) + excesses
    e[torch.arange(16, device=DEVICE) * BLOCK + lanes] = minima
    assert torch.equal(e[None], exponentials(key, at, int(stream), 2048))


@pytest.mark.parametrize(("seed", "position", "stream"), ROWS)
def test_single_tokens_and_uniforms(seed, position, stream):
    key, at = key_and_position(seed, position)
    ids = torch.randint(150_000, (256,), generator=torch.Generator().manual_seed(1), dtype=torch.int32).to(DEVICE)
    ids[:BLOCK] = torch.arange(BLOCK, device=DEVICE)  # a whole block, so that the lane of its minimum is among them
    e, u = torch.empty(256, device=DEVICE), torch.empty(1, dtype=torch.float64, device=DEVICE)
    draw_tokens[(1,)](key, at, ids, e, u, STREAM=int(stream))
    assert torch.equal(e[None], exponentials_of(key, at, int(stream), ids.long()))
    assert torch.equal(u, uniforms(key, at, int(stream)))
