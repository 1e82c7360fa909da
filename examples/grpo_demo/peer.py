"""Times TRL's own generation by transformers over prompts and tokens that the engine generated before."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOTrainer


@dataclass(frozen=True)
class Generation:
    """One training step's rollouts: prompts as in the dataset, one per completion, and token ids."""

    step: int
    prompts: list[Any]
    completion_ids: list[list[int]]


class KeepsGenerations:
    """A reward function that records its input by training step and delegates to another one."""

    def __init__(self, reward_func: Any) -> None:
        self.__name__ = reward_func.__name__  # TRL's name for it in its logs
        self._reward_func = reward_func
        self.kept: dict[int, Generation] = {}

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], trainer_state: Any, **columns: Any) -> Any:
        step = int(trainer_state.global_step)
        self.kept.setdefault(step, Generation(step, list(prompts), [list(row) for row in completion_ids]))
        return self._reward_func(**columns)


def time_trl(trainer: GRPOTrainer, generation: Generation) -> float:
    """Seconds that TRL's own generation takes for the same prompts and, token by token, the same completions."""
    prompt_ids, _, _ = trainer._tokenize_prompts(generation.prompts)
    was_attached, trainer.use_vllm = trainer.use_vllm, False  # bypasses the attached engine
    try:
        with _forced(trainer.model, generation.completion_ids):
            began = time.perf_counter()
            found, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
            seconds = time.perf_counter() - began
    finally:
        trainer.use_vllm = was_attached
    if [list(row) for row in found] != generation.completion_ids:
        raise RuntimeError("TRL's generation did not give the tokens that it was told to")
    return seconds


@contextmanager
def _forced(model: Any, completion_ids: Sequence[list[int]]) -> Iterator[None]:
    """Context in which `model.generate` draws these tokens: sampling runs as usual, only the scores are overwritten."""
    processors = LogitsProcessorList([_Forced(completion_ids)])
    model.generate = functools.partial(model.generate, logits_processor=processors)
    try:
        yield
    finally:
        del model.generate


class _Forced(LogitsProcessor):
    def __init__(self, completion_ids: Sequence[list[int]]) -> None:
        self._completion_ids = completion_ids
        self._drawn = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Overwrite `scores` [batch, vocabulary] so that one token per row is left."""
        tokens = [row[min(self._drawn, len(row) - 1)] for row in self._completion_ids]
        self._drawn += 1
        scores = torch.full_like(scores, -torch.inf)
        return scores.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)
