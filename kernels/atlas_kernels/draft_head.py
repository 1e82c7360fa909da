"""Drafts k tokens with the recurrent head over a reduced vocabulary: states, logits, probabilities and draws.

The head is that of `atlas_rl.speculators.recurrent.head`, folded. Let s be the state, x the newest token, G the table
of each token's contribution to the gates, W and b the state's part of the gates, U and c the outputs over the reduced
vocabulary:

    r, z, n = G[x] + [W s + b],  n = tanh(n_in + r n_own)          a GRU step (Cho et al., arXiv 1406.1078)
    s       = n + z (s - n)
    l       = (U s / rms(s) + c) / T
    x       = argmax l - log E                                      E of `atlas_kernels.noise`, of the policy's token ids

A drafter coupled to the policy's noise draws with the same numbers as verification; an uncoupled one draws from its own
stream. Scores are float64 from float32 l and E, as in `verify`: the choice is that of the engine's CPU sampler, unless
the two best scores are closer than float32 resolves.

**Launches.** A token needs the whole state before its logits, and all logits before the next state. Small weights take
one launch: one program per 16 rows reads them at all k steps. Large weights are spread over the device, in two launches
per token and one at the end. Truncation needs a whole row before a token is drawn: five launches per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.draft_head_reference import draft_head_reference
from atlas_kernels.head_call import DraftHeadWeights, HeadCall
from atlas_kernels.noise import Stream
from atlas_kernels.truncation import Truncation


@dataclass(frozen=True, slots=True)
class HeadDraft:
    """Drafted tokens with their confidence and probabilities.

    Attributes:
        indices: int64 `[batch, num_tokens]`, drawn tokens as indices into the reduced vocabulary.
        confidence: float32 `[batch, num_tokens]`, probability of the likeliest token (at temperature 0: at temperature 1).
        probs: float32 `[batch, num_tokens, tokens]`, the distribution that each token was drawn from, one-hot at
            temperature 0; None unless `with_probs`.
    """

    indices: torch.Tensor
    confidence: torch.Tensor
    probs: torch.Tensor | None


def draft_head(
    weights: DraftHeadWeights,
    state: torch.Tensor,
    newest: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    stream: Stream = Stream.TARGET,
    with_probs: bool = False,
    truncation: Truncation | None = None,
    implementation: Implementation = "auto",
) -> HeadDraft:
    """Draft `num_tokens` tokens for every row. Does not read from the device.

    Args:
        weights: The head.
        state: float32 `[batch, size]`, before the newest token is absorbed; left unchanged.
        newest: int64 `[batch]`, index of the newest token in the reduced vocabulary; `tokens` for one outside.
        keys: int64 `[batch]`, the bits of the noise keys.
        positions: int64 `[batch]`, index in the whole sequence of the first drafted token.
        num_tokens: At least 1.
        temperature: `> 0`; 0 takes the likeliest token, the first of equals.
        stream: The noise stream to draw from: the policy's own, or the one of independent drafts.
        with_probs: Whether to return the distributions.
        truncation: Which tokens of the reduced vocabulary are drawn and counted; None for all. At temperature > 0 only.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    call = HeadCall(
        weights, state, newest, keys, positions, num_tokens, temperature, stream, with_probs, truncation
    ).checked()
    if use_triton(state, implementation):
        if truncation is not None:
            from atlas_kernels import truncated_head_triton

            return HeadDraft(*truncated_head_triton.draft_head_triton(call))
        from atlas_kernels.draft_head_triton import draft_head_triton

        return HeadDraft(*draft_head_triton(call))
    return HeadDraft(*draft_head_reference(call))
