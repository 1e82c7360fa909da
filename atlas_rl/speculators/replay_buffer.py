"""What verification computed anyway, kept for the drafter to learn from: hidden states and tokens of the newest rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_HALVED_AFTER_UPDATES = 4.0


@dataclass(slots=True)
class Windows:
    """Training examples: what the head would have seen at a position, and what the policy did next.

    Attributes:
        hidden: `[n, 1 + unroll, hidden]`: what the newest token was drawn from, then what each following one was.
        token_ids: int64 `[n, 1 + unroll]`: the newest token, then the following ones.
        valid: bool `[n, unroll]`: whether the following tokens exist.
    """

    hidden: torch.Tensor
    token_ids: np.ndarray
    valid: np.ndarray


class ReplayBuffer:
    """A bounded ring of rollouts, the oldest dropped first.

    Args:
        max_tokens: Most tokens kept.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._hidden: list[torch.Tensor] = []  # per call [tokens, hidden], float16
        self._tokens: list[np.ndarray] = []
        self._left: list[np.ndarray] = []  # tokens of the rollout that follow each position
        self._versions: list[int] = []

    def __len__(self) -> int:
        return sum(len(tokens) for tokens in self._tokens)

    def add(
        self, requests: np.ndarray, positions: np.ndarray, tokens: np.ndarray, hidden: torch.Tensor, version: int
    ) -> None:
        """Add the tokens of one call.

        Args:
            requests: int64 `[n]`, whose token each is, in any order.
            positions: int64 `[n]`, where it stands.
            tokens: int64 `[n]`.
            hidden: float16 `[n, hidden]`, what each token was drawn from.
            version: Of the policy.
        """
        order = np.lexsort((positions, requests))
        requests, tokens = requests[order], tokens[order]
        last = np.flatnonzero(np.append(requests[1:] != requests[:-1], True))
        left = last[np.searchsorted(last, np.arange(len(requests)))] - np.arange(len(requests))
        self._hidden.append(hidden[torch.from_numpy(order).to(hidden.device)])
        self._tokens.append(tokens)
        self._left.append(left)
        self._versions.append(version)
        while len(self) > self._max_tokens and len(self._tokens) > 1:
            for kept in (self._hidden, self._tokens, self._left, self._versions):
                kept.pop(0)

    def sample(self, num_windows: int, unroll: int, version: int, rng: np.random.Generator) -> Windows:
        """Windows from all over the buffer, rollouts of recent policies more often."""
        weights = [
            np.where(left > 0, 0.5 ** ((version - made_by) / _HALVED_AFTER_UPDATES), 0.0)
            for left, made_by in zip(self._left, self._versions, strict=True)
        ]
        cumulative = np.cumsum(np.concatenate(weights))
        starts = np.searchsorted(cumulative, rng.random(num_windows) * cumulative[-1], side="right")
        return self._windows(starts, unroll)

    def newest(self, num_windows: int, unroll: int, rng: np.random.Generator) -> Windows:
        """Windows of the newest call only: what the policy is like now."""
        offset = len(self) - len(self._tokens[-1])
        starts = np.flatnonzero(self._left[-1] > 0) + offset
        return self._windows(rng.choice(starts, size=min(num_windows, len(starts)), replace=False), unroll)

    @property
    def has_windows(self) -> bool:
        """Whether the newest call holds anything to learn from: a rollout of two tokens."""
        return bool(self._left) and bool((self._left[-1] > 0).any())

    def _windows(self, starts: np.ndarray, unroll: int) -> Windows:
        tokens, left = np.concatenate(self._tokens), np.concatenate(self._left)
        offsets = np.arange(unroll + 1)[None]
        valid = offsets <= left[starts][:, None]
        index = np.where(valid, starts[:, None] + offsets, starts[:, None])
        hidden = torch.cat(self._hidden) if len(self._hidden) > 1 else self._hidden[0]
        gathered = hidden[torch.from_numpy(index.reshape(-1)).to(hidden.device)].view(*index.shape, -1)
        return Windows(gathered, tokens[index], valid[:, 1:])
