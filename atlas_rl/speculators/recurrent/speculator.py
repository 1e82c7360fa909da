"""The drafter that learns during the run: a recurrent head trained on the run's rollouts after every policy update.

This module drafts: it keeps the head's inputs and draws its tokens. Learning is in `learner.py`. The head starts
untrained and drafts nothing before its first refresh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atlas_kernels.dispatch import kernels_run_on
from atlas_rl.core import Draft, Needs, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.counts import bounds
from atlas_rl.policy.upload import uploaded
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.drawing import Drawing
from atlas_rl.speculators.drawn_rows import newest_indices, newest_places
from atlas_rl.speculators.learning_budget import SHARE, Distilled, LearningBudget
from atlas_rl.speculators.recurrent.distill import Loss
from atlas_rl.speculators.recurrent.head import FoldedHead
from atlas_rl.speculators.recurrent.learner import Learner, LearnSettings
from atlas_rl.speculators.saved_state import SavedState
from atlas_rl.speculators.warm_up import draw_from_head

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

_STATE_KIND, _STATE_VERSION = "atlas_rl.recurrent", 1
_MAX_SIZE = 2**31 - 1
_USUAL = LearnSettings()


class RecurrentSpeculator(Speculator):
    """Drafts with a small recurrent network that follows the policy.

    Coupled to the policy's noise, a draft token is the head's own choice under the noise of its position (acceptance
    close to 1 - TV). Without coupling it is an independent draw from `Draft.draft_probs`.

    Args:
        loss: See `LearnSettings`, here and for the next four.
        max_vocab: Most tokens that the head can propose.
        max_tokens: Most rollout tokens kept to learn from.
        missed_weight: Weight of places where its drafts were rejected.
        seed: Seed of the initial weights and of the training windows.
        budget_share: Largest share of the time between two refreshes that the later one may take, divided among all
            heads that learn.
        clock: Returns seconds.
        argmax: Draft the likeliest token instead of drawing: for comparisons.

    Attributes:
        policy_version: Policy version of the latest refresh; -1 before.
        refreshes: Report of every refresh.
        budget: Time budget for learning.
        learner: Owns the head and its training data; exists once the speculator is bound.
    """

    name = "recurrent"
    needs = Needs(head_inputs=True)
    observes_late = True

    def __init__(
        self,
        *,
        loss: Loss = _USUAL.loss,
        max_vocab: int = _USUAL.max_vocab,
        max_tokens: int = _USUAL.max_tokens,
        missed_weight: float = _USUAL.missed_weight,
        seed: int = _USUAL.seed,
        budget_share: float = SHARE,
        clock: Callable[[], float] = time.perf_counter,
        argmax: bool = False,
    ) -> None:
        self.policy_version = -1
        self.refreshes: list[Distilled] = []
        self._settings = LearnSettings(loss, max_vocab, max_tokens, missed_weight, seed)
        self._clock, self._argmax = clock, argmax
        self.budget = LearningBudget(budget_share, clock)
        self._policy: PolicyView | None = None
        self._follows = True  # whether the form of the policy's logits is known
        self.learner: Learner
        # Folded head of a learner's revision, made when first needed.
        self._folded: tuple[int, FoldedHead, torch.Tensor] | None = None
        self._newest: torch.Tensor  # [num_requests, hidden], source state of each newest token
        self._proposed: tuple[np.ndarray, Draft] | None = None  # requests and drafts since the last verification
        self._put_off: Callable[[], None] | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy, on its device; the learned state is kept if the sizes are equal."""
        super().bind(policy, couples_noise)
        self._follows = policy.form is not None
        if not self._follows:
            logger.warning(
                "atlas_rl: the policy's logits are not a scaled or capped output of its LM head: the recurrent drafter "
                "cannot learn them and drafts nothing"
            )
        known = None if self._policy is None else self.learner.sizes
        self._policy = policy
        sizes = (policy.vocab_size, policy.hidden_size)
        if known == sizes:
            self.learner.forget_tables()
            self.learner.move_to(policy.device)
            self._reset(policy, self.learner)
            return
        if known is not None:
            logger.warning(
                "atlas_rl: the policy now has %d tokens and hidden size %d instead of %d and %d: the recurrent drafter "
                "starts from nothing", *sizes, *known,
            )  # fmt: skip
        self._reset(policy, Learner(policy, self._settings, self._clock))

    def compile_for(self, sampling: SamplingParams) -> None:
        """Compile even before it has learned: it may draft in the next call, with a vocabulary not known yet."""
        if not self._follows or not kernels_run_on(self._device):
            return
        policy = self._bound()
        sizes = policy.vocab_size, min(self._settings.max_vocab, policy.vocab_size), self.learner.head.cell.hidden_size
        draw_from_head(sampling, sizes, self._device, couples_noise=self._couples_noise, dtype=policy.dtype)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """A new `Sequences` starts a new call; embeddings are re-read if the policy version changed."""
        if not self._follows or sequences is self.learner.sequences:
            return
        self.learn()
        self.learner.begin_call(sequences, self._bound())
        self._proposed = None
        shape = len(sequences.lengths), self.learner.head.hidden_size
        self._newest = torch.zeros(shape, dtype=torch.float32, device=self._device)

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        """0: it never has to catch up. None before it has learned."""
        return 0 if self._policy is not None and self._follows and self.learner.trained else None

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request; all rows run to the longest wanted draft, shorter ones are cut."""
        depth, learner = bounds(max_draft_tokens)[1], self.learner
        if depth <= 0 or not learner.trained:
            return Draft.empty(len(requests))
        head, token_ids = self._folded_head()
        newest = newest_indices(requests, sequences.lengths, sequences.token_ids, learner.index_of)
        drawing = Drawing(
            self.name,
            sequences,
            requests,
            np.full(len(requests), depth),
            self._device,
            couples_noise=self._couples_noise,
            token_ids=token_ids,
            argmax=self._argmax,
            carried=(requests, newest),
        )
        self._draw(head, token_ids, drawing, depth)
        self._proposed = requests, drawing.finish(max_draft_tokens)
        return self._proposed[1]

    def _draw(self, head: FoldedHead, token_ids: torch.Tensor, drawing: Drawing, depth: int) -> None:
        """Queue all device work of a draft."""
        rows, indices = drawing.carried
        with torch.no_grad():
            state = head.begin(self._newest[rows])
            if kernels_run_on(self._device) and drawing.by_kernel:
                drawing.draw_all(head.packed(token_ids, self._bound().dtype), state, indices)
                return
            for _ in range(depth):
                state = head.absorb(state, indices)
                indices = drawing.draw(head.logits(state))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the hidden states that the newest tokens were drawn from; `learn` logs all others."""
        self.learn()
        if not self._follows:
            return
        # Compiled code does not check bounds.
        assert len(verified.hidden.starts) == len(verified.requests), "states of every request: see `needs`"
        places, begins = newest_places(
            verified.hidden.starts, verified.num_committed, verified.requests, sequences.lengths
        )
        self._keep(verified.hidden.head_inputs, uploaded(places, self._device))
        proposed, self._proposed = self._proposed, None
        self._put_off = partial(self._log, verified, begins, proposed)

    def _keep(self, states: torch.Tensor, places: torch.Tensor) -> None:
        """Queue the device work of `observe`: keep the states at `places[0]` for the requests `places[1]`."""
        ends, requests = places.unbind()
        self._newest.index_copy_(0, requests, states.detach().index_select(0, ends).float())

    def learn(self) -> None:
        """Log the latest tokens as training data for the refresh."""
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off()

    def _log(
        self,
        verified: Verified,
        begins: np.ndarray,
        proposed: tuple[np.ndarray, Draft] | None,
    ) -> None:
        self.learner.observe(verified, begins, _missed_at(verified, proposed), self._bound())

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Learn from the newest rollouts, as long as the budget lasts."""
        with self.budget.refreshing(rollouts, self.name) as in_time:
            self.learn()
            self.policy_version = policy_version
            if self._follows:
                done = self.learner.refresh(rollouts, policy_version, self._bound(), self.budget, in_time)
                if done is not None:
                    self.refreshes.append(done)
        return np.cumprod(self.refreshes[-1].by_position) if self.refreshes else None

    def shared(self) -> torch.Tensor | None:
        return self.learner.shared() if self._policy is not None and self._follows else None

    def take_shared(self, total: torch.Tensor) -> None:
        self.learner.take_shared(total)

    def weights(self) -> Iterable[torch.Tensor]:
        return self.learner.head.parameters() if self._policy is not None else ()

    def state_dict(self) -> dict[str, Any]:
        """Learned state, and the sizes of its policy."""
        self.learn()
        if self._policy is None:
            return {}
        vocab_size, hidden_size = self.learner.sizes
        return {
            "kind": _STATE_KIND,
            "version": _STATE_VERSION,
            "policy_version": self.policy_version,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            **self.learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. A state for other sizes gives a warning, and the head starts untrained.

        Raises:
            ValueError: The state is of another kind of speculator or another format, or damaged; nothing has changed
                then.
        """
        if isinstance(state, Mapping) and not state:
            return
        saved = SavedState(state, "recurrent drafter")
        saved.check_kind(_STATE_KIND, _STATE_VERSION)
        policy = self._bound()
        theirs = saved.integer("vocab_size", 1, _MAX_SIZE), saved.integer("hidden_size", 1, _MAX_SIZE)
        own = self.learner.sizes
        if theirs != own:
            logger.warning(
                "atlas_rl: the saved recurrent drafter belongs to a policy of %d tokens and hidden size %d, this one has "
                "%d and %d: it starts from nothing", *theirs, *own,
            )  # fmt: skip
            return
        version, learner = saved.policy_version(), Learner(policy, self._settings, self._clock)
        learner.load_state_dict(saved)
        self._reset(policy, learner)
        self.policy_version = version

    def _reset(self, policy: PolicyView, learner: Learner) -> None:
        self._device, self.learner = policy.device, learner
        self._newest = torch.zeros(0, policy.hidden_size, dtype=torch.float32, device=self._device)
        self._folded, self._proposed, self._put_off = None, None, None

    def _bound(self) -> PolicyView:
        if self._policy is None:
            raise RuntimeError("the recurrent drafter has no policy yet: give it to an engine, or call bind(policy)")
        return self._policy

    def _folded_head(self) -> tuple[FoldedHead, torch.Tensor]:
        """The present head for drafting, and its token ids, int64 `[vocab]` on the device."""
        if self._folded is None or self._folded[0] != self.learner.revision:
            token_ids = uploaded(self.learner.ids, self._device)
            self._folded = self.learner.revision, FoldedHead(self.learner.head), token_ids
        return self._folded[1:]


def _missed_at(verified: Verified, proposed: tuple[np.ndarray, Draft] | None) -> np.ndarray:
    """Offset of the first committed token that differs from the head's draft: int64 `[batch]`, -1 for none.

    Args:
        verified: Committed tokens.
        proposed: Requests that the head drafted for since the previous verification, and its drafts.
    """
    missed = np.full(len(verified.requests), -1)
    if proposed is None:
        return missed
    requests, draft = proposed
    if np.array_equal(requests, verified.requests):  # the usual case
        tried, accepted = verified.outcome_of(draft)
        return np.where(tried > accepted, accepted, -1)
    # Not all requests may have a draft: a controller asks for some only, and a serving engine may postpone a request,
    # whose draft is then unknown.
    order = np.argsort(verified.requests)
    at = np.minimum(np.searchsorted(verified.requests, requests, sorter=order), len(order) - 1)
    back = np.flatnonzero(verified.requests[order[at]] == requests)
    rows = order[at[back]]
    tokens = Draft(draft.token_ids[back], draft.lengths[back], draft.confidence[back])
    tried, accepted = verified.outcome_of(tokens, rows)
    missed[rows] = np.where(tried > accepted, accepted, -1)
    return missed
