"""Drafts and logits for verification by any form of it, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from atlas_kernels.noise import request_keys
from atlas_rl.core import Draft, SamplingParams, Sequences

VOCAB, PROMPT = 300, 6
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DEVICE = CUDA if torch.cuda.is_available() else CPU


def case(lengths: Sequence[int], sampling: SamplingParams, *, with_probs: bool, seed: int = 0):
    """Logits, and drafts of these lengths drawn from a disturbed copy of them, for every other request of a call."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), max(lengths, default=0)
    requests = 2 * np.arange(batch)
    tokens = np.zeros((2 * batch, 40), np.int32)
    tokens[:, :PROMPT] = np.random.default_rng(seed).integers(VOCAB, size=(2 * batch, PROMPT))
    sequences = Sequences(
        token_ids=tokens,
        lengths=np.full(2 * batch, PROMPT),
        prompt_lengths=np.full(2 * batch, PROMPT),
        prompt_keys=np.zeros(2 * batch, np.int64),
        noise_keys=request_keys(seed, 2 * batch),
        sampling=sampling,
        vocab_size=VOCAB,
        policy_version=0,
    )
    rows = sum(lengths) + batch
    logits = 3 * torch.randn(rows, VOCAB, generator=generator)
    draft = Draft(np.zeros((batch, width), np.int64), np.array(lengths), np.full((batch, width), 0.5, np.float32))
    q = torch.zeros(batch, width, VOCAB)
    first = 0
    for row, length in enumerate(lengths):
        near = logits[first : first + length] + 0.7 * torch.randn(length, VOCAB, generator=generator)
        q[row, :length] = near.softmax(dim=-1)
        if length:
            draft.token_ids[row, :length] = q[row, :length].multinomial(1, generator=generator)[:, 0]
        first += length + 1
    if with_probs:
        draft.draft_probs = q.to(DEVICE)
    return logits.to(DEVICE), draft, sequences, requests
