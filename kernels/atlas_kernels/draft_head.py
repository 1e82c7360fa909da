"""The recurrent head drafting k tokens over a reduced vocabulary: state, logits, probabilities and draws.

The head is that of `atlas_rl.speculators.recurrent.head`, folded: with s the state, x the newest token, G what a token adds
to the gates (a table), W and b the state's own, U and c the outputs over the reduced vocabulary,

    r, z, n = G[x] + [W s + b],  n = tanh(n_in + r n_own)          a GRU step (Cho et al., arXiv 1406.1078)
    s       = n + z (s - n)
    l       = (U s / rms(s) + c) / T
    x       = argmax l - log E                                      E of `atlas_kernels.noise`, of the policy's token ids

so that a drafter coupled to the policy's noise draws with the very numbers that verification will use, and an uncoupled one
from a stream of its own. Scores are float64 from float32 l and E, as in `verify`: the same token as the engine's CPU sampler
unless the two best scores are closer than float32 resolves.

**Launches.** A token needs the whole state before its logits, and all logits before the next state. Small weights are read
by one program per 16 rows, which takes all k steps by itself: one launch. Large ones are spread over the device, two
launches per token and one at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atlas_kernels.dispatch import Implementation, use_triton
from atlas_kernels.draft_head_reference import draft_head_reference
from atlas_kernels.noise import Stream

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class DraftHeadWeights:
    """A folded head; products with the state are of this type's numbers, sums and all else float32.

    Attributes:
        input_gates: float32, bfloat16 or float16 `[tokens + 1, 3 * size]`: what a token adds to reset, update and new
            gates; the last row is that of every token outside of the reduced vocabulary.
        state_gates: Same type `[3 * size, size]`.
        state_bias: Same type `[3 * size]`.
        outputs: Same type `[tokens, size]`.
        bias: Same type `[tokens]`.
        token_ids: int64 `[tokens]`, distinct ids in the policy's vocabulary.
    """

    input_gates: torch.Tensor
    state_gates: torch.Tensor
    state_bias: torch.Tensor
    outputs: torch.Tensor
    bias: torch.Tensor
    token_ids: torch.Tensor

    def __post_init__(self) -> None:
        tokens, size = self.outputs.shape
        shapes = {
            "input_gates": (tokens + 1, 3 * size),
            "state_gates": (3 * size, size),
            "state_bias": (3 * size,),
            "outputs": (tokens, size),
            "bias": (tokens,),
            "token_ids": (tokens,),
        }
        if not tokens or not size or self.outputs.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                "outputs must be float32, bfloat16 or float16 [tokens, size], not empty, "
                f"got {self.outputs.dtype} {list(self.outputs.shape)}"
            )
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            dtype = torch.int64 if name == "token_ids" else self.outputs.dtype
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self.outputs.device:
                raise ValueError(
                    f"{name} must be {dtype} {list(shape)} on {self.outputs.device}, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )

    @property
    def num_bytes(self) -> int:
        """Bytes that one drafted token reads, a row of the table aside."""
        return sum(tensor.nbytes for tensor in (self.state_gates, self.state_bias, self.outputs, self.bias))


@dataclass(frozen=True, slots=True)
class HeadCall:
    """What is asked of the head; the attributes are the arguments of `draft_head`."""

    weights: DraftHeadWeights
    state: torch.Tensor
    newest: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    num_tokens: int
    temperature: float
    stream: Stream
    with_probs: bool

    def checked(self) -> HeadCall:
        """Itself, unless it raises a `ValueError`: a shape, type, device or number does not fit."""
        batch, size, device = len(self.newest), self.weights.outputs.shape[1], self.weights.outputs.device
        per_row = {"newest": self.newest, "keys": self.keys, "positions": self.positions}
        for name, tensor in per_row.items():
            if tensor.shape != (batch,) or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 [{batch}], one per row, got {tensor.dtype} {list(tensor.shape)}"
                )
        state = self.state
        if state.shape != (batch, size) or state.dtype != torch.float32:
            raise ValueError(f"state must be float32 [{batch}, {size}], got {state.dtype} {list(state.shape)}")
        for name, tensor in (per_row | {"state": state}).items():
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device} and the weights on {device}: move them together")
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature}")
        return self


@dataclass(frozen=True, slots=True)
class HeadDraft:
    """What the head drafted.

    Attributes:
        indices: int64 `[batch, num_tokens]`, drawn tokens as indices into the reduced vocabulary.
        confidence: float32 `[batch, num_tokens]`, probability of the likeliest token (at temperature 0: at temperature 1).
        probs: float32 `[batch, num_tokens, tokens]`, what each was drawn from, one-hot at temperature 0; None unless wanted.
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
    implementation: Implementation = "auto",
) -> HeadDraft:
    """Draft `num_tokens` tokens for every row. Reads nothing back from the device.

    Args:
        weights: The head.
        state: float32 `[batch, size]`, before the newest token is absorbed; left unchanged.
        newest: int64 `[batch]`, index of the newest token in the reduced vocabulary, `tokens` for one outside.
        keys: int64 `[batch]`, the bits of the noise keys.
        positions: int64 `[batch]`, index in the whole sequence of the first token that is drafted.
        num_tokens: At least 1.
        temperature: `> 0`; 0 takes the likeliest token, the first of equals.
        stream: The noise stream to draw from: the policy's own, or that of independent drafts.
        with_probs: Whether to return the distributions.
        implementation: "auto" is the kernel on CUDA and the reference elsewhere.

    Raises:
        ValueError: A shape, type or device does not fit, or the implementation cannot run here.
    """
    call = HeadCall(weights, state, newest, keys, positions, num_tokens, temperature, stream, with_probs).checked()
    if use_triton(state, implementation):
        from atlas_kernels.draft_head_triton import draft_head_triton

        return HeadDraft(*draft_head_triton(call))
    return HeadDraft(*draft_head_reference(call))
