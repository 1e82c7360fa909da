"""The FP4 self-draft: an NVFP4 copy of the policy drafts, the policy verifies. The static arm that cannot go stale.

Self-speculation with a quantized copy is that of QuantSpec (arXiv 2502.10424) and, in RL, of EfficientRollout (arXiv
2606.18967); the format is NVFP4 (`fp4_copy.py`). The copy is made anew whenever the policy has moved: no training, no
checkpoint, and what is committed is the policy's own, in full precision.

**It drafts in the policy's own cache.** What it attends to are the keys and values that the policy itself computed for
every committed token; its own, of drafted positions, go to the cells that the next verification overwrites before it reads
them. So there is no second cache, no prompt to run, nothing to catch up with, and no error that builds up over a long text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlas_rl.core import Draft, Rollouts, Sequences, Verified
from atlas_rl.policy.base import Backend, Segments
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.drawing import draw_full
from atlas_rl.speculators.fp4_self.copy import FourBitCopy

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_CONFIDENCE = (0.01, 0.99)


class Fp4SelfSpeculator(Speculator):
    """Drafts with a four-bit copy of the policy, under the sampling parameters of the call.

    Coupled to the policy's noise each draft token is the one that the copy would commit itself at that position. Without
    coupling it is an independent draw, and `Draft.draft_probs` says from what.

    Args:
        quantize_head: Whether the LM head has four bits too, or is the policy's own.
        quantize_embeddings: Whether the embedding table has: for measurements.

    Raises:
        ValueError: At `bind`: the policy has weights that are not those of plain linear layers.
    """

    name = "fp4_self"

    def __init__(self, *, quantize_head: bool = True, quantize_embeddings: bool = False) -> None:
        self._options = {"quantize_head": quantize_head, "quantize_embeddings": quantize_embeddings}
        self._copy: FourBitCopy | None = None
        self._version: int | None = None  # of the policy that was copied
        self._backend: Backend | None = None
        self._rows_of: Callable[[np.ndarray], np.ndarray]

    def bind(self, policy: nn.Module) -> None:
        """Copy this policy from now on."""
        self._copy, self._version = FourBitCopy(policy, **self._options), None
        if next(policy.parameters()).device.type == "cpu":
            logger.warning(
                "atlas_rl: on a CPU the four-bit copy of the policy is dequantized: it drafts at the policy's own price, "
                "which cannot pay. It is of use on GPUs"
            )

    def share_cache(self, backend: Backend, rows_of: Callable[[np.ndarray], np.ndarray]) -> None:
        """Draft in the policy's cache."""
        self._backend, self._rows_of = backend, rows_of

    def start(self, sequences: Sequences, requests: np.ndarray) -> None:
        """Nothing: the policy has run the prompts."""

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request, each as far as it is wanted or to its first ending token."""
        depth = int(max_draft_tokens.max(initial=0))
        if depth <= 0:
            return Draft.empty(len(requests))
        copy, backend = self._current(sequences.policy_version), self._backend
        assert backend is not None, "propose() before share_cache()"
        rows, starts = self._rows_of(requests), sequences.lengths[requests] - 1
        newest = sequences.token_ids[requests, starts].astype(np.int64)
        draft = Draft(
            np.zeros((len(requests), depth), np.int64),
            np.zeros(len(requests), np.int64),
            np.full((len(requests), depth), 0.5, np.float32),
        )
        going = np.arange(len(requests))
        for position in range(depth):
            going = going[max_draft_tokens[going] > position]
            if not len(going):
                break
            one = np.ones(len(going), np.int64)
            with copy.running():
                segments = Segments(newest[going], 0, starts[going] + position, one, rows[going])
                logits = backend.forward(segments, np.arange(len(going)))
            drafted = draft.token_ids[going, :position]
            newest[going], confidence, q = draw_full(
                logits, sequences, requests[going], drafted, couples_noise=self.couples_noise
            )
            self._append(draft, going, position, newest[going], confidence, q)
            going = going[~sequences.sampling.ends(newest[going])]
        return draft

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Nothing: the policy has run what was committed."""

    def refresh(self, rollouts: Rollouts, policy_version: int) -> None:
        """Nothing yet: weights are read when the next draft is wanted, when they are whole on every rank."""

    def _current(self, policy_version: int) -> FourBitCopy:
        """The copy, of the policy as it is now."""
        assert self._copy is not None, "propose() before bind()"
        if self._version != policy_version:
            self._copy.requantize()
            self._version = policy_version
        return self._copy

    def _append(
        self,
        draft: Draft,
        going: np.ndarray,
        position: int,
        tokens: np.ndarray,
        confidence: np.ndarray,
        q: torch.Tensor,
    ) -> None:
        draft.token_ids[going, position] = tokens
        draft.confidence[going, position] = confidence.clip(*_CONFIDENCE)
        draft.lengths[going] += 1
        if not self.couples_noise:
            if draft.draft_probs is None:
                draft.draft_probs = q.new_zeros(*draft.token_ids.shape, q.shape[1])
            draft.draft_probs[torch.from_numpy(going).to(q.device), position] = q
