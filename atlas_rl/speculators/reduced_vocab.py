"""The reduced vocabulary of a drafter's output layer: the tokens that the rollouts use.

A rollout of one task uses a few hundred of the policy's tokens; an output layer over all tokens would cost more than
the rest of a small drafter. The policy still samples tokens that the drafter cannot propose: a rejected draft, never a
bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from atlas_rl.policy.view import PolicyView

_COVERAGE = 0.999  # share of the rollouts' tokens: the rarest are left out
_HALVED_AFTER_UPDATES = 8

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class TokenCounts:
    """Counts how often rollouts used each token; old counts fade with every policy update.

    Args:
        vocab_size: The policy's vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, np.float64)

    def add(self, token_ids: np.ndarray) -> None:
        """Count tokens: int `[n]`."""
        self.counts += np.bincount(token_ids, minlength=len(self.counts))

    def fade(self) -> None:
        """Fade the counts after a policy update."""
        self.counts *= 0.5 ** (1 / _HALVED_AFTER_UPDATES)

    def most_used(self, max_size: int) -> np.ndarray:
        """The fewest tokens that cover `_COVERAGE` of the counts, at most `max_size`: sorted int64 ids."""
        order = np.argsort(-self.counts, kind="stable")
        order = order[: np.count_nonzero(self.counts > 0)]
        covered = np.cumsum(self.counts[order])
        enough = int(np.searchsorted(covered, _COVERAGE * covered[-1])) + 1 if len(covered) else 0
        return np.sort(order[: min(enough, max_size)])


def _lasting(method: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Make the tensors of `method` ordinary ones. Later calls write into them, which inference tensors do not allow."""
    return torch.inference_mode(False)(torch.no_grad()(method))


@dataclass(slots=True)
class TokenRows:
    """The policy's input embeddings, LM head rows and biases, of the tokens seen so far.

    A copy, because the drafter learns when the policy's weights may be sharded. Small, because it holds only tokens
    that the rollouts used. `reread` updates it to the present policy.

    Attributes:
        slots: int64 `[vocab]`, row of each token, -1 for tokens without one.
        token_ids: int64 `[rows]`.
        inputs, outputs: float32 `[rows, hidden]`.
        biases: float32 `[rows]`.
    """

    slots: np.ndarray
    token_ids: np.ndarray
    inputs: torch.Tensor
    outputs: torch.Tensor
    biases: torch.Tensor

    @classmethod
    @_lasting
    def empty(cls, vocab_size: int, hidden_size: int, device: torch.device) -> TokenRows:
        """No rows yet."""
        rows = torch.zeros(0, hidden_size, dtype=torch.float32, device=device)
        return cls(np.full(vocab_size, -1, np.int64), np.zeros(0, np.int64), rows, rows, rows[:, 0])

    @_lasting
    def add(self, token_ids: np.ndarray, policy: PolicyView) -> None:
        """Add rows for tokens that have none: int `[n]`."""
        new = np.unique(token_ids)
        new = new[self.slots[new] < 0].astype(np.int64)
        if len(new):
            self.slots[new] = np.arange(len(new)) + len(self.token_ids)
            self.token_ids = np.concatenate([self.token_ids, new])
            inputs, outputs, biases = policy.rows_of(new)
            self.inputs, self.outputs = _appended(self.inputs, inputs), _appended(self.outputs, outputs)
            self.biases = torch.cat([self.biases, biases])

    @_lasting
    def move_to(self, device: torch.device) -> None:
        """Move the rows to the policy's new device."""
        self.inputs, self.outputs, self.biases = (rows.to(device) for rows in (self.inputs, self.outputs, self.biases))

    @_lasting
    def reread(self, policy: PolicyView) -> None:
        """Read all rows again, because the policy's weights may have changed."""
        self.inputs, self.outputs, self.biases = policy.rows_of(self.token_ids)


def _appended(rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`rows` with `new` appended, within spare memory after `rows` if possible, because tokens keep coming."""
    old, count, width = len(rows), len(rows) + len(new), rows.shape[1]
    room = rows.untyped_storage().nbytes() // (rows.element_size() * width)
    store = rows
    if room < count:
        store = rows.new_empty(2 * count, width)
        store[:old] = rows
    joined = store.as_strided((count, width), (width, 1), 0)
    joined[old:] = new
    return joined
