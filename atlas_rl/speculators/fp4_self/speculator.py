"""The FP4 self-draft: an NVFP4 copy of the policy drafts, the policy verifies. A static speculator that cannot go stale.

Self-speculation with a quantized copy is that of QuantSpec (arXiv 2502.10424) and, in RL, of EfficientRollout (arXiv
2606.18967); the format is NVFP4 (`copy.py`). The copy is made anew whenever the policy has moved: no training, no
checkpoint, and what is committed is the policy's own, in full precision.

**It drafts in the policy's own cache.** What it attends to are the keys and values that the policy itself computed for
every committed token; its own, of drafted positions, go to the cells that the next verification overwrites before it reads
them. So there is no second cache, no prompt to run, nothing to catch up with, and no error that builds up over a long text.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from atlas_rl.core import Draft, Needs, Prompts, Rollouts, Sequences, Verified
from atlas_rl.policy.base import PolicyCache, Segments
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.drawing import draw_full
from atlas_rl.speculators.fp4_self.copy import FourBitCopy

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
    needs = Needs(cache=True)

    def __init__(self, *, quantize_head: bool = True, quantize_embeddings: bool = False) -> None:
        self._options = {"quantize_head": quantize_head, "quantize_embeddings": quantize_embeddings}
        self._copy: FourBitCopy | None = None
        self._version: int | None = None  # of the policy that was copied
        self._cache: PolicyCache | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Copy this policy from now on."""
        super().bind(policy, couples_noise)
        if policy.model is None:
            raise ValueError("draft_model='fp4' copies the policy's own modules, which must run in this process")
        self._copy, self._version = FourBitCopy(policy.model, **self._options), None
        if policy.device.type == "cpu":
            logger.warning(
                "atlas_rl: on a CPU the four-bit copy of the policy is dequantized: it drafts at the policy's own price, "
                "which cannot pay. It is of use on GPUs"
            )

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Draft in the policy's cache; the policy has run the prompts."""
        assert cache is not None, "needs the policy's cache"
        self._cache = cache

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request, each as far as it is wanted or to its first ending token."""
        depth = int(max_draft_tokens.max(initial=0))
        if depth <= 0:
            return Draft.empty(len(requests))
        copy, cache = self._current(sequences.policy_version), self._cache
        assert cache is not None, "propose() before start()"
        rows, starts = cache.rows_of(requests), sequences.lengths[requests] - 1
        newest = sequences.token_ids[requests, starts].astype(np.int64)
        draft = Draft(
            np.zeros((len(requests), depth), np.int64),
            np.zeros(len(requests), np.int64),
            np.full((len(requests), depth), 0.5, np.float32),
        )
        going, unrunnable = np.arange(len(requests)), cache.runner.unrunnable()
        for position in range(depth):
            going = going[max_draft_tokens[going] > position]
            if not len(going):
                break
            one = np.ones(len(going), np.int64)
            with copy.running():
                segments = Segments(newest[going], 0, starts[going] + position, one, rows[going])
                logits = cache.runner.forward(segments, np.arange(len(going)))
            drafted = draft.token_ids[going, :position]
            newest[going], confidence, q = draw_full(
                self.name, logits, sequences, requests[going], drafted, couples_noise=self._couples_noise
            )
            self._append(draft, going, position, newest[going], confidence, q)
            going = going[~sequences.sampling.ends(newest[going])]
            if unrunnable is not None:
                going = going[~unrunnable[newest[going]]]
        return draft

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Do nothing: the policy has run what was committed."""

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Let go of the call's cache. Weights are read when the next draft is wanted, when they are whole on every rank."""
        self._cache = None
        return None

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
        if not self._couples_noise:
            if draft.draft_probs is None:
                draft.draft_probs = q.new_zeros(*draft.token_ids.shape, q.shape[1])
            draft.draft_probs[torch.from_numpy(going).to(q.device), position] = q
