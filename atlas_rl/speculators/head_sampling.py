"""How a call's sampling parameters reach the kernel that drafts with the recurrent head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atlas_kernels.draft_head import HeadDraft, draft_head
from atlas_kernels.head_call import DraftHeadWeights
from atlas_kernels.noise import Stream
from atlas_kernels.truncation import Truncation
from atlas_rl.core import SamplingParams


@dataclass(frozen=True, slots=True)
class HeadSampling:
    """How the head's tokens are drawn: arguments of `atlas_kernels.draft_head.draft_head`.

    Attributes:
        temperature: At least 0; 0 takes the likeliest token.
        truncation: Which tokens are drawn; None for all.
        stream: The noise stream.
        with_probs: Whether the distributions are returned.
    """

    temperature: float
    truncation: Truncation | None
    stream: Stream
    with_probs: bool

    @staticmethod
    def of(sampling: SamplingParams, *, couples_noise: bool) -> HeadSampling:
        """The head's part of a call's sampling parameters.

        A repetition penalty is left out: it would need the whole prefix in the reduced vocabulary.
        """
        return HeadSampling(
            temperature=sampling.temperature,
            truncation=sampling.truncation if sampling.truncates else None,
            stream=Stream.TARGET if couples_noise else Stream.DRAFT,
            with_probs=not couples_noise,
        )

    def draw(
        self,
        weights: DraftHeadWeights,
        state: torch.Tensor,
        newest: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        num_tokens: int,
    ) -> HeadDraft:
        """Draw `num_tokens` tokens for every row; arguments as in `draft_head`. Nothing waits for the device."""
        return draft_head(
            weights,
            state,
            newest,
            keys,
            positions,
            num_tokens,
            temperature=self.temperature,
            truncation=self.truncation,
            stream=self.stream,
            with_probs=self.with_probs,
        )
