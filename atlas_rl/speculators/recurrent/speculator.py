"""The drafter that learns during the run: a recurrent head trained on the run's rollouts after every policy update.

This module drafts: it keeps the head's inputs and draws its tokens. Learning is in `learner.py`. The head starts
untrained and drafts nothing before its first refresh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlas_kernels.dispatch import kernels_run_on
from atlas_rl.core import Draft, Hidden, Needs, Prompts, SamplingParams, Sequences, Verified
from atlas_rl.counts import bounds
from atlas_rl.policy.captures import Captured
from atlas_rl.policy.upload import uploaded
from atlas_rl.speculators.base import NO_PROMPTS, Coming
from atlas_rl.speculators.drawing import Drawing, draft_of, of_whole
from atlas_rl.speculators.drawn_rows import newest_indices, newest_places
from atlas_rl.speculators.head_sampling import HeadSampling
from atlas_rl.speculators.learning import LearningSpeculator
from atlas_rl.speculators.learning_budget import SHARE
from atlas_rl.speculators.recurrent.distill import Loss
from atlas_rl.speculators.recurrent.draft_graphs import DraftGraphs, FetchedDraft, cleared
from atlas_rl.speculators.recurrent.head import FoldedHead
from atlas_rl.speculators.recurrent.learner import OWNER, LearnSettings, RecurrentLearner
from atlas_rl.speculators.saved_state import SavedState
from atlas_rl.speculators.warm_up import draw_from_head

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

_MAX_SIZE = 2**31 - 1
_USUAL = LearnSettings()


class RecurrentSpeculator(LearningSpeculator[RecurrentLearner]):
    """Drafts with a small recurrent network that follows the policy.

    Coupled to the policy's noise, a draft token is the head's own choice under the noise of its position (acceptance
    close to 1 - TV). Without coupling it is an independent draw from `Draft.draft_probs`.

    Args:
        loss: See `LearnSettings`, here and for the next four.
        max_vocab: Most tokens that the head can propose.
        max_tokens: Most rollout tokens kept to learn from.
        missed_weight: Weight of places where its drafts were rejected.
        seed: Seed of the initial weights and of the training windows.
        budget_share: See `LearningSpeculator`, here and for the next one.
        clock: Returns seconds.
        argmax: Draft the likeliest token instead of drawing: for comparisons.
    """

    name = "recurrent"
    needs = Needs(head_inputs=True)
    _owner, _unlearned = OWNER, "drafts nothing"
    _state_format = "atlas_rl.recurrent", 1
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
        super().__init__(budget_share, clock)
        self._settings = LearnSettings(loss, max_vocab, max_tokens, missed_weight, seed)
        self._argmax = argmax
        self._graphs = DraftGraphs(capture=False)
        # Folded head of a learner's revision, made when first needed.
        self._folded: tuple[int, FoldedHead, torch.Tensor] | None = None
        self._index_of: tuple[int, torch.Tensor] | None = None  # `learner.index_of` on the device, likewise
        self._newest: torch.Tensor  # [num_requests, hidden], source state of each newest token
        self._proposed: _Proposed | None = None  # since the last verification
        self._ahead: _Proposed | None = None  # for the step after the outcome that is observed next
        self._kept: Hidden | None = None  # states of which the device keeps the newest already

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy, on its device; the learned state is kept if the sizes are equal."""
        super().bind(policy, couples_noise)
        known = self.learner.sizes if self._is_bound else None
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
        self._reset(policy, RecurrentLearner(policy, self._settings, self._clock))

    def compile_for(self, sampling: SamplingParams) -> None:
        """Compile even before it has learned: it may draft in the next call, with a vocabulary not known yet."""
        if not self._follows or not kernels_run_on(self._device):
            return
        policy = self._bound()
        sizes = min(self._settings.max_vocab, policy.vocab_size), self.learner.head.cell.hidden_size
        draw_from_head(self._sampling_of(sampling), sizes, self._device, dtype=policy.dtype)

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
        self.end_study()
        self.learner.begin_call(sequences, self._bound())
        self._proposed, self._ahead, self._kept = None, None, None
        self._newest = cleared(self._newest, len(sequences.lengths))
        self._graphs.begin_call()

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        """0: it never has to catch up. None before it has learned."""
        return 0 if self._is_bound and self._follows and self.learner.trained else None

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request; all rows run to the longest wanted draft, shorter ones are cut."""
        learner = self.learner
        if bounds(max_draft_tokens)[1] <= 0 or not learner.trained:
            return Draft.empty(len(requests))
        newest = newest_indices(requests, sequences.lengths, sequences.token_ids, learner.index_of)
        if self._draws_by_kernel(sequences.sampling):
            draft = self._draft_at_once(sequences, requests, newest, max_draft_tokens)
        else:
            draft = self._draft_by_steps(sequences, requests, newest, max_draft_tokens)
        self._proposed = _Proposed(requests, draft)
        return draft

    def drafts_ahead(self, sampling: SamplingParams) -> bool:
        return self._couples_noise and self._follows and self.learner.trained and self._draws_by_kernel(sampling)

    def propose_ahead(self, sequences: Sequences, coming: Coming, num_tokens: int) -> Callable[[], Draft]:
        """Queue a draft for every request. Its inputs, the states that `observe` would keep included, stay on the device."""
        requests = coming.requests
        _, keys = sequences.draft_noise(requests, self._couples_noise)
        known = np.stack([requests, keys.view(np.int64), sequences.lengths[requests] + 1, coming.hidden.starts])
        fetch = self._queue_ahead(sequences, coming, known, num_tokens)
        self._kept, self._ahead = coming.hidden, _Proposed(requests)
        return partial(self._take_ahead, fetch, self._ahead, num_tokens, sequences.sampling.stops)

    @property
    def once_s(self) -> float:
        return self._graphs.capture_s

    def _take_ahead(
        self, fetch: Callable[[], FetchedDraft], proposed: _Proposed, num_tokens: int, stops: np.ndarray
    ) -> Draft:
        """Wait for a draft that was queued ahead."""
        drawn, most = fetch(), np.full(len(proposed.requests), num_tokens)
        proposed.draft = draft_of(self.name, drawn.token_ids, drawn.max_probs, most, stops, None)
        return proposed.draft

    @torch.no_grad()
    def _queue_ahead(
        self, sequences: Sequences, coming: Coming, known: np.ndarray, num_tokens: int
    ) -> Callable[[], FetchedDraft]:
        """Queue the device work of `propose_ahead`.

        Args:
            sequences: All requests.
            coming: The outcome, on the device.
            known: int64 `[4, batch]`: request, bits of the noise key, index in the whole sequence of the first drafted token
                if no draft is accepted, and first position in the forward.
            num_tokens: Draft tokens of each request.
        """
        head, token_ids = self._folded_head()
        requests, keys, positions, starts = uploaded(known, self._device).unbind()
        places = starts + coming.num_accepted
        self._keep(coming.hidden.head_inputs, torch.stack([places, requests]))
        # Where the logits are no distribution, the choice may be no token; the loop drops the draft then.
        newest = coming.token_ids.index_select(0, places).clamp(0, sequences.vocab_size - 1)
        inputs = torch.stack([requests, keys, positions + coming.num_accepted, self._indices().index_select(0, newest)])
        weights, sampling = head.packed(token_ids, self._bound().dtype), self._sampling_of(sequences.sampling)
        return self._graphs.queue(head, weights, self._newest, inputs, num_tokens, sampling)

    def _draws_by_kernel(self, sampling: SamplingParams) -> bool:
        """Whether the draft head kernel draws. At temperature 0 it takes the likeliest token, and only then."""
        return kernels_run_on(self._device) and (sampling.greedy or not self._argmax)

    def _draft_at_once(
        self, sequences: Sequences, requests: np.ndarray, newest: np.ndarray, max_draft_tokens: np.ndarray
    ) -> Draft:
        """Draft by the draft head kernel: one piece of work for the device (`draft_graphs.py`)."""
        head, token_ids = self._folded_head()
        sampling = self._sampling_of(sequences.sampling)
        _, keys = sequences.draft_noise(requests, self._couples_noise)
        drawn = self._graphs.run(
            head,
            head.packed(token_ids, self._bound().dtype),
            self._newest,
            np.stack([requests, keys.view(np.int64), sequences.lengths[requests], newest]),
            bounds(max_draft_tokens)[1],
            sampling,
        )
        probs = None if drawn.probs is None else of_whole(drawn.probs, token_ids, sequences.vocab_size)
        stops = sequences.sampling.stops
        return draft_of(self.name, drawn.token_ids, drawn.max_probs, max_draft_tokens, stops, probs)

    def _draft_by_steps(
        self, sequences: Sequences, requests: np.ndarray, newest: np.ndarray, max_draft_tokens: np.ndarray
    ) -> Draft:
        """Draft with torch's operations, token by token."""
        head, token_ids = self._folded_head()
        depth = bounds(max_draft_tokens)[1]
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
        self._draw(head, drawing, depth)
        return drawing.finish(max_draft_tokens)

    def _draw(self, head: FoldedHead, drawing: Drawing, depth: int) -> None:
        """Queue all device work of a draft, token by token."""
        rows, indices = drawing.carried
        with torch.no_grad():
            state = head.begin(self._newest[rows])
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
        if verified.hidden is not self._kept:
            self._keep(verified.hidden.head_inputs, uploaded(places, self._device))
        self._kept = None
        proposed, self._proposed, self._ahead = self._proposed, self._ahead, None
        self._put_off = partial(self._log, verified, begins, proposed)

    def _keep(self, states: torch.Tensor, places: torch.Tensor) -> None:
        """Queue the device work of `observe`: keep the states at `places[0]` for the requests `places[1]`."""
        ends, requests = places.unbind()
        self._newest.index_copy_(0, requests, states.detach().index_select(0, ends).float())

    def _log(
        self,
        verified: Verified,
        begins: np.ndarray,
        proposed: _Proposed | None,
    ) -> None:
        self.learner.observe(verified, begins, _missed_at(verified, proposed), self._bound())

    def release(self) -> None:
        """Drop the drafts of a call that was broken off. Graphs stay, and the states at whose addresses they read."""
        super().release()
        self._proposed, self._ahead, self._kept = None, None, None

    def take_captured(self) -> Captured:
        return self._graphs.take_captured()

    def weights(self) -> Iterable[torch.Tensor]:
        return self.learner.head.parameters() if self._is_bound else ()

    def _restore(self, saved: SavedState) -> bool:
        """Take over the state of a learner for a policy of the same sizes."""
        policy = self._bound()
        theirs = saved.integer("vocab_size", 1, _MAX_SIZE), saved.integer("hidden_size", 1, _MAX_SIZE)
        own = self.learner.sizes
        if theirs != own:
            logger.warning(
                "atlas_rl: the saved recurrent drafter belongs to a policy of %d tokens and hidden size %d, this one has "
                "%d and %d: it starts from nothing", *theirs, *own,
            )  # fmt: skip
            return False
        learner = RecurrentLearner(policy, self._settings, self._clock)
        learner.load_state_dict(saved)
        self._reset(policy, learner)
        return True

    def _reset(self, policy: PolicyView, learner: RecurrentLearner) -> None:
        self._device, self.learner = policy.device, learner
        self._graphs = DraftGraphs(capture=policy.device.type == "cuda")
        self._newest = torch.zeros(0, policy.hidden_size, dtype=torch.float32, device=self._device)
        self._folded, self._index_of, self._put_off = None, None, None
        self._proposed, self._ahead, self._kept = None, None, None

    def _sampling_of(self, sampling: SamplingParams) -> HeadSampling:
        return HeadSampling.of(sampling, couples_noise=self._couples_noise)

    @torch.inference_mode(False)  # its tensors outlive a call
    def _folded_head(self) -> tuple[FoldedHead, torch.Tensor]:
        """The present head for drafting, and its token ids, int64 `[vocab]` on the device."""
        if self._folded is None or self._folded[0] != self.learner.revision:
            token_ids = uploaded(self.learner.ids, self._device)
            former = None if self._folded is None else self._folded[1]
            self._folded = self.learner.revision, FoldedHead(self.learner.head, former), token_ids
        return self._folded[1:]

    @torch.inference_mode(False)
    def _indices(self) -> torch.Tensor:
        """`learner.index_of` on the device."""
        if self._index_of is None or self._index_of[0] != self.learner.revision:
            self._index_of = self.learner.revision, uploaded(self.learner.index_of, self._device)
        return self._index_of[1]


@dataclass(slots=True)
class _Proposed:
    """Requests, int64 `[n]`, and their drafts; None for drafts that were queued ahead and have not been fetched."""

    requests: np.ndarray
    draft: Draft | None = None


def _missed_at(verified: Verified, proposed: _Proposed | None) -> np.ndarray:
    """Offset of the first committed token that differs from the head's draft: int64 `[batch]`, -1 for none.

    Args:
        verified: Committed tokens.
        proposed: What the head drafted since the previous verification.
    """
    missed = np.full(len(verified.requests), -1)
    if proposed is None or proposed.draft is None:
        return missed
    requests, draft = proposed.requests, proposed.draft
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
