"""The adaptive drafter that learns: a recurrent head trained on the run's own rollouts after every policy update.

Verification computes the policy's hidden state at every token of every rollout; this speculator keeps them
(`replay_buffer.py`), and whenever the policy moves it takes a few steps of distillation (`distill.py`) over the tokens that
the rollouts use (`reduced_vocab.py`). It starts from nothing and drafts nothing before its first refresh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atlas_kernels.dispatch import kernels_run_on
from atlas_rl.core import Draft, Rollouts, Sequences, Verified
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.drawing import ReducedDraft
from atlas_rl.speculators.recurrent.distill import Distilled, Loss, Target, distill, new_optimizer
from atlas_rl.speculators.recurrent.head import FoldedHead, RecurrentHead
from atlas_rl.speculators.recurrent.rollout_buffer import ReplayBuffer
from atlas_rl.speculators.reduced_vocab import TokenCounts, TokenRows

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_STATE_KIND, _STATE_VERSION = "atlas_rl.recurrent", 1
_MAX_STATE_SIZE = 1024
_MAX_VOCAB = 8192
_MAX_TOKENS = 32_768
_MISSED_WEIGHT = 3.0
_LASTS_UPDATES = 4.0  # policy updates over which what was learned is worth something
_LEAST_CUT = 1 / 16  # of the budget: what is always spent, to see whether training pays again
_BUDGET_SHARE = 0.05  # of the time since the refresh before


# A caller's inference mode would make tensors that no training can use; what training touches is made outside of it.
_trainable = torch.inference_mode(False)


class RecurrentSpeculator(Speculator):
    """Drafts with a small recurrent network that follows the policy.

    Coupled to the policy's noise a draft token is the head's own choice under the noise of its position (acceptance close
    to 1 - TV); without coupling it is an independent draw, and `Draft.draft_probs` says from what.

    Args:
        loss: What refreshes minimise, see `distill`.
        budget_share: Most of the time between two refreshes that the later one takes.
        max_vocab: Most tokens it can propose.
        max_tokens: Most rollout tokens kept to learn from, at two bytes per component of a hidden state.
        missed_weight: How much more often than elsewhere it learns where its drafts were rejected (Draft-OPD); 1 alike.
        seed: Of the initial weights and of the training windows.
        clock: Seconds.
        argmax: Draft the likeliest token instead of drawing: an arm of comparisons.
    """

    name = "recurrent"
    reads_hidden = True

    def __init__(
        self,
        *,
        loss: Loss = "kl",
        budget_share: float = _BUDGET_SHARE,
        max_vocab: int = _MAX_VOCAB,
        max_tokens: int = _MAX_TOKENS,
        missed_weight: float = _MISSED_WEIGHT,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        argmax: bool = False,
    ) -> None:
        self.policy_version = -1
        self.refreshes: list[Distilled] = []
        self._loss, self._budget_share, self._seed = loss, budget_share, seed
        self._max_vocab, self._max_tokens, self._missed_weight = max_vocab, max_tokens, missed_weight
        self._clock, self._argmax = clock, argmax
        self._policy: nn.Module | None = None
        self._sequences: Sequences | None = None
        self._folded: FoldedHead | None = None  # made when first needed after a refresh
        self._num_read = 0  # entries of the log whose tokens have rows
        self._rows_version: int | None = None  # of the policy that the rows were read from
        self._proposed: tuple[np.ndarray, Draft] | None = None  # requests and drafts since the last verification
        self._cut = 1.0  # share of the budget that training is worth
        self._counts: TokenCounts
        self._rows: TokenRows
        self._trained = False
        self._began = clock()

    @property
    def ready(self) -> bool:
        """Whether it has learned anything yet."""
        return self._trained

    @property
    def expected_survival(self) -> np.ndarray | None:
        """From the agreement with the policy that the last refresh measured."""
        return np.cumprod(self.refreshes[-1].by_position) if self.refreshes else None

    def bind(self, policy: nn.Module) -> None:
        """Draft for this policy: as learned where its sizes are those of the policy before, else from nothing."""
        vocab_size, hidden_size = policy.get_output_embeddings().weight.shape  # type: ignore[operator]
        known = None if self._policy is None else (len(self._counts.counts), self._head.hidden_size)
        self._policy = policy
        if known == (vocab_size, hidden_size):
            self._rows_version = None
            return
        if known is not None:
            logger.warning(
                "atlas_rl: the policy now has %d tokens and hidden size %d instead of %d and %d: the recurrent drafter "
                "starts from nothing", vocab_size, hidden_size, *known,
            )  # fmt: skip
        self._reset(vocab_size, hidden_size)

    def start(self, sequences: Sequences, requests: np.ndarray) -> None:
        """A new `Sequences` ends the call before it. Of a policy that has moved, the embeddings are read anew."""
        if sequences is self._sequences:
            return
        self._end_call()
        self._sequences, self._proposed = sequences, None
        if sequences.policy_version != self._rows_version:
            self._rows.reread(self._bound())
            self._rows_version = sequences.policy_version
            self._set_tables()
        num_requests = len(sequences.lengths)
        self._newest = torch.zeros(num_requests, self._head.hidden_size, device=self._device)
        # A call that could overflow the buffer is sampled: every n-th request, hence all prompts, and whole rollouts.
        stride = -(-num_requests * sequences.sampling.max_new_tokens // self._max_tokens)
        self._kept = np.arange(num_requests) % stride == 0

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request; all rows run to the longest draft wanted, shorter ones are cut."""
        depth = int(max_draft_tokens.max(initial=0))
        if depth <= 0 or not self._trained:
            return Draft.empty(len(requests))
        draft = ReducedDraft(
            sequences, requests, depth, self._ids, couples_noise=self.couples_noise, argmax=self._argmax
        )
        if self._folded is None:
            self._folded = FoldedHead(self._head)
        head = self._folded
        with torch.no_grad():
            state = head.begin(self._newest[torch.from_numpy(requests).to(self._device)])
            newest = self._index_of[sequences.token_ids[requests, sequences.lengths[requests] - 1]]
            if kernels_run_on(self._device) and draft.by_kernel:
                dtype = self._bound().get_output_embeddings().weight.dtype  # type: ignore[operator]
                weights = head.packed(torch.from_numpy(self._ids).to(self._device), dtype)
                draft.draw_all(weights, state, torch.from_numpy(newest).to(self._device))
            else:
                for _ in range(depth):
                    state = head.absorb(state, torch.from_numpy(newest).to(self._device))
                    newest = draft.draw(head.logits(state))
        self._proposed = requests, draft.finish(max_draft_tokens)
        return self._proposed[1]

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the hidden states that the committed tokens were drawn from."""
        assert verified.hidden is not None, "the loop hands over hidden states"
        assert verified.hidden.last is not None, "and what the LM head reads"
        requests, count = verified.requests, verified.num_committed
        within = np.arange(int(count.max()))[None] < count[:, None]
        row, offset = np.nonzero(within)
        index = torch.from_numpy(verified.hidden.first[row] + offset).to(self._device)
        hidden = verified.hidden.last[index].detach()
        ends = torch.from_numpy(np.cumsum(count) - 1).to(self._device)
        self._newest[torch.from_numpy(requests).to(self._device)] = hidden[ends].float()
        kept = np.flatnonzero(self._kept[requests[row]])
        missed = self._missed_at(verified)
        if len(kept):
            states = hidden[torch.from_numpy(kept).to(self._device)]
            self._keep(sequences, verified, row[kept], offset[kept], states, missed[row[kept]] == offset[kept])
        fresh = self._log[self._num_read :]
        if verified.finished.any() and fresh:  # not on every step: each new token copies all rows
            self._rows.add(np.concatenate([entry[2] for entry in fresh]), self._bound())
            self._num_read = len(self._log)

    def _missed_at(self, verified: Verified) -> np.ndarray:
        """Offset of the committed token that this head drafted otherwise: int64 `[batch]`, -1 for none."""
        missed = np.full(len(verified.requests), -1)
        if self._proposed is not None:
            requests, draft = self._proposed
            row_of = {int(request): row for row, request in enumerate(verified.requests)}
            # A serving engine may have put a request off: nothing is known of its draft then.
            back = np.flatnonzero([int(request) in row_of for request in requests])
            rows = np.array([row_of[int(request)] for request in requests[back]], np.int64)
            tried, accepted = verified.outcome_of(draft.of(back), rows)
            missed[rows] = np.where(tried > accepted, accepted, -1)
            self._proposed = None
        return missed

    def _keep(
        self,
        sequences: Sequences,
        verified: Verified,
        row: np.ndarray,
        offset: np.ndarray,
        hidden: torch.Tensor,
        missed: np.ndarray,
    ) -> None:
        """Log tokens, by row and offset in what was verified, with what they were drawn from."""
        begins = sequences.lengths[verified.requests] - verified.num_committed
        tokens = verified.token_ids[row, offset]
        self._log.append((verified.requests[row], begins[row] + offset, tokens, hidden.to(torch.float16), missed))

    @_trainable
    def refresh(self, rollouts: Rollouts, policy_version: int) -> None:
        """Learn from the newest rollouts, within `budget_share` of the time since the last refresh.

        The budget is halved while training gains less than it costs, and doubled, up to the whole, while it pays. It is
        whole again at once where what was lost since the last refresh is worth it: the policy jumped, or has a new task.
        """
        self._end_call()
        self.policy_version = policy_version
        self._counts.fade()
        if not self._buffer.has_windows:
            return
        whole_s = self._budget_share * (self._clock() - self._began)
        # A point of agreement is about a point of the time that generating takes, in this step and some more.
        worth_s = (rollouts.generate_s or 0.0) * _LASTS_UPDATES

        def budget_s(agreement: float) -> float:
            if self.refreshes and (self.refreshes[-1].agreement_after - agreement) * worth_s > whole_s:
                self._cut = 1.0
            return whole_s * self._cut

        self._revise_vocabulary()
        done = distill(
            self._head, self._optimizer, self._buffer, self._target(rollouts.sequences), version=policy_version,
            budget_s=budget_s, loss=self._loss, rng=self._rng, clock=self._clock,
        )  # fmt: skip
        self.refreshes.append(done)
        if rollouts.generate_s is not None:
            gained_s = (done.agreement_after - done.agreement_before) * worth_s
            self._cut = min(1.0, 2 * self._cut) if gained_s >= done.seconds else max(_LEAST_CUT, self._cut / 2)
        self._trained, self._folded = True, None
        self._began = self._clock()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer moments, the reduced vocabulary and its counts; the buffer fills again within a step."""
        if self._policy is None:
            return {}
        used = np.flatnonzero(self._counts.counts)
        optimizer = self._optimizer.state_dict()["state"]
        return {
            "kind": _STATE_KIND,
            "version": _STATE_VERSION,
            "policy_version": self.policy_version,
            "trained": int(self._trained),
            "vocab_size": len(self._counts.counts),
            "hidden_size": self._head.hidden_size,
            "ids": self._ids.copy(),
            "counted_ids": used,
            "counts": self._counts.counts[used],
            "weights": {name: tensor.detach().clone() for name, tensor in self._head.state_dict().items()},
            "optimizer": {
                str(index): {name: torch.as_tensor(value).clone() for name, value in moments.items()}
                for index, moments in optimizer.items()
            },
        }

    @_trainable
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; that of a policy with other sizes is named and left, and drafting starts from nothing.

        Raises:
            ValueError: The state of another kind of speculator or of another format.
        """
        if not state:
            return
        if state.get("kind") != _STATE_KIND:
            raise ValueError(f"not a state of the recurrent drafter: kind is {state.get('kind')!r}")
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"recurrent drafter state has format {state.get('version')!r}, expected {_STATE_VERSION}")
        self._bound()
        theirs, own = (state["vocab_size"], state["hidden_size"]), (len(self._counts.counts), self._head.hidden_size)
        if theirs != own:
            logger.warning(
                "atlas_rl: the saved recurrent drafter belongs to a policy of %d tokens and hidden size %d, this one has "
                "%d and %d: it starts from nothing", *theirs, *own,
            )  # fmt: skip
            return
        self._reset(*own)
        self._counts.counts[np.asarray(state["counted_ids"])] = np.asarray(state["counts"])
        self._set_ids(np.asarray(state["ids"]))
        self._head.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in state["weights"].items()})
        self._optimizer = new_optimizer(self._head)
        described = self._optimizer.state_dict()
        described["state"] = {int(index): dict(moments) for index, moments in state["optimizer"].items()}
        self._optimizer.load_state_dict(described)
        self._trained = bool(state["trained"])
        self.policy_version = int(state["policy_version"])

    @_trainable
    def _reset(self, vocab_size: int, hidden_size: int) -> None:
        policy = self._bound()
        self._device = policy.get_output_embeddings().weight.device  # type: ignore[operator]
        self._head = RecurrentHead(hidden_size, min(hidden_size, _MAX_STATE_SIZE), self._seed).to(self._device)
        self._folded = None
        self._optimizer = new_optimizer(self._head)
        self._counts = TokenCounts(vocab_size)
        self._rows = TokenRows.empty(vocab_size, hidden_size, self._device)
        self._rows_version = None
        self._buffer = ReplayBuffer(self._max_tokens, self._missed_weight)
        self._rng = np.random.default_rng(self._seed)
        self._sequences = None
        self._newest = torch.zeros(0, hidden_size, device=self._device)
        self._kept = np.zeros(0, bool)
        self._log: list[tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor, np.ndarray]] = []
        self._proposed = None
        self._num_read = 0
        self._trained = False
        self._cut = 1.0
        self._set_ids(np.zeros(0, np.int64))

    def _bound(self) -> nn.Module:
        if self._policy is None:
            raise RuntimeError("the recurrent drafter has no policy yet: give it to an engine, or call bind(policy)")
        return self._policy

    def _end_call(self) -> None:
        """Move what the call left into the buffer."""
        if self._log and self._sequences is not None:
            requests, positions, tokens = (np.concatenate([entry[i] for entry in self._log]) for i in range(3))
            hidden, missed = torch.cat([entry[3] for entry in self._log]), np.concatenate([e[4] for e in self._log])
            self._buffer.add(requests, positions, tokens, hidden, missed, self._sequences.policy_version)
            self._counts.add(tokens)
        self._log, self._num_read, self._sequences = [], 0, None

    def _revise_vocabulary(self) -> None:
        """Take the tokens that the rollouts use by now; what was learned about those that stay is kept."""
        ids = self._counts.most_used(self._max_vocab)
        ids = ids[self._rows.slots[ids] >= 0]
        if np.array_equal(ids, self._ids) and len(self._head.outputs) == len(ids):
            return
        stayed = self._index_of[ids] < len(self._ids)
        slots = self._index_of[ids][stayed]
        moments = self._optimizer.state.get(self._head.bias, {})
        bias = self._head.bias.new_zeros(len(ids))
        kept = torch.from_numpy(np.flatnonzero(stayed)).to(self._device)
        taken = torch.from_numpy(slots).to(self._device)
        with torch.no_grad():
            bias[kept] = self._head.bias[taken]
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments:
                    moments[name] = moments[name].new_zeros(len(ids)).index_copy(0, kept, moments[name][taken])
            self._head.bias.data = bias
        self._set_ids(ids)
        self._set_tables()

    def _set_ids(self, ids: np.ndarray) -> None:
        self._ids = ids
        self._index_of = np.full(len(self._counts.counts), len(ids), np.int64)
        self._index_of[ids] = np.arange(len(ids))
        if self._head.vocab_size != len(ids):
            self._head.bias.data = self._head.bias.new_zeros(len(ids))

    @_trainable
    def _set_tables(self) -> None:
        if not len(self._ids):
            return
        self._rows.add(self._ids, self._bound())
        slots = torch.from_numpy(self._rows.slots[self._ids]).to(self._device)
        self._folded = None
        self._head.set_tables(self._rows.inputs[slots], self._rows.outputs[slots])

    def _target(self, sequences: Sequences) -> Target:
        slots = torch.from_numpy(self._rows.slots[self._ids]).to(self._device)
        config = self._bound().config.get_text_config()  # type: ignore[operator, union-attr]
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return Target(
            rows=self._rows.outputs[slots],
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=scale,
            temperature=1.0 if sequences.sampling.greedy else sequences.sampling.temperature,
            index_of=self._index_of,
        )
