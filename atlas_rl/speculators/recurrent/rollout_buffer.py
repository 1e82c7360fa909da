"""Keeps hidden states and tokens of the newest rollouts as training data; verification computed them anyway."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_HALVED_AFTER_UPDATES = 4.0


@dataclass(slots=True)
class Windows:
    """Training examples: the head's input at a position, and the policy's next tokens.

    Attributes:
        hidden: `[n, 1 + unroll, hidden]`: what the newest token was drawn from, then what each following one was.
        token_ids: int64 `[n, 1 + unroll]`: the newest token, then the following ones.
        valid: bool `[n, unroll]`: whether the following tokens exist.
    """

    hidden: torch.Tensor
    token_ids: np.ndarray
    valid: np.ndarray


class RolloutBuffer:
    """Bounded ring of rollouts; the oldest are dropped first.

    Args:
        max_tokens: Most tokens kept.
        missed_weight: Of a window whose first prediction the head got wrong when it drafted there; others weigh 1.
    """

    def __init__(self, max_tokens: int, missed_weight: float = 1.0) -> None:
        self._max_tokens, self._missed_weight = max_tokens, missed_weight
        self._sizes: list[int] = []  # tokens of each call, the oldest first
        self._hidden = torch.zeros(0, 0, dtype=torch.float16)  # [tokens, hidden]
        self._tokens = np.zeros(0, np.int64)
        self._left = np.zeros(0, np.int64)  # tokens of the rollout that follow each one
        self._versions = np.zeros(0, np.int64)
        self._weights = np.zeros(0)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(
        self,
        requests: np.ndarray,
        positions: np.ndarray,
        tokens: np.ndarray,
        hidden: torch.Tensor,
        missed: np.ndarray,
        version: int,
    ) -> None:
        """Add the tokens of one call.

        Args:
            requests: int64 `[n]`, whose token each is, in any order.
            positions: int64 `[n]`, where it stands.
            tokens: int64 `[n]`.
            hidden: float16 `[n, hidden]`, what each token was drawn from.
            missed: bool `[n]`, whether the head had drafted another token there, all before it being right.
            version: Of the policy.
        """
        order = np.lexsort((positions, requests))
        requests, tokens = requests[order], tokens[order]
        last = np.flatnonzero(np.append(requests[1:] != requests[:-1], True))
        left = last[np.searchsorted(last, np.arange(len(requests)))] - np.arange(len(requests))
        # A window starts at the token before the one that it predicts first.
        weights = np.where(np.append(missed[order][1:], False), self._missed_weight, 1.0) * (left > 0)
        self._sizes.append(len(tokens))
        dropped = 0
        while sum(self._sizes) > self._max_tokens and len(self._sizes) > 1:
            dropped += self._sizes.pop(0)
        fresh = hidden[torch.from_numpy(order).to(hidden.device)]
        self._hidden = torch.cat([self._hidden[dropped:], fresh]) if len(self) > dropped else fresh
        self._tokens = np.concatenate([self._tokens[dropped:], tokens])
        self._left = np.concatenate([self._left[dropped:], left])
        self._versions = np.concatenate([self._versions[dropped:], np.full(len(tokens), version)])
        self._weights = np.concatenate([self._weights[dropped:], weights])

    def move_to(self, device: torch.device) -> None:
        """The policy has moved to another device, where its next states will be."""
        self._hidden = self._hidden.to(device)

    def sample(self, num_windows: int, unroll: int, version: int, rng: np.random.Generator) -> Windows:
        """Sample windows from the whole buffer, with more weight on recent policies and rejected drafts.

        The latter as in Draft-OPD: what the head knows already teaches it nothing.
        """
        age = version - self._versions
        cumulative = np.cumsum(self._weights * 0.5 ** (age / _HALVED_AFTER_UPDATES))
        starts = np.searchsorted(cumulative, rng.random(num_windows) * cumulative[-1], side="right")
        return self._windows(starts, unroll)

    def newest(self, num_windows: int, unroll: int, rng: np.random.Generator) -> Windows:
        """Windows of the newest call only, which show the present policy."""
        starts = np.flatnonzero(self._left[-self._sizes[-1] :] > 0) + len(self) - self._sizes[-1]
        return self._windows(rng.choice(starts, size=min(num_windows, len(starts)), replace=False), unroll)

    @property
    def has_windows(self) -> bool:
        """Whether the newest call has a usable rollout: one of two tokens or more."""
        return bool(self._sizes) and bool((self._left[-self._sizes[-1] :] > 0).any())

    def _windows(self, starts: np.ndarray, unroll: int) -> Windows:
        offsets = np.arange(unroll + 1)[None]
        valid = offsets <= self._left[starts][:, None]
        index = np.where(valid, starts[:, None] + offsets, starts[:, None])
        gathered = self._hidden[torch.from_numpy(index.reshape(-1)).to(self._hidden.device)]
        return Windows(gathered.view(*index.shape, -1), self._tokens[index], valid[:, 1:])
