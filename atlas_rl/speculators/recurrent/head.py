"""The recurrent head: a gated recurrent network from the policy's last hidden state to a reduced vocabulary.

In the family of ReDrafter (arXiv 2403.09919), MLP speculators (arXiv 2404.19124) and Hydra (arXiv 2402.05109): the state
starts from the hidden state that the newest committed token was drawn from, absorbs that token, and then every drafted one.

    s_0     = tanh(R norm(h))                       h: input of the policy's LM head
    s_{j+1} = GRU(E norm(e(x_j)), s_j)              e: the policy's own input embedding, x_0 the newest committed token
    q_{j+1} = softmax((U W norm(s_{j+1}) + c + b) / T)

U are the rows of the policy's own LM head, scaled to a mean norm of one, and c its biases as logits, zero for most policies.

Only R, E, GRU, W and b are learned. With the policy's own tables the head knows from the start which tokens are
similar, so it can learn within a few policy updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from atlas_kernels.head_call import DraftHeadWeights
from atlas_rl.policy.cpu_linear import by_columns

_TYPE = torch.float32  # independent of torch's default dtype


def _in_own_type(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compute in the type of the tensors, whatever autocast a caller has around a generation or an update."""

    @wraps(compute)
    def computed(head: Any, *tensors: torch.Tensor) -> torch.Tensor:
        device = tensors[0].device.type
        if not torch.is_autocast_enabled(device):
            return compute(head, *tensors)
        with torch.autocast(device, enabled=False):
            return compute(head, *tensors)

    return computed


class RecurrentHead(nn.Module):
    """The recurrent head for training.

    Args:
        hidden_size: The policy's hidden size.
        state_size: Size of the recurrent state.
        seed: Seed of the initial weights; torch's global random state is not used.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    output_biases: torch.Tensor

    def __init__(self, hidden_size: int, state_size: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read = nn.Linear(hidden_size, state_size, bias=False, dtype=_TYPE)
            self.embed = nn.Linear(hidden_size, state_size, bias=False, dtype=_TYPE)
            self.cell = nn.GRUCell(state_size, state_size, dtype=_TYPE)
            self.write = nn.Linear(state_size, hidden_size, bias=False, dtype=_TYPE)
        self.bias = nn.Parameter(torch.zeros(0, dtype=_TYPE))
        # The policy's tables: neither learned nor saved, but read from the policy that the head drafts for.
        self.register_buffer("inputs", torch.zeros(1, hidden_size, dtype=_TYPE), persistent=False)
        self.register_buffer("outputs", torch.zeros(0, hidden_size, dtype=_TYPE), persistent=False)
        self.register_buffer("output_biases", torch.zeros(0, dtype=_TYPE), persistent=False)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the policy."""
        return self.read.in_features

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the head can propose."""
        return len(self.bias)

    def set_tables(self, inputs: torch.Tensor, outputs: torch.Tensor, output_biases: torch.Tensor) -> None:
        """Set the policy's embedding and output rows of the reduced vocabulary.

        Args:
            inputs: float32 `[vocab, hidden]`, input embeddings.
            outputs: float32 `[vocab, hidden]`, rows of the LM head.
            output_biases: float32 `[vocab]`, logits that the LM head's biases alone give.
        """
        # One more row for all tokens outside the reduced vocabulary: the mean of the others, a neutral value.
        inputs = _normed(torch.cat([inputs, inputs.mean(dim=0, keepdim=True)]))
        self.inputs, self.outputs = inputs, outputs / outputs.norm(dim=-1).mean()
        self.output_biases = output_biases

    def begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """Initial state `[rows, state]` from the policy's hidden states `[rows, hidden]`."""
        return _tanh(self.read(_normed(hidden.float())))

    def absorb(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The state after one more token: int64 `[rows]` indices into the reduced vocabulary, `vocab_size` for others."""
        return self.cell(self.embed(self.inputs[tokens]), state)

    def unroll(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """States after each token of int64 `[rows, unroll]`, started from `[rows, hidden]`: `[rows, unroll, state]`."""
        # A token's input gates do not depend on its position: computed once per distinct token, not once per position.
        used, index = tokens.unique(return_inverse=True)
        gates = functional.linear(self.embed(self.inputs[used]), self.cell.weight_ih, self.cell.bias_ih)
        state, states = self.begin(hidden), []
        for position in range(tokens.shape[1]):
            own = functional.linear(state, self.cell.weight_hh, self.cell.bias_hh)
            state = _gated(gates[index[:, position]], own, state)
            states.append(state)
        return torch.stack(states, dim=1)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits of the next token over the reduced vocabulary `[rows, vocab]`."""
        return functional.linear(self.write(_normed(state)), self.outputs, self.bias + self.output_biases)


class FoldedHead:
    """The head for drafting, with all products precomputed that are constant between two refreshes.

    Each drafted token then needs one product with the state's gates and one over the reduced vocabulary.

    Args:
        head: Read once; later changes to it are not seen.
        former: An earlier fold, which is of no use afterwards. What a draft by kernel reads is written into its tensors
            if all sizes are equal, so that CUDA graphs find it where it was.

    Attributes:
        read: float32 `[state, hidden]`, maps normalised hidden states to initial states before their tanh.
    """

    read: torch.Tensor

    def __init__(self, head: RecurrentHead, former: FoldedHead | None = None) -> None:
        # A caller's inference mode would make tensors that later calls may not write into. Leaving it turns gradients on.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(head.bias.device.type, enabled=False):
            cell = head.cell
            self._input_gates = functional.linear(head.embed(head.inputs), cell.weight_ih, cell.bias_ih)
            self._state_gates, self._state_bias = (
                by_columns(cell.weight_hh.detach().clone()),
                cell.bias_hh.detach().clone(),
            )
            self._outputs, self._bias = by_columns(head.outputs @ head.write.weight), head.bias + head.output_biases
            self.read = _written(by_columns(head.read.weight.detach().clone()), None if former is None else former.read)
        self._packed: DraftHeadWeights | None = None
        self._former = None if former is None else former._packed

    def packed(self, token_ids: torch.Tensor, dtype: torch.dtype) -> DraftHeadWeights:
        """Input of the draft head kernel in `dtype`, computed once.

        Args:
            token_ids: int64 `[vocab]`, the policy's ids of the reduced vocabulary; made outside of inference mode.
            dtype: float32, bfloat16 or float16.
        """
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                made = DraftHeadWeights(
                    input_gates=self._input_gates.to(dtype),
                    state_gates=self._state_gates.to(dtype).contiguous(),
                    state_bias=self._state_bias.to(dtype),
                    outputs=self._outputs.to(dtype).contiguous(),
                    bias=self._bias.to(dtype),
                    token_ids=token_ids,
                )
                self._packed = _written_weights(made, self._former)
            self._former = None
        return self._packed

    @_in_own_type
    def begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `RecurrentHead.begin`."""
        return _tanh(functional.linear(_normed(hidden.float()), self.read))

    @_in_own_type
    def absorb(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `RecurrentHead.absorb`."""
        return _gated(self._input_gates[tokens], functional.linear(state, self._state_gates, self._state_bias), state)

    @_in_own_type
    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """See `RecurrentHead.logits`."""
        return functional.linear(_normed(state), self._outputs, self._bias)


def _written(new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """`old` with the numbers of `new`, if it has the same shape and type on the same device; else `new`."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)


def _written_weights(new: DraftHeadWeights, old: DraftHeadWeights | None) -> DraftHeadWeights:
    """`new`, in the tensors of `old` that fit."""
    if old is None:
        return new
    names = [field.name for field in fields(DraftHeadWeights)]
    return DraftHeadWeights(**{name: _written(getattr(new, name), getattr(old, name)) for name in names})


def _gated(input_gates: torch.Tensor, state_gates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """`torch.nn.GRUCell` from the products with its weights: `[rows, 3 * state]` each."""
    reset_in, update_in, new_in = input_gates.chunk(3, dim=-1)
    reset, update, new = state_gates.chunk(3, dim=-1)
    new = _tanh(new_in + torch.sigmoid(reset_in + reset) * new)
    return torch.lerp(new, state, torch.sigmoid(update_in + update))


def _tanh(x: torch.Tensor) -> torch.Tensor:
    # `torch.tanh` uses MKL on a CPU, which runs in any OpenMP library it finds. If a package brought its own
    # (sentencepiece does), its threads and torch's compete for the cores: 4 ms for 4 x 576 numbers instead of 13 us.
    return 2 * torch.sigmoid(2 * x) - 1


def _normed(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:])
