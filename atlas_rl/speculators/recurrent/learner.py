"""Trains the recurrent drafter on by-products of verification, so that it follows the policy.

Verification computes the policy's hidden state at every token of every rollout. The learner logs these states during a
call and moves them into a bounded buffer at its end (`rollout_buffer.py`). At every policy update it takes a few steps
of distillation (`distill.py`) over the tokens that the rollouts use (`reduced_vocab.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from atlas_rl.core import Rollouts, Sequences, Verified
from atlas_rl.policy.upload import uploaded
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.drawn_rows import committed_places
from atlas_rl.speculators.head_state import MAX_COUNT, saved_moments, saved_weights
from atlas_rl.speculators.learning import Learner, every_other, trainable
from atlas_rl.speculators.learning_budget import Distilled, LearningBudget, SpareLesson
from atlas_rl.speculators.recurrent.averaging import summand, take_mean
from atlas_rl.speculators.recurrent.distill import Loss, Target, distill, lesson, new_optimizer
from atlas_rl.speculators.recurrent.head import RecurrentHead
from atlas_rl.speculators.recurrent.rollout_buffer import RolloutBuffer
from atlas_rl.speculators.reduced_vocab import TokenCounts, TokenRows
from atlas_rl.speculators.saved_state import SavedState

_MAX_STATE_SIZE = 1024
OWNER = "recurrent drafter"
"""Name used in errors."""


@dataclass(frozen=True, slots=True)
class LearnSettings:
    """Training settings of the head.

    Attributes:
        loss: Loss of a refresh, see `distill`.
        max_vocab: Most tokens that the head can propose.
        max_tokens: Most rollout tokens kept to learn from, at two bytes per component of a hidden state.
        missed_weight: Weight of places where its drafts were rejected, relative to others (Draft-OPD); 1 for equal.
        seed: Seed of the initial weights and of the training windows.
    """

    loss: Loss = "kl"
    max_vocab: int = 8192
    max_tokens: int = 32_768
    missed_weight: float = 3.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Logged:
    """Committed tokens of one step: requests, positions and tokens int64 `[n]`, source states, and misses."""

    requests: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    hidden: torch.Tensor
    missed: np.ndarray

    def of(self, kept: np.ndarray) -> _Logged:
        """The selected tokens only: bool `[n]`."""
        hidden = self.hidden[torch.from_numpy(kept).to(self.hidden.device)]
        return _Logged(self.requests[kept], self.positions[kept], self.tokens[kept], hidden, self.missed[kept])


class RecurrentLearner(Learner):
    """Owns the head, its reduced vocabulary and its training data.

    Args:
        policy: Provides sizes and device, and must have a form of logits; embeddings are read later, when they are
            whole.
        settings: Training settings.
        clock: Returns seconds.

    Attributes:
        head: The network.
        ids: int64 `[vocab]`, the policy's ids of the tokens that it can propose, sorted.
        index_of: int64 `[policy vocab]`, index in `ids`; `len(ids)` for tokens outside.
        trained: Whether it has learned anything yet.
        revision: Counts changes of head and vocabulary, so that derived data can be renewed.
        sequences: The call being logged; None between calls.
    """

    @trainable
    def __init__(self, policy: PolicyView, settings: LearnSettings, clock: Callable[[], float]) -> None:
        self._settings, self._clock = settings, clock
        self._device = policy.device
        vocab_size, hidden_size = policy.vocab_size, policy.hidden_size
        self.head = RecurrentHead(hidden_size, min(hidden_size, _MAX_STATE_SIZE), settings.seed).to(self._device)
        self.trained = False
        self.revision = 0
        self.sequences: Sequences | None = None
        self._optimizer = new_optimizer(self.head)
        self._counts = TokenCounts(vocab_size)
        self._rows = TokenRows.empty(vocab_size, hidden_size, self._device)
        self._rows_version: int | None = None  # policy version of the rows
        self._buffer = RolloutBuffer(settings.max_tokens, settings.missed_weight)
        self._rng = np.random.default_rng(settings.seed)
        self._kept = np.zeros(0, bool)  # requests whose tokens are logged
        self._num_logged = 0
        self._log: list[_Logged] = []
        self._num_read = 0  # log entries whose tokens have rows
        self._unread = np.zeros(0, np.int64)  # tokens of earlier calls without rows: weights are read only in calls
        self._learned_alone = False  # on this rank, since the last mean over ranks
        self._set_ids(np.zeros(0, np.int64))

    @property
    def sizes(self) -> tuple[int, int]:
        """Vocabulary and hidden size of the policy that the learner was made for."""
        return len(self._counts.counts), self.head.hidden_size

    def forget_tables(self) -> None:
        """Follow another policy of the same sizes: embeddings are re-read at the next call."""
        self._rows_version = None

    @trainable
    def move_to(self, device: torch.device) -> None:
        """Move the head and its training data to the policy's present device."""
        if device == self._device:
            return
        moments = self._optimizer.state_dict()
        self._device, self.head = device, self.head.to(device)
        self._optimizer = new_optimizer(self.head)
        self._optimizer.load_state_dict(moments)  # moves them to the parameters' device
        self._rows.move_to(device)
        self._buffer.move_to(device)
        self._log = [replace(entry, hidden=entry.hidden.to(device)) for entry in self._log]
        self.revision += 1

    # -------------------------------------------------------------------------------------------------------- a call

    @trainable
    def begin_call(self, sequences: Sequences, policy: PolicyView) -> None:
        """Log the tokens of this call. Embeddings are re-read if the policy version changed."""
        self.end_call()
        self.sequences = sequences
        if sequences.policy_version != self._rows_version:
            self._rows.reread(policy)
            self._rows_version = sequences.policy_version
            self._set_tables(self.ids, policy)
        self._rows.add(self._unread, policy)
        self._unread = self._unread[:0]
        self._num_logged = 0
        self._kept = np.ones(len(sequences.lengths), bool)

    @trainable
    def observe(self, verified: Verified, begins: np.ndarray, missed: np.ndarray, policy: PolicyView) -> None:
        """Log committed tokens.

        Args:
            verified: Committed tokens.
            begins: int64 `[batch]`, position of each row's first committed token.
            missed: int64 `[batch]`, offset of the first token that differs from the head's draft; -1 for none.
            policy: Provides the embeddings of new tokens.
        """
        row, offset, places = committed_places(verified.hidden.starts, verified.num_committed)
        if not self._kept.all():
            kept = np.flatnonzero(self._kept[verified.requests[row]])
            row, offset, places = row[kept], offset[kept], places[kept]
        if len(row):
            states = verified.hidden.head_inputs.detach()[uploaded(places, self._device)].to(torch.float16)
            tokens, requests = verified.token_ids[row, offset], verified.requests[row]
            self._log.append(_Logged(requests, begins[row] + offset, tokens, states, missed[row] == offset))
            self._num_logged += len(row)
            while self._num_logged > self._settings.max_tokens and self._kept.sum() > 1:
                self._thin()
        fresh = self._log[self._num_read :]
        if verified.finished.any() and fresh:  # not in every step: adding tokens copies all rows
            self._rows.add(np.concatenate([entry.tokens for entry in fresh]), policy)
            self._num_read = len(self._log)

    def _thin(self) -> None:
        """Halve the logged requests: every n-th is kept, hence all prompts, and whole rollouts.

        A call that overflows the buffer is sampled like this. The maximum lengths do not tell beforehand whether it will.
        """
        self._kept = every_other(self._kept, [entry.requests for entry in self._log])
        self._log = [entry.of(self._kept[entry.requests]) for entry in self._log]
        self._num_logged = sum(len(entry.requests) for entry in self._log)

    def end_call(self) -> None:
        """Move the call's tokens into the buffer."""
        if self._log and self.sequences is not None:
            requests = np.concatenate([entry.requests for entry in self._log])
            positions = np.concatenate([entry.positions for entry in self._log])
            tokens = np.concatenate([entry.tokens for entry in self._log])
            hidden = torch.cat([entry.hidden for entry in self._log])
            missed = np.concatenate([entry.missed for entry in self._log])
            self._buffer.add(requests, positions, tokens, hidden, missed, self.sequences.policy_version)
            self._counts.add(tokens)
            unread = [self._unread, *(entry.tokens for entry in self._log[self._num_read :])]
            self._unread = np.unique(np.concatenate(unread))
        self._log, self._num_read, self.sequences = [], 0, None

    # ------------------------------------------------------------------------------------------------------- a refresh

    @trainable
    def refresh(
        self, rollouts: Rollouts, policy_version: int, policy: PolicyView, budget: LearningBudget, in_time: bool
    ) -> Distilled | None:
        """As `Learner.refresh`. Without a token of known embeddings there is nothing to learn from.

        So it is in a server that is told of new weights before any request has ended.
        """
        self.end_call()
        self._buffer.release()
        for elsewhere in rollouts.elsewhere:
            self._counts.add(elsewhere.completion_tokens())
            self._unread = np.union1d(self._unread, elsewhere.completion_tokens())
        self._counts.fade()
        if not self._buffer.has_windows or not (in_time or budget.owes_first_step(self.trained)):
            return None
        self._revise_vocabulary(policy)
        if not len(self.ids):
            return None
        budget.begin_learning()
        done = distill(
            self.head, self._optimizer, self._buffer, self._target(rollouts.sequences, policy), version=policy_version,
            budget_s=budget.limit_s, loss=self._settings.loss, rng=self._rng, clock=self._clock, began_s=budget.opened_s,
        )  # fmt: skip
        budget.learned(done)
        self.trained = self._learned_alone = True
        self.revision += 1
        return done

    @trainable
    def lesson(self, policy: PolicyView) -> SpareLesson | None:
        """As `Learner.lesson`. The call's hidden states and the rows of the LM head are of one policy, which is served.

        A call with no token yet has nothing to learn from: the newest states are then an older policy's, perhaps of requests
        that ran while its weights were replaced.
        """
        sequences, is_fresh = self.sequences, bool(self._log)
        self.end_call()
        if sequences is None or not is_fresh or not self._buffer.has_windows:
            return None
        self._revise_vocabulary(policy)
        if not len(self.ids):
            return None
        return lesson(
            self.head, self._optimizer, self._buffer, self._target(sequences, policy), version=sequences.policy_version,
            loss=self._settings.loss, rng=self._rng,
        )  # fmt: skip

    @trainable
    def study(self, lesson: SpareLesson) -> bool:
        more = lesson.advance()
        if lesson.num_steps:
            self.trained = self._learned_alone = True
            self.revision += 1
        return more

    @trainable
    def end_lesson(self, lesson: SpareLesson) -> None:
        if lesson.end():
            self.revision += 1

    def shared(self) -> torch.Tensor:
        return summand(self.head, self.ids, len(self._counts.counts), learned=self._learned_alone)

    def take_shared(self, total: torch.Tensor) -> None:
        if take_mean(self.head, self.ids, total):
            self._learned_alone = False
            self.revision += 1

    def _target(self, sequences: Sequences, policy: PolicyView) -> Target:
        slots = torch.from_numpy(self._rows.slots[self.ids]).to(self._device)
        assert policy.form is not None
        return Target(
            rows=self._rows.outputs[slots],
            biases=self._rows.biases[slots],
            form=policy.form,
            temperature=1.0 if sequences.sampling.greedy else sequences.sampling.temperature,
            index_of=self.index_of,
        )

    # ----------------------------------------------------------------------------------------------------- vocabulary

    def _revise_vocabulary(self, policy: PolicyView) -> None:
        """Adopt the tokens that rollouts use now; what was learned about remaining tokens is kept.

        All memory is allocated before anything changes: if it runs out, the head still drafts.
        """
        ids = self._counts.most_used(self._settings.max_vocab)
        ids = ids[self._rows.slots[ids] >= 0]
        if not len(ids):
            return  # no token has a known row yet
        if np.array_equal(ids, self.ids) and len(self.head.outputs) == len(ids):
            return
        stayed = self.index_of[ids] < len(self.ids)
        slots = self.index_of[ids][stayed]
        moments = self._optimizer.state.get(self.head.bias, {})
        bias = self.head.bias.new_zeros(len(ids))
        kept = torch.from_numpy(np.flatnonzero(stayed)).to(self._device)
        taken = torch.from_numpy(slots).to(self._device)
        with torch.no_grad():
            bias[kept] = self.head.bias[taken]
            revised = {
                name: moments[name].new_zeros(len(ids)).index_copy(0, kept, moments[name][taken])
                for name in ("exp_avg", "exp_avg_sq")
                if name in moments
            }
        self._set_tables(ids, policy)
        moments.update(revised)
        self.head.bias.data = bias
        self._set_ids(ids)

    def _set_ids(self, ids: np.ndarray) -> None:
        self.ids = ids
        self.index_of = np.full(len(self._counts.counts), len(ids), np.int64)
        self.index_of[ids] = np.arange(len(ids))
        if self.head.vocab_size != len(ids):
            self.head.bias.data = self.head.bias.new_zeros(len(ids))

    @trainable
    def _set_tables(self, ids: np.ndarray, policy: PolicyView) -> None:
        """Give the head the policy's embedding and output rows of a vocabulary: int64 `[vocab]`, sorted."""
        if not len(ids):
            return
        self._rows.add(ids, policy)
        slots = torch.from_numpy(self._rows.slots[ids]).to(self._device)
        self.revision += 1
        rows = self._rows
        assert policy.form is not None
        self.head.set_tables(rows.inputs[slots], rows.outputs[slots], policy.form(rows.biases[slots]))

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer moments, the reduced vocabulary and its counts, and the sizes of the policy."""
        vocab_size, hidden_size = self.sizes
        used = np.flatnonzero(self._counts.counts)
        optimizer = self._optimizer.state_dict()["state"]
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "trained": int(self.trained),
            "ids": self.ids.copy(),
            "counted_ids": used,
            "counts": self._counts.counts[used],
            "weights": {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()},
            "optimizer": {
                str(index): {name: torch.as_tensor(value).clone() for name, value in moments.items()}
                for index, moments in optimizer.items()
            },
        }

    @trainable
    def load_state_dict(self, state: SavedState) -> None:
        """Restore `state_dict()` of a learner for a policy of the same sizes, into an untrained learner.

        Raises:
            ValueError: The state does not fit any such learner; this one must then be discarded.
        """
        vocab_size = len(self._counts.counts)
        ids, used = state.integers("ids", 0, vocab_size - 1), state.integers("counted_ids", 0, vocab_size - 1)
        trained = bool(state.integer("trained", 0, 1))
        for name, listed in (("ids", ids), ("counted_ids", used)):
            if (np.diff(listed) <= 0).any():
                raise ValueError(f"recurrent drafter: {name} is not sorted")
        if trained and not len(ids):
            raise ValueError("recurrent drafter: the state is of a trained head over no tokens")
        self._counts.counts[used] = state.floats("counts", used.shape, 0.0, MAX_COUNT)
        self._set_ids(ids)
        self.head.load_state_dict(saved_weights(self.head, state.part("weights"), OWNER))
        self._optimizer = new_optimizer(self.head)
        described = self._optimizer.state_dict()
        described["state"] = saved_moments(self.head, state.part("optimizer"), OWNER)
        self._optimizer.load_state_dict(described)
        self.trained = trained
