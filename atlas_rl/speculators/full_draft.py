"""Drawing a draft token over the policy's whole vocabulary: what drafting language models have in common."""

from __future__ import annotations

import numpy as np
import torch

from atlas_rl.rollout.processing import process
from atlas_rl.rollout.verification import choose
from atlas_rl.speculators.base import Sequences


def draw(
    logits: torch.Tensor, sequences: Sequences, requests: np.ndarray, drafted: np.ndarray, *, couples_noise: bool
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """The next draft token of some requests, under the sampling parameters of the call.

    Args:
        logits: float32 `[batch, vocab]`; may be changed in place.
        sequences: All requests of the call.
        requests: int64 `[batch]`.
        drafted: int64 `[batch, position]`, the draft tokens before this one.
        couples_noise: Draw with the policy's own noise; otherwise independently.

    Returns:
        Tokens int64 `[batch]`, confidences float32 `[batch]`, and the distribution they were drawn from, float32
        `[batch, vocab]`. A confidence is the largest probability: a function of the prefix alone, for either verification.
    """
    sampling, prefixes = sequences.sampling, None
    if sampling.repetition_penalty != 1:
        prefixes = [
            torch.from_numpy(np.unique(np.append(sequences.token_ids[r, : sequences.lengths[r]], row)))
            .long()
            .to(logits.device)
            for r, row in zip(requests, drafted, strict=True)
        ]
    probs = process(logits, sampling, prefixes).softmax(dim=-1)
    stream, keys = sequences.draft_noise(requests, couples_noise)
    positions = sequences.lengths[requests] + drafted.shape[1]
    tokens = choose(probs, keys, positions, stream, sampling.greedy)
    confidence = probs.amax(dim=-1).cpu().numpy()
    if sampling.greedy:
        probs = torch.nn.functional.one_hot(torch.from_numpy(tokens).to(probs.device), probs.shape[1]).to(probs)
    return tokens, confidence, probs
