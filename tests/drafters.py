"""Drafters and controllers that tests plug into the real engine: reckless, cheating, or learning on a clock that ticks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from atlas_rl.controller.base import Admission, Step
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Draft, Prompts, Rollouts, Sequences, Verified
from atlas_rl.policy.base import PolicyCache
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator


class Stateless(Speculator):
    """A speculator without state."""

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Nothing to prepare."""

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Nothing to learn."""

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Nothing to refresh."""
        return None


class RandomDrafter(Stateless):
    """Drafts independent tokens: one-hot, or with the probabilities they were drawn from."""

    name = "random"

    def __init__(self, *, with_probs: bool = False) -> None:
        self.with_probs = with_probs
        self.rng = np.random.default_rng(0)

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        batch, width, vocab = len(requests), int(max_draft_tokens.max(initial=0)), sequences.vocab_size
        if width == 0:
            return Draft.empty(batch)
        probs = self.rng.dirichlet(np.full(vocab, 0.7), size=(batch, width)).astype(np.float32)
        gumbel = self.rng.gumbel(size=probs.shape)
        tokens = (np.log(probs) + gumbel).argmax(axis=-1)
        confidence = np.full((batch, width), 0.5, np.float32)
        return Draft(tokens, max_draft_tokens, confidence, torch.from_numpy(probs) if self.with_probs else None)


class Parrot(Stateless):
    """Drafts a known continuation, right except at random places: exercises every accepted length."""

    name = "parrot"

    def __init__(self, completions: list[list[int]], *, error_rate: float) -> None:
        self.completions = completions
        self.error_rate = error_rate
        self.rng = np.random.default_rng(0)

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        width = int(max_draft_tokens.max(initial=0))
        tokens = np.zeros((len(requests), width), np.int64)
        lengths = np.zeros(len(requests), np.int64)
        for row, request in enumerate(requests):
            done = int(sequences.lengths[request] - sequences.prompt_lengths[request])
            known = self.completions[request][done : done + int(max_draft_tokens[row])]
            lengths[row] = len(known)
            tokens[row, : len(known)] = known
        wrong = self.rng.random(tokens.shape) < self.error_rate
        tokens[wrong] = self.rng.integers(sequences.vocab_size, size=int(wrong.sum()))
        return Draft(tokens, lengths, np.full(tokens.shape, 0.5, np.float32))


class Interposing(Parrot):
    """Knows the completions, but for one token at some places. With `probs` it says that it drew them."""

    def __init__(self, completions: list[list[int]], token: int, *, share: float, probs: bool = False) -> None:
        super().__init__(completions, error_rate=0.0)
        self.token, self.share, self.probs = token, share, probs

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        draft = super().propose(sequences, requests, max_draft_tokens)
        draft.token_ids[self.rng.random(draft.token_ids.shape) < self.share] = self.token
        if self.probs:
            draft.draft_probs = torch.nn.functional.one_hot(
                torch.from_numpy(draft.token_ids), sequences.vocab_size
            ).float()
        return draft


class Recalled(Stateless):
    """Drafts how a known text of the same prompt continues, for engines that number requests; some drafts end wrong.

    Args:
        texts: Prompt and completion of every known text.
        longest: Tokens of every draft.
    """

    name = "recalled"

    def __init__(self, texts: Iterable[tuple[list[int], list[int]]], longest: int) -> None:
        self.texts, self.longest = [(list(prompt), list(completion)) for prompt, completion in texts], longest
        self.rng = np.random.default_rng(0)

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        tokens = self.rng.integers(0, sequences.vocab_size, (len(requests), self.longest))
        lengths = np.full(len(requests), self.longest)
        for row, request in enumerate(requests):
            coming = self._coming(sequences.prompt(request), sequences.completion(request))
            right = coming[: self.rng.integers(0, self.longest, endpoint=True)]
            tokens[row, : len(right)] = right
            if self.rng.random() < 0.5:  # all right: the forward's last token comes after it
                lengths[row] = len(right)
        return Draft(tokens, np.minimum(max_draft_tokens, lengths), np.full(tokens.shape, 0.5, np.float32))

    def _coming(self, prompt: list[int], done: list[int]) -> list[int]:
        for known, completion in self.texts:
            if known == prompt and completion[: len(done)] == done:
                return completion[len(done) : len(done) + self.longest]
        return []


class TrimByDrawnToken(FixedController):
    """Cheats: cuts each draft before the first token with an odd id, so that what is verified depends on the draw."""

    def admit(self, step: Step) -> Admission:
        admission = super().admit(step)
        draft = step.drafts[self._drafter]
        if draft.token_ids.shape[1] == 0:
            return admission
        odd = (draft.token_ids % 2 == 1) & (np.arange(draft.token_ids.shape[1])[None] < draft.lengths[:, None])
        first_odd = np.where(odd.any(axis=1), odd.argmax(axis=1), draft.lengths)
        return Admission(admission.drafters, np.minimum(admission.lengths, first_odd))


def ticking(step_s: float = 1e-6) -> Callable[[], float]:
    """A clock that advances whenever it is read: a budget of training is then the same on every machine."""
    return itertools.count(step=step_s).__next__


def recurrent_drafter(**options: Any) -> RecurrentSpeculator:
    """A recurrent speculator that trains for about 40 steps after every policy update."""
    return RecurrentSpeculator(**{"clock": ticking(), "budget_share": 40.0} | options)
