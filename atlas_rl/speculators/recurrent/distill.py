"""Distils the policy's own distribution into the recurrent head, within a time budget.

The policy's distribution at each position is known exactly: its LM head's input was computed by verification, and the
LM head's rows and biases give the logits over the reduced vocabulary. The recurrent head unrolls over the committed
tokens, and every step is compared with the policy's distribution there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from atlas_rl.policy.logit_form import LogitForm
from atlas_rl.speculators.learning_budget import Agreement, Distilled, SpareLesson, learn_in_time
from atlas_rl.speculators.recurrent.head import RecurrentHead
from atlas_rl.speculators.recurrent.rollout_buffer import RolloutBuffer, Windows

Loss = Literal["kl", "tv"]
UNROLL = 5
_WINDOWS_PER_STEP = 256
_CHECK_WINDOWS = 128
_LEARNING_RATE = 2e-3


@dataclass(slots=True)
class Target:
    """The policy's output layer over the reduced vocabulary.

    Attributes:
        rows: float32 `[vocab, hidden]`.
        biases: float32 `[vocab]`.
        form: How logits are computed from the LM head's output.
        temperature: Temperature of the rollouts.
        index_of: int64 `[policy vocab]`, index in the reduced vocabulary, `len(rows)` for tokens outside.
    """

    rows: torch.Tensor
    biases: torch.Tensor
    form: LogitForm
    temperature: float
    index_of: np.ndarray

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log of the policy's distribution, renormalised over the reduced vocabulary: `[..., vocab]`."""
        logits = self.form(torch.nn.functional.linear(hidden.float(), self.rows, self.biases))
        return (logits / self.temperature).log_softmax(dim=-1)


def distill(
    head: RecurrentHead,
    optimizer: torch.optim.Optimizer,
    buffer: RolloutBuffer,
    target: Target,
    *,
    version: int,
    budget_s: Callable[[float], float],
    loss: Loss,
    rng: np.random.Generator,
    clock: Callable[[], float],
    began_s: float,
) -> Distilled:
    """Train until the budget is spent or the agreement on the newest rollouts stops rising.

    Args:
        head: Trained in place.
        optimizer: Optimizer of its parameters.
        buffer: Training data, with at least one window.
        target: The policy's output layer to match.
        version: Present policy version: older rollouts get less weight.
        budget_s: Maps the agreement before training to seconds, which include both checks; at least one step is taken.
        loss: `kl`, forward KL(p || q), or `tv`, total variation.
        rng: Draws the windows.
        clock: Returns seconds.
        began_s: Start of the budget, on the clock.
    """
    check = buffer.newest(_CHECK_WINDOWS, UNROLL, rng)
    return learn_in_time(
        lambda: _step(head, optimizer, buffer.sample(_WINDOWS_PER_STEP, UNROLL, version, rng), target, loss),
        lambda: agreement(head, check, target),
        budget_s,
        clock,
        began_s,
    )


def lesson(
    head: RecurrentHead,
    optimizer: torch.optim.Optimizer,
    buffer: RolloutBuffer,
    target: Target,
    *,
    version: int,
    loss: Loss,
    rng: np.random.Generator,
) -> SpareLesson | None:
    """The same training in pieces, until the agreement on held-out rollouts stops rising. Arguments as for `distill`.

    Each step has ended on the device when its piece returns, so that work does not queue up before a request.

    Returns:
        None if no rollout can be held out.
    """
    held = buffer.hold_out(_CHECK_WINDOWS, UNROLL, rng)
    if held is None:
        return None

    def step() -> None:
        _step(head, optimizer, buffer.sample(_WINDOWS_PER_STEP, UNROLL, version, rng), target, loss)
        if head.bias.is_cuda:
            torch.cuda.current_stream(head.bias.device).synchronize()

    return SpareLesson(step, lambda: agreement(head, held, target), lambda: _kept(head, optimizer))


def _kept(head: RecurrentHead, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Copy a head's weights; the returned function puts them back.

    The optimizer's moments stay, because its first step without them is large. They are dropped if they are not finite.
    """
    weights = [weight.detach().clone() for weight in head.parameters()]

    def put_back() -> None:
        with torch.no_grad():
            for weight, kept in zip(head.parameters(), weights, strict=True):
                weight.copy_(kept)
        moments = [torch.as_tensor(value) for values in optimizer.state.values() for value in values.values()]
        if not all(bool(torch.isfinite(moment).all()) for moment in moments):
            optimizer.state.clear()

    return put_back


def agreement(head: RecurrentHead, windows: Windows, target: Target) -> Agreement:
    """Mean of `sum_x min(p(x), q(x))` over the windows at each position, given the windows' tokens (teacher forcing).

    A position that no window reaches gets the value of the previous one.
    """
    with torch.no_grad():
        q = _unrolled(head, windows, target).exp()
        p = target.log_probs(windows.hidden[:, 1:]).exp()
        overlap = torch.minimum(p, q).sum(dim=-1).cpu().numpy()
    counts = windows.valid.sum(axis=0)
    means = (overlap * windows.valid).sum(axis=0, dtype=np.float64) / np.maximum(counts, 1)
    for position in range(1, len(means)):
        means[position] = means[position] if counts[position] else means[position - 1]
    return Agreement(means, counts)


def _step(head: RecurrentHead, optimizer: torch.optim.Optimizer, windows: Windows, target: Target, loss: Loss) -> None:
    with torch.enable_grad():
        log_q = _unrolled(head, windows, target)
        log_p = target.log_probs(windows.hidden[:, 1:])
        if loss == "kl":
            per_position = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        else:
            per_position = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)
        valid = torch.from_numpy(windows.valid).to(log_q.device)
        optimizer.zero_grad(set_to_none=True)
        # Selecting by a mask would need a transfer of the number of selected entries.
        (torch.where(valid, per_position, 0.0).sum() / int(windows.valid.sum())).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()


def _unrolled(head: RecurrentHead, windows: Windows, target: Target) -> torch.Tensor:
    """Log of the head's distribution after each of the first `unroll` tokens: `[n, unroll, vocab]`."""
    tokens = torch.from_numpy(target.index_of[windows.token_ids[:, :-1]]).to(windows.hidden.device)
    return (head.logits(head.unroll(windows.hidden[:, 0], tokens)) / target.temperature).log_softmax(dim=-1)


def new_optimizer(head: RecurrentHead) -> torch.optim.Optimizer:
    """A new optimizer of all the head's parameters."""
    return torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
