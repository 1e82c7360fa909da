"""Draws one token per row of logits with the noise of `atlas_kernels.noise`, as drafters do at every position.

    choice = argmax_x l(x) - log E(x)          l = logits / T

It is `verify` without drafts: from the same logits under the same noise, both make the same choice. So a drafter that
draws from `Stream.TARGET` is accepted wherever its logits lead to the policy's choice. Over a reduced vocabulary the
noise is that of the policy's own token ids. They do not fill noise blocks, so every token takes two Philox blocks
there, as in `draft_head`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.draw_call import DrawCall
from atlas_kernels.draw_reference import draw_reference
from atlas_kernels.noise import Stream


@dataclass(frozen=True, slots=True)
class RowDraws:
    """The token that every row draws.

    Attributes:
        indices: int64 `[rows]`, columns of the logits.
        max_probs: float32 `[rows]`, probability of the likeliest token; NaN for a row that is no distribution, whose
            index is meaningless.
    """

    indices: torch.Tensor
    max_probs: torch.Tensor


def draw(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float = 1.0,
    stream: Stream = Stream.TARGET,
    token_ids: torch.Tensor | None = None,
    implementation: Implementation = "auto",
) -> RowDraws:
    """Draw one token per row. Does not read from the device.

    Args:
        logits: float32, bfloat16 or float16 `[rows, tokens]`; `-inf` for excluded tokens. Left unchanged.
        keys: int64 `[rows]`, the bits of the noise keys (`request_keys(seed, ...)`, or `draft_keys` of them).
        positions: int64 `[rows]`, index in the whole sequence of the drawn token.
        temperature: `> 0`; 0 takes the likeliest token, the first of equals, and gives `max_probs` at temperature 1.
        stream: The noise stream to draw from: the policy's own, or the one of independent drafts.
        token_ids: int64 `[tokens]`, distinct ids in the policy's vocabulary of the columns of `logits`; None if the
            columns are the vocabulary in order.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    call = DrawCall(logits, keys, positions, temperature, stream, token_ids).checked()
    if use_triton(logits, implementation):
        from atlas_kernels.draw_triton import draw_triton

        return RowDraws(*draw_triton(call))
    return RowDraws(*draw_reference(call))
