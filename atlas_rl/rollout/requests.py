"""Turns a caller's prompts into `Sequences`, after checking all input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch

from atlas_kernels.noise import request_keys
from atlas_rl.checks import plain, reject_unknown, shown, whole
from atlas_rl.core import SamplingParams, Sequences, prompt_key
from atlas_rl.policy.base import roomy

OPTIONS = (
    "num_generations", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_ids",
    "seed",
)  # fmt: skip
"""Keywords of `generate`."""


class _Required:
    def __repr__(self) -> str:
        return "required"  # as help() shows it


REQUIRED: Any = _Required()
"""Default of a keyword that must be given: Python's own error for a missing one says nothing of a misspelled one."""

_NO_STOP_STRINGS = "stop strings are not supported, eos_token_ids=[...] ends a completion"
_ELSEWHERE = {
    "do_sample": "temperature=0 is greedy, and any other temperature samples",
    "max_tokens": "max_new_tokens",
    "n": "num_generations",
    "num_return_sequences": "num_generations",
    "stop": _NO_STOP_STRINGS,
    "stop_strings": _NO_STOP_STRINGS,
    "stop_token_ids": "eos_token_ids",
}
"""What transformers and vLLM call them, where the name is not near: our name, or what to do."""

_TOKENIZE = ": tokenize it, tokenizer([text])['input_ids']"


def build_sequences(
    prompts: Any,
    num_generations: Any,
    sampling: SamplingParams,
    vocab_size: int,
    max_context: int | None,
    policy_version: int,
) -> tuple[Sequences, np.ndarray]:
    """`Sequences` of `len(prompts) * num_generations` requests, with the maximum length of each.

    A request ends after `max_new_tokens`, or when the policy's context is full: after `max_context` tokens have been
    run and one more has been drawn from the last of them.

    Args:
        prompts: One prompt or several, each a flat list, array or tensor of token ids.
        num_generations: Completions per prompt.
        sampling: Sampling parameters.
        vocab_size: The policy's vocabulary.
        max_context: Longest sequence that the policy can be run on, in tokens; None without a limit.
        policy_version: Version of the policy.

    Returns:
        The sequences, and int64 `[num_requests]`, the maximum number of prompt and completion tokens of each.

    Raises:
        ValueError: There is no prompt, or one is empty, longer than the context, or has a token outside the vocabulary.
    """
    num_generations = whole("num_generations", num_generations, 1)
    prompts = _several(prompts)
    rows = [_checked(index, prompt, vocab_size, max_context) for index, prompt in enumerate(prompts)]
    for token in sampling.eos_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_ids has {token}, outside the vocabulary of {vocab_size} tokens")
    lengths = np.repeat(np.array([len(row) for row in rows], np.int64), num_generations)
    max_lengths = lengths + sampling.max_new_tokens
    if max_context is not None:
        max_lengths = np.minimum(max_lengths, max_context + 1)
    most = int(max_lengths.max())
    token_ids = np.zeros((len(lengths), roomy(int(lengths.max()), most)), np.int32)
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
        max_length=most,
    )
    return sequences, max_lengths


def check_names(unknown: Mapping[str, Any], max_new_tokens: Any) -> None:
    """Raise `ValueError` for keywords of `generate` that are not among `OPTIONS`, or if the required one is missing."""
    reject_unknown(unknown, OPTIONS, "generate()", elsewhere=_ELSEWHERE)
    if max_new_tokens is REQUIRED:
        raise ValueError("generate() needs max_new_tokens, the most tokens of a completion")


def _several(prompts: Any) -> list[Any]:
    """The prompts as a list. Refuses a single prompt, text and a tokenizer's output, and says what to pass instead."""
    if isinstance(prompts, Mapping | str | bytes) or not isinstance(prompts, Iterable):
        cure = _TOKENIZE if isinstance(prompts, str | bytes) else ""
        if isinstance(prompts, Mapping) and "input_ids" in prompts:
            cure = ": give its 'input_ids', without padding"
        raise ValueError(
            f"prompts must be lists of token ids, one per prompt, got {type(prompts).__name__} {shown(prompts)}{cure}"
        )
    given = [plain(prompt) for prompt in prompts]
    if not given:
        raise ValueError("prompts is empty: give at least one list of token ids")
    if all(isinstance(prompt, Integral) for prompt in given):
        raise ValueError(
            "prompts must be lists of token ids, one per prompt, got a flat list of token ids: a single prompt is "
            f"{shown([given])}"
        )
    return given


def _checked(index: int, prompt: Any, vocab_size: int, max_context: int | None) -> np.ndarray:
    if isinstance(prompt, str | bytes):
        raise ValueError(f"prompt {index} must be a flat list of token ids, got text {shown(prompt)}{_TOKENIZE}")
    try:
        row = np.asarray(prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(f"prompt {index} must be a flat list of token ids, got nested lists") from error
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(
            f"prompt {index} must be a flat list of token ids, got {shown(prompt)} ({type(prompt).__name__}, {row.dtype})"
        )
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
