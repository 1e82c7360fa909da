"""Keeps hidden states and tokens of the newest rollouts as training data; verification computed them anyway."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from atlas_rl.speculators.recency import recency

_HELD_OUT = 8  # one in so many rollouts of the newest call


@dataclass(slots=True)
class Windows:
    """Training examples: the head's input at a position, and the policy's next tokens.

    Attributes:
        hidden: `[n, 1 + unroll, hidden]`: hidden states from which the newest token and each following one were drawn.
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
        missed_weight: Weight of a window whose first token the head drafted wrong; others weigh 1.
    """

    def __init__(self, max_tokens: int, missed_weight: float = 1.0) -> None:
        self._max_tokens, self._missed_weight = max_tokens, missed_weight
        self._sizes: list[int] = []  # tokens of each call, oldest first
        self._hidden = torch.zeros(0, 0, dtype=torch.float16, device="cpu")  # [tokens, hidden]
        self._tokens = np.zeros(0, np.int64)
        self._left = np.zeros(0, np.int64)  # following tokens in the same rollout
        self._versions = np.zeros(0, np.int64)
        self._weights = np.zeros(0)
        self._held = slice(0, 0)  # tokens of rollouts that are not sampled

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
            requests: int64 `[n]`, request of each token, in any order.
            positions: int64 `[n]`, position of each token.
            tokens: int64 `[n]`.
            hidden: float16 `[n, hidden]`, hidden state that each token was drawn from.
            missed: bool `[n]`, whether the head drafted another token there after a correct prefix.
            version: Policy version.
        """
        order = np.lexsort((positions, requests))
        requests, tokens = requests[order], tokens[order]
        last = np.flatnonzero(np.append(requests[1:] != requests[:-1], True))
        left = last[np.searchsorted(last, np.arange(len(requests)))] - np.arange(len(requests))
        # A window starts one token before the first one that it predicts.
        weights = np.where(np.append(missed[order][1:], False), self._missed_weight, 1.0) * (left > 0)
        sizes, dropped = [*self._sizes, len(tokens)], 0
        while sum(sizes) > self._max_tokens and len(sizes) > 1:
            dropped += sizes.pop(0)
        fresh = hidden[torch.from_numpy(order).to(hidden.device)]
        self._hidden = torch.cat([self._hidden[dropped:], fresh]) if len(self) > dropped else fresh
        self._sizes = sizes  # not before: the device's memory may have run out
        self._tokens = np.concatenate([self._tokens[dropped:], tokens])
        self._left = np.concatenate([self._left[dropped:], left])
        self._versions = np.concatenate([self._versions[dropped:], np.full(len(tokens), version)])
        self._weights = np.concatenate([self._weights[dropped:], weights])
        self.release()

    def hold_out(self, num_windows: int, unroll: int, rng: np.random.Generator) -> Windows | None:
        """Windows of rollouts of the newest call that `sample` leaves out from now on, until `release` or the next call.

        They are an eighth of its rollouts, the last ones: neighbours, which mostly share prompts of their own.

        Returns:
            The windows; None if there would be none, or none to learn from.
        """
        self.release()
        ends = np.flatnonzero(self._left == 0)
        rollouts = ends[ends >= len(self) - self._sizes[-1]]
        held = -(-len(rollouts) // _HELD_OUT)
        if len(rollouts) <= held:
            return None
        first = int(rollouts[-held - 1]) + 1
        starts = np.flatnonzero(self._left[first:] > 0) + first
        if not len(starts) or not self._weights[:first].any():
            return None
        self._held = slice(first, len(self))
        return self._windows(rng.choice(starts, size=min(num_windows, len(starts)), replace=False), unroll)

    def release(self) -> None:
        """Sample from all rollouts again."""
        self._held = slice(0, 0)

    def move_to(self, device: torch.device) -> None:
        """Move to the policy's new device, where its next states will be."""
        self._hidden = self._hidden.to(device)

    def sample(self, num_windows: int, unroll: int, version: int, rng: np.random.Generator) -> Windows:
        """Sample windows from the whole buffer, with more weight on recent policies and rejected drafts.

        Rejected drafts get more weight as in Draft-OPD: positions that the head predicts well teach it nothing.
        """
        weights = self._weights * recency(version - self._versions)
        weights[self._held] = 0.0
        cumulative = np.cumsum(weights)
        starts = np.searchsorted(cumulative, rng.random(num_windows) * cumulative[-1], side="right")
        return self._windows(starts, unroll)

    def newest(self, num_windows: int, unroll: int, rng: np.random.Generator) -> Windows:
        """Windows of the newest call only, which show the present policy."""
        starts = np.flatnonzero(self._left[-self._sizes[-1] :] > 0) + len(self) - self._sizes[-1]
        return self._windows(rng.choice(starts, size=min(num_windows, len(starts)), replace=False), unroll)

    @property
    def has_windows(self) -> bool:
        """Whether the newest call has a usable rollout: one of at least two tokens."""
        return bool(self._sizes) and bool((self._left[-self._sizes[-1] :] > 0).any())

    def _windows(self, starts: np.ndarray, unroll: int) -> Windows:
        offsets = np.arange(unroll + 1)[None]
        valid = offsets <= self._left[starts][:, None]
        index = np.where(valid, starts[:, None] + offsets, starts[:, None])
        gathered = self._hidden[torch.from_numpy(index.reshape(-1)).to(self._hidden.device)]
        return Windows(gathered.view(*index.shape, -1), self._tokens[index], valid[:, 1:])
