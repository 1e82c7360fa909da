"""Prompt lookup decoding (Saxena 2023; vLLM's `ngram`) as a speculator, for comparisons."""

from __future__ import annotations

import numpy as np

from atlas_rl.core import Draft, Prompts, Rollouts, Sequences, Verified
from atlas_rl.policy.base import PolicyCache
from atlas_rl.speculators.base import NO_PROMPTS, Speculator


class NgramSpeculator(Speculator):
    """Proposes the tokens after the latest earlier occurrence of the request's own last tokens.

    Args:
        longest: Number of last tokens to look for first.
        shortest: Fewest tokens that count as an occurrence.
    """

    name = "ngram"

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Do nothing: no preparation is needed."""

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Look up every request's last tokens in its own text."""
        found = [
            self._continuation(sequences.token_ids[request, : sequences.lengths[request]], int(most))
            for request, most in zip(requests, max_draft_tokens, strict=True)
        ]
        lengths = np.array([len(tokens) for tokens in found], np.int64)
        token_ids = np.zeros((len(found), int(lengths.max(initial=0))), np.int64)
        for row, tokens in enumerate(found):
            token_ids[row, : len(tokens)] = tokens
        return Draft(token_ids, lengths, np.full(token_ids.shape, 0.5, np.float32))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Do nothing: proposals depend on the text alone."""

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Do nothing: other requests are not used."""
        return None

    def _continuation(self, tokens: np.ndarray, most: int) -> np.ndarray:
        for size in self._sizes:
            if len(tokens) <= size:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
            ends = np.flatnonzero((windows == tokens[-size:]).all(axis=1)) + size
            if len(ends):
                return tokens[ends[-1] : ends[-1] + most]
        return tokens[:0]
