"""The checked weights and arguments of `draft_head`, for its reference and its kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atlas_kernels.noise import Stream
from atlas_kernels.truncation import Truncation

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class DraftHeadWeights:
    """The weights of a folded head. Products round the state to the weights' type; everything else is float32.

    Attributes:
        input_gates: float32, bfloat16 or float16 `[tokens + 1, 3 * size]`: each token's contribution to the reset,
            update and new gates; the last row is for every token outside of the reduced vocabulary.
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
        """Bytes of weights that one drafted token reads, without its row of `input_gates`."""
        return sum(tensor.nbytes for tensor in (self.state_gates, self.state_bias, self.outputs, self.bias))


@dataclass(frozen=True, slots=True)
class HeadCall:
    """One call of the head; the attributes are the arguments of `atlas_kernels.draft_head.draft_head`."""

    weights: DraftHeadWeights
    state: torch.Tensor
    newest: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    num_tokens: int
    temperature: float
    stream: Stream
    with_probs: bool
    truncation: Truncation | None = None

    def checked(self) -> HeadCall:
        """This call, if its arguments are consistent; `ValueError` otherwise.

        Raises:
            ValueError: A shape, type, device or number does not fit.
        """
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
        if self.truncation is not None and self.temperature == 0:
            raise ValueError(
                "truncation goes with a temperature > 0: without noise the likeliest token is taken anyway"
            )
        return self
