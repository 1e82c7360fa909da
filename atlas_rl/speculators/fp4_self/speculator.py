"""The FP4 self-draft: an NVFP4 copy of the policy drafts, the policy verifies. Static, but requantized from the policy.

Self-speculation with a quantized copy is known from QuantSpec (arXiv 2502.10424) and, in RL, from EfficientRollout
(arXiv 2606.18967); the format is NVFP4 (`copy.py`). The copy is made anew at every policy update: no training, no
checkpoint, and the committed tokens are the policy's own, in full precision.

**It drafts in the policy's own cache.** It attends to the keys and values that the policy itself computed for every
committed token. Its own, of drafted positions, go to cells that the next verification overwrites before it reads them.
So there is no second cache, no prompt to run, no catching up, and no error that builds up over a long text.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from atlas_rl.core import Draft, Needs, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.policy.base import PolicyCache, PolicyRunner, Segments
from atlas_rl.policy.upload import uploaded
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.drawing import Drawing, NonFiniteDraft
from atlas_rl.speculators.fp4_self.copy import FourBitCopy
from atlas_rl.speculators.warm_up import draw_from_logits

logger = logging.getLogger(__name__)


class Fp4SelfSpeculator(Speculator):
    """Drafts with a four-bit copy of the policy, under the sampling parameters of the call.

    Coupled to the policy's noise, each draft token is the one that the copy itself would commit at that position.
    Without coupling it is an independent draw from `Draft.draft_probs`.

    Args:
        quantize_head: Whether the LM head is quantized too; else it is the policy's own.
        quantize_embeddings: Whether the embedding table is quantized too: for measurements.

    Raises:
        ValueError: At `bind`: the policy has weights that do not belong to plain linear layers.
    """

    name = "fp4_self"
    needs = Needs(cache=True)

    def __init__(self, *, quantize_head: bool = True, quantize_embeddings: bool = False) -> None:
        self._options = {"quantize_head": quantize_head, "quantize_embeddings": quantize_embeddings}
        self._copy: FourBitCopy | None = None
        self._version: int | None = None  # policy version of the copy
        self._policy: PolicyView | None = None
        self._cache: PolicyCache | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Copy this policy from the next draft on."""
        super().bind(policy, couples_noise)
        if policy.model is None:
            raise ValueError("draft_model='fp4' copies the policy's own modules, which must run in this process")
        self._copy, self._version, self._policy = FourBitCopy(policy.model, **self._options), None, policy
        if policy.device.type == "cpu":
            logger.warning(
                "atlas_rl: on a CPU the four-bit copy of the policy is dequantized: it drafts at the policy's own price, "
                "which cannot pay. It is of use on GPUs"
            )

    def compile_for(self, sampling: SamplingParams) -> None:
        assert self._copy is not None, "compile_for() before bind()"
        assert self._policy is not None, "compile_for() before bind()"
        self._copy.compile_kernels()
        draw_from_logits(sampling, self._policy.vocab_size, self._policy.device, couples_noise=self._couples_noise)

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
        """Draft for every request, up to its wanted length or its first ending token."""
        depth = int(max_draft_tokens.max(initial=0))
        if depth <= 0:
            return Draft.empty(len(requests))
        copy, cache = self._current(sequences.policy_version), self._cache
        assert cache is not None, "propose() before start()"
        assert self._policy is not None, "propose() before bind()"
        rows, starts, runner = cache.rows_of(requests), sequences.lengths[requests] - 1, cache.runner
        newest = sequences.token_ids[requests, starts].astype(np.int64)
        unrunnable, device = runner.unrunnable(), self._policy.device
        drawing = Drawing(self.name, sequences, requests, max_draft_tokens, device, couples_noise=self._couples_noise)
        stand_ins = None  # token run in place of each token; drafts are cut after unrunnable ones
        if unrunnable is not None:
            stand_ins = uploaded(np.where(unrunnable, newest[0], np.arange(len(unrunnable))), device)
        tokens: np.ndarray | torch.Tensor = newest[drawing.rows[0]]
        with copy.running():
            for position, going in enumerate(drawing.rows):
                every = np.arange(len(going))
                first = starts[going]  # the position that the policy runs next
                segments = Segments(tokens, 0, first + position, np.ones_like(every), rows[going], settled=first)
                tokens = drawing.draw(runner.forward(segments, every))
                if stand_ins is not None:
                    tokens = stand_ins[tokens]
        try:
            return drawing.finish(max_draft_tokens, unrunnable)
        except NonFiniteDraft:
            self._clean(runner, newest, starts, max_draft_tokens, rows)
            raise

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Do nothing: the policy itself runs the committed tokens."""

    def release(self) -> None:
        """Forget the policy's cache. The copy stays: its size does not depend on the call."""
        self._cache = None

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Do nothing: weights are read at the next draft, when they are whole on every rank."""
        return None

    def _current(self, policy_version: int) -> FourBitCopy:
        """The copy, requantized if the policy version changed."""
        assert self._copy is not None, "propose() before bind()"
        if self._version != policy_version:
            self._copy.requantize()
            self._version = policy_version
        return self._copy

    def _clean(
        self, runner: PolicyRunner, newest: np.ndarray, starts: np.ndarray, depths: np.ndarray, rows: np.ndarray
    ) -> None:
        """Let the policy overwrite every cache cell that drafting wrote to; arrays are int64 `[batch]`.

        Otherwise non-finite values would reach the policy's own forward: a masked cell still contributes 0 * NaN.
        """
        drafted = depths > 0
        tokens, counts = np.repeat(newest[drafted], depths[drafted]), depths[drafted]
        first = starts[drafted]
        runner.forward(Segments(tokens, 0, first, counts, rows[drafted], settled=first), np.cumsum(counts) - 1)
