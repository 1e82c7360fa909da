"""Trains the adaptive EAGLE-3 head on states that verification computes anyway.

The learner trains its own copy of the head in float32. The copy's weights are published to the drafting head when a
refresh succeeds, so no draft ever uses a half-finished refresh. A refresh that fails or raises is undone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atlas_rl.core import Rollouts, Sequences
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.unrolling import Batch, cross_entropy, unrolled
from atlas_rl.speculators.eagle3_adaptive.call_log import CallLog
from atlas_rl.speculators.eagle3_adaptive.texts import Text, TextBuffer, batch_of
from atlas_rl.speculators.head_state import learned_parameters, saved_moments, saved_weights
from atlas_rl.speculators.learning import Learner, trainable
from atlas_rl.speculators.learning_budget import Agreement, Distilled, LearningBudget, learn_in_time
from atlas_rl.speculators.saved_state import SavedState

logger = logging.getLogger(__name__)

_WORSE = 0.02  # tolerated loss of agreement: it is measured on few texts
_MAX_SHARED = 1 << 26  # most parameters summed across ranks: 256 MiB
OWNER = "adaptive EAGLE-3 head"
"""Name used in errors."""

_MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """Training settings of the head.

    Attributes:
        learning_rate: Learning rate of AdamW.
        unroll: Steps of test-time unrolling.
        step_weight: Weight of each unrolled step relative to the one before.
        texts: Texts per optimizer step, and per measurement of the agreement.
        max_tokens: Most positions kept to learn from, at two bytes per component of up to five hidden states: drawn
            tokens, and of every distinct prompt at most its last 513 tokens.
        seed: Seed for choosing texts.
    """

    learning_rate: float = 3e-4
    unroll: int = 3
    step_weight: float = 0.8
    texts: int = 4
    max_tokens: int = 16_384
    seed: int = 0


class Eagle3Learner(Learner):
    """Trains a copy of the drafting head; see the module docstring.

    Args:
        head: Drafting head; its weights change only at the end of a refresh.
        settings: Training settings.
        clock: Returns seconds.

    Attributes:
        trainee: The copy that is trained.
        trained: Whether it has learned anything yet.
        log: Log of the present call; None between calls.
    """

    @trainable
    def __init__(self, head: Eagle3Head, settings: RefineSettings, clock: Callable[[], float]) -> None:
        self._head, self._settings, self._clock = head, settings, clock
        self.trainee = copy.deepcopy(head).float().requires_grad_(True)
        if self.trainee.embed_tokens is not None:
            self.trainee.embed_tokens.requires_grad_(False)
        self._optimizer = self._new_optimizer()
        self._buffer = TextBuffer(settings.max_tokens)
        self._rng = np.random.default_rng(settings.seed)
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None  # LM head rows and biases
        self._rows_version: int | None = None
        self.log: CallLog | None = None
        self.trained = False
        self._learned_alone = False  # on this rank, since the last mean over ranks

    # -------------------------------------------------------------------------------------------------------- a call

    @trainable
    def begin_call(self, sequences: Sequences, policy: PolicyView) -> CallLog:
        """Log the texts of this call. The policy's LM head rows are re-read if the policy version changed."""
        self.end_call()
        self.log = CallLog(sequences, self._head.config.layers, self._settings.max_tokens)
        if self._rows is None or sequences.policy_version != self._rows_version:
            with torch.no_grad():
                rows, biases = policy.output_rows(self._head.token_ids)
                self._rows = rows.detach().float().clone(), biases.detach().float().clone()
            self._rows_version = sequences.policy_version
        return self.log

    def end_call(self) -> None:
        """Move the call's texts into the buffer."""
        log, self.log = self.log, None
        texts = [] if log is None else log.texts()
        if texts:
            self._buffer.add(texts)

    @trainable
    def take_over(self, before: Eagle3Learner) -> None:
        """Adopt the weights of another learner, if it had the same head and a policy of the same sizes."""
        shapes = [{n: w.shape for n, w in learned_parameters(each.trainee).items()} for each in (self, before)]
        same = torch.equal(self.trainee.token_ids.cpu(), before.trainee.token_ids.cpu())
        if not (before.trained and same and shapes[0] == shapes[1]):
            return
        self.trainee.load_state_dict(before.trainee.state_dict())
        self.trained = True
        self._publish()

    # ------------------------------------------------------------------------------------------------------- a refresh

    @trainable
    def refresh(
        self, rollouts: Rollouts, policy_version: int, policy: PolicyView, budget: LearningBudget, in_time: bool
    ) -> Distilled | None:
        """Learn from the newest rollouts and publish the weights to the drafting head.

        Args and the returned value: as for `Learner.refresh`, and None if it failed. After a failure the head is
        unchanged. So it is after an error, which is raised again.
        """
        self.end_call()
        if not self._buffer.has_texts or not (in_time or budget.owes_first_step(self.trained)):
            return None
        budget.begin_learning()
        # A drafting head of a narrower number format has only rounded ones.
        exact = self._head.fc.weight.dtype == torch.float32
        before = dict(self._head.named_parameters()) if exact else self._weights()
        good = False
        try:
            done = self._learn(rollouts, policy_version, policy, budget)
            good = self._is_good(done)
        finally:
            if not good:
                self._restore(before)
        if not good:
            logger.warning(
                "atlas_rl: a refresh of the adaptive EAGLE-3 head is undone: its agreement with the policy went from "
                "%.3f to %.3f on the newest rollouts, or its weights are no numbers any more",
                done.agreement_before, done.agreement_after,
            )  # fmt: skip
            return None
        budget.learned(done)
        self.trained = self._learned_alone = True
        self._publish()
        return done

    def _learn(self, rollouts: Rollouts, policy_version: int, policy: PolicyView, budget: LearningBudget) -> Distilled:
        """Train the copy until the budget is spent."""
        sampling, size = rollouts.sequences.sampling, self._settings.texts
        temperature = 1.0 if sampling.greedy else sampling.temperature
        newest = self._batch(self._buffer.newest(size, self._rng))
        return learn_in_time(
            lambda: self._step(self._batch(self._buffer.sample(size, policy_version, self._rng)), policy, temperature),
            lambda: self._agreement(newest, policy, temperature),
            budget.limit_s,
            self._clock,
            budget.opened_s,
        )

    def shared(self) -> torch.Tensor | None:
        """See `Speculator.shared`. Heads of more than 67 million parameters are not shared: each rank trains its own."""
        with torch.no_grad():
            weights = [weight.flatten() for weight in learned_parameters(self.trainee).values()]
            if sum(len(each) for each in weights) > _MAX_SHARED:
                return None
            vector = torch.cat([*weights, weights[0].new_ones(1)])
            return vector if self._learned_alone else torch.zeros_like(vector)

    def take_shared(self, total: torch.Tensor) -> None:
        num_learned = float(total[-1])
        if not num_learned or not bool(torch.isfinite(total).all()):
            return
        weights = learned_parameters(self.trainee)
        sizes = [weight.numel() for weight in weights.values()]
        parts = (total[:-1] / num_learned).to(self.trainee.fc.weight.device).split(sizes)
        with torch.no_grad():
            for weight, part in zip(weights.values(), parts, strict=True):
                weight.copy_(part.view_as(weight))
        self.trained, self._learned_alone = True, False
        self._publish()

    def _batch(self, texts: list[Text]) -> Batch:
        return batch_of(texts, self._head.config.layers, self._rng)

    def _step(self, batch: Batch, policy: PolicyView, temperature: float) -> None:
        settings = self._settings
        with torch.enable_grad():
            loss = cross_entropy(
                self.trainee, batch, self._logits_of(policy), settings.unroll, settings.step_weight, temperature
            )
            if loss is None:
                return
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(learned_parameters(self.trainee).values(), 0.5)
        self._optimizer.step()

    def _agreement(self, batch: Batch, policy: PolicyView, temperature: float) -> Agreement:
        logits_of = self._logits_of(policy)
        means, counts = np.zeros(self._settings.unroll), np.zeros(self._settings.unroll, np.int64)
        with torch.no_grad():
            for number, step in enumerate(unrolled(self.trainee, batch, self._settings.unroll)):
                counts[number] = len(step.features)
                if counts[number]:
                    p = (logits_of(step.drawn_from) / temperature).softmax(dim=-1)
                    q = (self.trainee.logits(step.features) / temperature).softmax(dim=-1)
                    means[number] = float(torch.minimum(p, q).sum(dim=-1).mean())
                elif number:
                    means[number] = means[number - 1]
        return Agreement(means, counts)

    def _logits_of(self, policy: PolicyView) -> Callable[[torch.Tensor], torch.Tensor]:
        assert self._rows is not None, "a call has begun"
        assert policy.form is not None, "it follows this policy"
        form, (rows, biases) = policy.form, self._rows
        return lambda states: form(functional.linear(states, rows, biases))

    def _is_good(self, done: Distilled) -> bool:
        dtype = self._head.fc.weight.dtype  # the drafting head's number format may have a smaller range
        weights = learned_parameters(self.trainee).values()
        finite = all(bool(torch.isfinite(weight.detach().to(dtype)).all()) for weight in weights)
        return finite and done.agreement_after >= done.agreement_before - _WORSE

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in learned_parameters(self.trainee).items()}

    def _restore(self, before: Mapping[str, torch.Tensor]) -> None:
        """Restore the weights from before a refresh, and drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, weight in learned_parameters(self.trainee).items():
                weight.copy_(before[name])
        moments = [value for values in self._optimizer.state.values() for value in values.values()]
        if not all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in moments):
            self._optimizer = self._new_optimizer()  # its first step is large, so finite moments are kept

    def _publish(self) -> None:
        """Copy the learned weights to the drafting head."""
        drafting = dict(self._head.named_parameters())
        with torch.no_grad():
            for name, weight in learned_parameters(self.trainee).items():
                drafting[name].copy_(weight)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        weights = list(learned_parameters(self.trainee).values())
        return torch.optim.AdamW(weights, lr=self._settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer moments and the head's tokens; the texts are not saved, new ones come within a step."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "trained": int(self.trained),
            "token_ids": self.trainee.token_ids.cpu().numpy(),
            "weights": self._weights(),
            "optimizer": {
                str(index): {name: torch.as_tensor(value).clone() for name, value in values.items()}
                for index, values in moments.items()
            },
        }

    def fits(self, state: SavedState) -> bool:
        """Whether a saved state fits this head: the same draft tokens.

        Raises:
            ValueError: The state is not of this kind.
        """
        ids = self.trainee.token_ids.cpu().numpy()
        return np.array_equal(state.integers("token_ids", 0, _MAX_TOKEN), ids)

    @trainable
    def load_state_dict(self, state: SavedState) -> None:
        """Restore `state_dict()` and publish the weights to the drafting head.

        Raises:
            ValueError: The state does not fit any such learner; nothing has changed then.
        """
        trained = bool(state.integer("trained", 0, 1))
        weights = saved_weights(self.trainee, state.part("weights"), OWNER)
        moments = saved_moments(self.trainee, state.part("optimizer"), OWNER)
        with torch.no_grad():
            for name, weight in learned_parameters(self.trainee).items():
                weight.copy_(weights[name])
        self._optimizer = self._new_optimizer()
        described = self._optimizer.state_dict()
        described["state"] = moments
        self._optimizer.load_state_dict(described)
        self.trained = trained
        self._publish()
