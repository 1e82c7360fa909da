"""Counter-based noise: the random number of a token is a function of (seed, request, position, token) alone.

Drafter-invariant sampling (Daliri, Musco, Suresh, arXiv 2408.07978) needs noise that anybody can compute before the
target has run, in any order, and that does not depend on the drafts. The token at a position is

    choice = argmax_x p(x) / E(x) = argmax_x log p(x) - log E(x)          E(x) ~ Exp(1), -log E(x) is Gumbel

**Blocks.** Drawing E for 49k tokens at every verified position would cost as much as the softmax. Exponentials are
memoryless, so the same i.i.d. variates can be drawn starting from a block's minimum: for a block of B = 128 tokens

    M     ~ Exp(B)                  the least of B i.i.d. Exp(1) variates
    lane* ~ uniform over the block  which token has it; it gets E = M
    E(x)  = M + E'(x)               every other token, E' ~ Exp(1)

A token's score is at most p(x) / M, so a row needs V / B draws of M, and E' only for the few tokens whose bound beats the
best score so far (`choose_rows`). The choice is exactly the one that all V draws would give.

**Numbers.** Philox4x32-10 (Salmon et al., SC 2011) with the 64-bit key `request_key(seed, request)`:

    block words   counter (block,      position, 2 stream,     0): word 0 -> M, word 1 mod B -> lane*
    token words   counter (token // 4, position, 2 stream + 1, 0): word token mod 4 -> E'
    u = (word + 0.5) / 2**32, E = -log1p(-u): fine-grained near zero, where draws are decided

`position` is the index in the whole sequence of the token being drawn. The numba kernels (CPU) and the torch
reference (every device) draw the same words bit for bit.
"""

from __future__ import annotations

import enum

import numba
import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.openmp import share_threads

BLOCK = 128
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 10
_U_SCALE = 2.0**-32

share_threads()  # before any kernel is compiled


class Stream(enum.IntEnum):
    """Independent noise streams."""

    TARGET = 0  # the target's own choice, shared with drafters that couple to it
    ACCEPT = 1  # rejection sampling: accept or reject a draft
    RECOVER = 2  # rejection sampling: the recovered or bonus token
    DRAFT = 3  # independent draws of drafters whose engine verifies by rejection


def mix64(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers that spreads every input bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix64_of(x: np.ndarray) -> np.ndarray:
    """`mix64` of every number: uint64 `[n]`, whose arithmetic is modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def request_keys(seed: int, num_requests: int) -> np.ndarray:
    """Philox keys of requests `0 .. num_requests - 1` under `seed`: uint64 `[num_requests]`."""
    base = mix64(seed)
    # `mix64(seed) ^ mix64(request)` would be symmetric: exchanging seed and request would give the same key.
    return _mix64_of(np.uint64(base) ^ np.arange(num_requests, dtype=np.uint64))


def draft_keys(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Keys for `Stream.DRAFT` of drafts that begin after `lengths` committed tokens.

    Every decode step commits a token, so drafts of two steps never share noise. A learner has seen the discarded
    drafts: if their noise were used again, the next decision would depend on the next draw.

    Args:
        keys: uint64 `[n]`, from `request_keys`.
        lengths: int64 `[n]`.

    Returns:
        uint64 `[n]`.
    """
    return keys ^ _mix64_of(lengths.astype(np.uint64))


# ------------------------------------------------------------------------------------------------- numba, on the CPU


@numba.njit(inline="always")
def philox4x32(key, c0, c1, c2):
    """One Philox4x32-10 block with counter `(c0, c1, c2, 0)`: four uint64 values that hold 32-bit words."""
    mask = np.uint64(_MASK32)
    k0 = np.uint64(key) & mask
    k1 = np.uint64(key) >> np.uint64(32)
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(0)
    for _ in range(_ROUNDS):
        p0 = np.uint64(_M0) * x0
        p1 = np.uint64(_M1) * x2
        y0 = (p1 >> np.uint64(32)) ^ x1 ^ k0
        y2 = (p0 >> np.uint64(32)) ^ x3 ^ k1
        x0, x1, x2, x3 = y0, p1 & mask, y2, p0 & mask
        k0 = (k0 + np.uint64(_W0)) & mask
        k1 = (k1 + np.uint64(_W1)) & mask
    return x0, x1, x2, x3


@numba.njit(inline="always")
def _exponential_of_word(word):
    return -np.log1p(-(np.float64(word) + 0.5) * _U_SCALE)


@numba.njit(inline="always")
def _block_minimum(key, position, block, stream):
    """`(M, lane*)` of one block."""
    words = philox4x32(key, block, position, 2 * stream)
    return np.float32(_exponential_of_word(words[0]) / BLOCK), np.int64(words[1] % np.uint64(BLOCK))


@numba.njit(inline="always")
def _excess(key, position, token, stream):
    """E' of one token."""
    w0, w1, w2, w3 = philox4x32(key, token >> 2, position, 2 * stream + 1)
    lane = token & 3
    word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
    return np.float32(_exponential_of_word(word))


@cached_njit()
def exponential(key, position, token, stream):
    """E of one token at one position: float32 (uint64 key; int position, token and stream).

    Drafters that couple a handful of candidates to the target's noise use it.
    """
    minimum, lane = _block_minimum(key, position, token // BLOCK, stream)
    if token % BLOCK == lane:
        return minimum
    return minimum + _excess(key, position, token, stream)


@cached_njit(nogil=True, parallel=True)
def choose_rows(probs, block_max, keys, positions, stream):
    """`argmax_x p(x) / E(x)` of every row.

    Args:
        probs: float32 `[rows, vocab]`, C-contiguous; may be unnormalised.
        block_max: float32 `[rows, ceil(vocab / BLOCK)]`, the largest probability of each block.
        keys: uint64 `[rows]`.
        positions: int64 `[rows]`.
        stream: The noise stream.

    Returns:
        int64 `[rows]`.
    """
    rows, vocab = probs.shape
    num_blocks = block_max.shape[1]
    choice = np.zeros(rows, np.int64)
    for row in numba.prange(rows):
        key, position = keys[row], positions[row]
        best_score, best_token = np.float32(-1.0), 0
        # The likeliest block first: its score lets the bound below skip almost every other block.
        first = np.argmax(block_max[row])
        for step in range(-1, num_blocks):
            block = first if step < 0 else step
            if block_max[row, block] == 0 or (step >= 0 and block == first):
                continue
            minimum, lane = _block_minimum(key, position, block, stream)
            if block_max[row, block] < best_score * minimum:
                continue
            for token in range(block * BLOCK, min((block + 1) * BLOCK, vocab)):
                p = probs[row, token]
                if p == 0 or p < best_score * minimum:
                    continue
                e = minimum if token - block * BLOCK == lane else minimum + _excess(key, position, token, stream)
                score = p / e
                if score > best_score or (score == best_score and token < best_token):
                    best_score, best_token = score, token
        choice[row] = best_token
    return choice


# -------------------------------------------------------------------------------------------- torch, on every device


def philox_words(keys: torch.Tensor, counters: torch.Tensor, positions: torch.Tensor, word2: int) -> torch.Tensor:
    """Philox blocks with counters `(counter, position, word2, 0)`.

    Args:
        keys: int64 `[rows]`, the bits of the uint64 request keys.
        counters: int64 `[counters]`.
        positions: int64 `[rows]`.
        word2: Third counter word.

    Returns:
        int64 `[rows, counters, 4]` with values in `[0, 2**32)`.
    """
    shape = (len(keys), len(counters))
    k0 = (keys & _MASK32)[:, None]
    k1 = ((keys >> 32) & _MASK32)[:, None]
    x0 = counters[None].expand(shape)
    x1 = (positions & _MASK32)[:, None].expand(shape)
    x2 = torch.full(shape, word2, dtype=torch.int64, device=keys.device)
    x3 = torch.zeros_like(x2)
    for _ in range(_ROUNDS):
        h0, l0 = _mul_hi_lo(_M0, x0)
        h1, l1 = _mul_hi_lo(_M1, x2)
        x0, x1, x2, x3 = h1 ^ x1 ^ k0, l1, h0 ^ x3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return torch.stack([x0, x1, x2, x3], dim=-1)


def exponentials(keys: torch.Tensor, positions: torch.Tensor, stream: int, vocab_size: int) -> torch.Tensor:
    """E of every token: float32 `[rows, vocab_size]` (keys, positions as in `philox_words`). The dense reference."""
    device = keys.device
    blocks = torch.arange(-(-vocab_size // BLOCK), device=device)
    words = philox_words(keys, blocks, positions, 2 * stream)
    minimum = (_exponential_of_words(words[..., 0]) / BLOCK).to(torch.float32)
    lane = words[..., 1] % BLOCK
    tokens = torch.arange(len(blocks) * BLOCK, device=device)
    excess = philox_words(keys, tokens[::4] >> 2, positions, 2 * stream + 1).flatten(1)
    e = minimum[..., None] + _exponential_of_words(excess).to(torch.float32).view(len(keys), len(blocks), BLOCK)
    e.scatter_(-1, lane[..., None], minimum[..., None])
    return e.flatten(1)[:, :vocab_size]


def exponentials_of(keys: torch.Tensor, positions: torch.Tensor, stream: int, token_ids: torch.Tensor) -> torch.Tensor:
    """E of some tokens (int64 `[tokens]`): float32 `[rows, tokens]`; `exponentials` has the same numbers."""
    minimum_words = philox_words(keys, token_ids // BLOCK, positions, 2 * stream)
    minimum = (_exponential_of_words(minimum_words[..., 0]) / BLOCK).to(torch.float32)
    lane = minimum_words[..., 1] % BLOCK
    words = philox_words(keys, token_ids >> 2, positions, 2 * stream + 1)
    word = words.gather(2, (token_ids & 3)[None, :, None].expand(len(keys), -1, 1))[..., 0]
    excess = _exponential_of_words(word).to(torch.float32)
    return torch.where(lane == token_ids % BLOCK, minimum, minimum + excess)


def uniforms(keys: torch.Tensor, positions: torch.Tensor, stream: int) -> torch.Tensor:
    """One uniform variate in (0, 1) per row: float64 `[rows]`, for streams that draw no tokens."""
    words = philox_words(keys, torch.zeros(1, dtype=torch.int64, device=keys.device), positions, 2 * stream)
    return words[:, 0, 0].to(torch.float64).add_(0.5).mul_(_U_SCALE)


def _exponential_of_words(words: torch.Tensor) -> torch.Tensor:
    return torch.log1p(words.to(torch.float64).add_(0.5).mul_(-_U_SCALE)).neg_()


def _mul_hi_lo(multiplier: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32x32-bit product, in halves: int64 cannot hold the unsigned product."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
