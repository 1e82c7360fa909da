"""From a caller's prompts to `Sequences`: checks everything that can be wrong before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch

from atlas_kernels.noise import request_keys
from atlas_rl.core import SamplingParams, Sequences, prompt_key


def build_sequences(
    prompts: Any,
    num_generations: Any,
    sampling: SamplingParams,
    vocab_size: int,
    max_context: int | None,
    policy_version: int,
) -> tuple[Sequences, np.ndarray]:
    """Sequences of `len(prompts) * num_generations` requests, and the length at which each must end.

    A request ends after `max_new_tokens`, or when the policy's context is full: `max_context` tokens have been run, and
    one more drawn from the last of them.

    Args:
        prompts: One or several, each a flat list, array or tensor of token ids.
        num_generations: Completions per prompt.
        sampling: Sampling parameters.
        vocab_size: The policy's.
        max_context: Longest sequence that the policy can be run over, tokens; None without a limit.
        policy_version: Of the policy.

    Returns:
        The sequences, and int64 `[num_requests]` prompt plus completion tokens at most.

    Raises:
        ValueError: No prompts, an empty one, one longer than the context, a token outside the vocabulary.
    """
    if not isinstance(num_generations, Integral) or num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, and whole, got {num_generations}")
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be lists of token ids, one per prompt, got {type(prompts).__name__}")
    prompts, num_generations = list(prompts), int(num_generations)
    if not prompts:
        raise ValueError("prompts is empty: give at least one list of token ids")
    rows = [_checked(index, prompt, vocab_size, max_context) for index, prompt in enumerate(prompts)]
    for token in sampling.eos_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_ids has {token}, outside the vocabulary of {vocab_size} tokens")
    lengths = np.repeat(np.array([len(row) for row in rows], np.int64), num_generations)
    limits = lengths + sampling.max_new_tokens
    if max_context is not None:
        limits = np.minimum(limits, max_context + 1)
    token_ids = np.zeros((len(lengths), int(limits.max())), np.int32)
    for index, row in enumerate(rows):
        token_ids[index * num_generations : (index + 1) * num_generations, : len(row)] = row
    keys = np.repeat(np.array([prompt_key(row) for row in rows], np.int64), num_generations)
    sequences = Sequences(
        token_ids=token_ids,
        lengths=lengths.copy(),
        prompt_lengths=lengths,
        prompt_keys=keys,
        noise_keys=request_keys(sampling.seed, len(lengths)),
        sampling=sampling,
        vocab_size=vocab_size,
        policy_version=policy_version,
    )
    return sequences, limits


def _checked(index: int, prompt: Any, vocab_size: int, max_context: int | None) -> np.ndarray:
    try:
        row = np.asarray(prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt)
    except ValueError as error:  # lists of different lengths within the prompt
        raise ValueError(f"prompt {index} must be a flat list of token ids, got nested lists") from error
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(f"prompt {index} must be a flat list of token ids, got {type(prompt).__name__} {row.dtype}")
    if row.size == 0:
        raise ValueError(f"prompt {index} is empty: a prompt needs at least one token (the BOS token, say)")
    if row.min() < 0 or row.max() >= vocab_size:
        bad = int(row[(row < 0) | (row >= vocab_size)][0])
        raise ValueError(f"prompt {index} has token {bad}, outside the policy's vocabulary of {vocab_size} tokens")
    if max_context is not None and row.size > max_context:
        raise ValueError(
            f"prompt {index} has {row.size} tokens, more than the policy's context of {max_context}: shorten it"
        )
    return row.astype(np.int32)
