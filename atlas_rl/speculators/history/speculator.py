"""History index: drafts the tokens that followed the same context in recent rollouts.

The light part of the adaptive speculator. The next rollout may repeat any recent text of the run: the siblings of its
group, which answer the same prompt now; rollouts of the same prompt in earlier epochs; the prompt itself; the request's
own earlier tokens. The index finds places with the same preceding tokens (`store.py`, `match.py`) and weighs what
followed them by how reliable such places have been (`mixture.py`).

Where the policy branches, the counts approximate its distribution. With coupled noise the draft is drawn from them with
the policy's own noise, and is right with probability near 1 - TV(counts, policy); the likeliest token alone would be
right with probability max p.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from atlas_rl.core import Draft, Prompts, Rollouts, Sequences, Verified
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.history.match import new_cursors
from atlas_rl.speculators.history.mixture import COUPLED, ONE_HOT, model_from_state, model_state, new_model
from atlas_rl.speculators.history.rows import draft_parts, draft_rows, follow_rows, learn_rows, search_rows
from atlas_rl.speculators.history.store import Archive, LiveIndex, prompt_tags
from atlas_rl.speculators.history.threads import ONE, Forms, usable_threads
from atlas_rl.speculators.saved_state import SavedState

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

_STATE_KIND = "atlas_rl.history"
_STATE_VERSION = 1


class _PutOff(NamedTuple):
    """Tokens of one step to learn from later.

    Attributes:
        requests: int64 `[n]`.
        starts: int64 `[n]`, their first position.
        ends: int64 `[n]`, one beyond their last position.
        finished: bool `[n]`, requests that end with them.
        mode: The draft mode.
    """

    requests: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    finished: np.ndarray
    mode: int


class HistorySpeculator(Speculator):
    """Drafts from the running requests and a bounded archive of finished ones.

    Finished requests stay in the live index, where their siblings keep matching them, and are archived together when
    the call ends (`refresh`, the first `start` of another call, or `state_dict`). So indexing them costs nothing while
    decoding, no token is found twice, and an aborted call leaves the archive intact: only finished requests are
    written, each as a whole.

    Args:
        max_tokens: Capacity of the archive in tokens; the oldest rollouts are dropped first.
        threads: Parts that a draft is divided into, for as many threads if the process may use them; None is the number of
            threads that it may use, and one for a policy on a CPU, which needs the cores itself.
    """

    name = "history"
    observes_late = True

    def __init__(self, max_tokens: int = 4_000_000, threads: int | None = None) -> None:
        self._given_threads = threads
        self._take_threads(threads or usable_threads())
        self.policy_version = -1
        self._vocab_size: int | None = None  # of the bound policy
        self._archive = Archive(max_tokens)
        self._model = new_model()
        self._archived: Sequences | None = None  # the call archived last, so that `refresh` skips it
        self._sequences: Sequences | None = None
        self._live: LiveIndex | None = None
        self._finished: list[int] = []
        self._cursors, self._counts, self._observed = new_cursors(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
        # Number of cursors including those that the latest search found, and its position: -1 if the history has grown.
        self._found, self._found_at = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._put_off: _PutOff | None = None
        self._ends: _PutOff | None = None  # the newest, until its ends have been searched
        self._met, self._met_counts = new_cursors(0), np.zeros(0, np.int64)  # cursors at its tokens

    def _take_threads(self, threads: int) -> None:
        self._forms, self._num_threads = Forms(threads), min(threads, usable_threads())

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy. An archive with tokens beyond its vocabulary is dropped: drafts index its logits."""
        super().bind(policy, couples_noise)
        if self._given_threads is None:
            self._take_threads(1 if policy.device.type == "cpu" else usable_threads())
        self._vocab_size = policy.vocab_size
        if self._archive.largest_token >= policy.vocab_size:
            logger.warning(
                "atlas_rl: the history index holds tokens up to %d, the policy now has %d: it starts from nothing",
                self._archive.largest_token,
                policy.vocab_size,
            )
            self._close_call()
            self._archive = Archive(self._archive.max_tokens)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Index the texts of new requests: their prompts, and what a request that has moved here generated before."""
        if sequences is not self._sequences:
            self._end_call()
            num_requests = len(sequences.lengths)
            self._sequences = sequences
            self._live = LiveIndex(sequences)
            self._cursors = new_cursors(num_requests)
            self._counts = np.zeros(num_requests, np.int64)
            self._observed = np.zeros(num_requests, np.int64)
            self._found, self._found_at = np.zeros(num_requests, np.int64), np.zeros(num_requests, np.int64)
        live = self._live_of(sequences)
        self._found_at[:] = -1  # the history has grown
        live.add(sequences, requests)
        self._observed[requests] = sequences.lengths[requests]

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for each request: the likeliest continuation, or the one chosen by the coupled noise."""
        arguments = (
            requests, sequences.lengths, max_draft_tokens, self._cursors, self._counts, self._found, self._found_at,
            *self._live_of(sequences).view, *self._archive.view, *self._model,
            self._mode(sequences), sequences.noise_keys, sequences.sampling.stops,
        )  # fmt: skip
        if self._forms.threads == 1 or len(requests) == 1 or not max_draft_tokens.any():
            tokens, confidence, lengths = draft_rows(*arguments)
        else:
            work = len(requests) * int(max_draft_tokens.max())
            tokens, confidence, lengths = self._draft_in_form(self._forms.choose(work), work, arguments)
        return Draft(tokens, lengths, confidence)

    def _draft_in_form(self, form: int, work: int, arguments: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        """Results of `draft_rows`, on one thread or in parallel; the drafts do not depend on it."""
        began = time.perf_counter()
        if form == ONE:
            drafts = draft_rows(*arguments)
        else:
            before = numba.get_num_threads()  # of this Python thread
            numba.set_num_threads(self._num_threads)
            try:
                drafts = draft_parts(self._forms.threads, *arguments)
            finally:
                numba.set_num_threads(before)
        self._forms.took(work, form, time.perf_counter() - began)
        return drafts

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Move the cursors past committed tokens and index the tokens; `learn` scores the predictions later."""
        self._score()
        live, requests = self._live_of(sequences), verified.requests
        while True:
            num_tokens, starts, ends = follow_rows(
                requests, sequences.lengths, self._observed, live.most, self._cursors, self._counts, self._found,
                self._found_at, *live.view, *self._archive.view, self._met, self._met_counts,
            )  # fmt: skip
            if num_tokens <= len(self._met):
                break
            self._met, self._met_counts = new_cursors(2 * num_tokens), np.zeros(2 * num_tokens, np.int64)
        self._put_off = self._ends = _PutOff(requests, starts, ends, verified.finished, self._mode(sequences))

    def learn(self) -> None:
        """Score the cursors' predictions of the latest tokens, and search where requests without a draft now end."""
        self._score()
        ahead, self._ends = self._ends, None
        if ahead is not None and self._live is not None:
            search_rows(
                ahead.requests, ahead.ends, ahead.finished, self._cursors, self._counts, self._found, self._found_at,
                *self._live.view, *self._archive.view,
            )  # fmt: skip

    def _score(self) -> None:
        """Score the cursors' predictions of the latest tokens, and take note of the requests that ended with them."""
        if self._put_off is not None and self._live is not None and self._sequences is not None:
            requests, starts, ends, finished, mode = self._put_off
            learn_rows(
                requests, starts, ends, self._live.view.tokens, self._met, self._met_counts, *self._model, mode,
                self._sequences.noise_keys,
            )  # fmt: skip
            self._finished.extend(requests[finished].tolist())
        self._put_off = None

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Archive the call that made `rollouts`, and other ranks' calls; the oldest rollouts are overwritten."""
        self._end_call()
        for sequences in rollouts.elsewhere:
            self._archive_rollouts(sequences, list(range(len(sequences.lengths))))
        if rollouts.sequences is not self._archived:
            self._archive_rollouts(rollouts.sequences, list(range(len(rollouts.sequences.lengths))))
            self._archived = rollouts.sequences
        self.policy_version = policy_version
        return None

    def state_dict(self) -> dict[str, Any]:
        """The archive, including rollouts finished so far, and learned weights; a running call is not disturbed."""
        self._score()
        self._archive_finished()
        return {
            "kind": _STATE_KIND,
            "version": _STATE_VERSION,
            "policy_version": self.policy_version,
            "archive": self._archive.state_dict(),
            "model": model_state(self._model),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`.

        Raises:
            ValueError: The state is of another speculator or format, has tokens that the policy lacks, or is damaged;
                nothing has changed then.
        """
        saved = SavedState(state, "history index")
        saved.check_kind(_STATE_KIND, _STATE_VERSION)
        version, model = saved.policy_version(), model_from_state(saved.part("model"))
        archive = Archive.from_state(saved.part("archive"), self._archive.max_tokens, self._vocab_size)
        self._close_call()
        self._archive, self._model, self.policy_version = archive, model, version

    @property
    def nbytes(self) -> int:
        """Bytes of the archive and of the present call's index."""
        live = 0 if self._live is None else self._live.nbytes + self._cursors.nbytes
        return self._archive.nbytes + live

    @property
    def num_archived_tokens(self) -> int:
        """Tokens in the archive, including one separator per rollout."""
        return len(self._archive)

    def _mode(self, sequences: Sequences) -> int:
        return COUPLED if self._couples_noise and not sequences.sampling.greedy else ONE_HOT

    def _live_of(self, sequences: Sequences) -> LiveIndex:
        if sequences is not self._sequences or self._live is None:
            raise RuntimeError("history index: these sequences were not started, or another call has begun since")
        self._live.follow(sequences)
        return self._live

    def _end_call(self) -> None:
        """Archive the finished requests of the present call and drop its index."""
        self._score()
        self._archive_finished()
        if self._sequences is not None:
            self._archived = self._sequences
        self._close_call()

    def _archive_finished(self) -> None:
        if self._sequences is not None:
            self._archive_rollouts(self._sequences, self._finished)
        self._finished = []

    def _archive_rollouts(self, sequences: Sequences, requests: list[int]) -> None:
        """Archive requests; each prompt is indexed in full only with its first rollout."""
        tags = prompt_tags(sequences.prompt_keys)
        self._found_at[:] = -1  # the history has grown
        seen: set[int] = set()
        for request in requests:
            tag = int(tags[request])
            self._archive.append(
                sequences.token_ids[request, : sequences.lengths[request]],
                int(sequences.prompt_lengths[request]),
                tag,
                index_prompt=tag not in seen,
                policy_version=sequences.policy_version,
            )
            seen.add(tag)

    def _close_call(self) -> None:
        self._put_off, self._ends = None, None
        self._sequences, self._live, self._finished = None, None, []
