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
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.core import Draft, Prompts, Rollouts, Sequences, Verified
from atlas_rl.counts import bounds
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.history.match import advance, new_cursors, refill
from atlas_rl.speculators.history.mixture import (
    COUPLED,
    ONE_HOT,
    Model,
    choose,
    confidence_of,
    learn,
    mix,
    model_from_state,
    model_state,
    new_model,
    new_scratch,
)
from atlas_rl.speculators.history.store import (
    MAX_MATCH,
    Archive,
    ArchiveView,
    LiveIndex,
    LiveView,
    index_live,
    prompt_tags,
)
from atlas_rl.speculators.saved_state import SavedState

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

logger = logging.getLogger(__name__)

_STATE_KIND = "atlas_rl.history"
_STATE_VERSION = 1
_CONFIDENCE_FLOOR = 0.01


@numba.njit
def _draft_row(request, length, want, cursors, count, live, archive, model, scratch, mode, key, stops, out, confidence):
    """Draft up to `want` tokens of one request from its `count` cursors, which are consumed; returns how many.

    The cursors are already refilled for the first token.
    """
    end = min(length, MAX_MATCH)
    context = np.empty(MAX_MATCH + want, np.int32)
    context[:end] = live.tokens[request, length - end : length]
    for drafted in range(want):
        position = length + drafted
        if drafted > 0:
            count = refill(cursors, count, context, end, request, live, archive)
        if count == 0:
            return drafted
        at = mix(cursors, count, model, scratch)
        best = choose(cursors, count, at, model, scratch, mode, key, position, False)
        confidence[drafted] = confidence_of(model.confidence[mode], scratch.features)
        if confidence[drafted] < _CONFIDENCE_FLOOR:
            return drafted
        token = scratch.tokens[best]
        out[drafted] = token
        context[end] = token
        end += 1
        if token in stops:
            return drafted + 1
        count = advance(cursors, count, token, context, end, position + 1, request, live, archive)
    return want


@cached_njit(nogil=True)
def _draft_rows(
    requests, lengths, want, cursors, counts, found, found_at,
    tokens, links, heads, indexed, prompt_lengths, tags, nodes, archive_heads, cursor,
    log_weights, escapes, exponents, certainty,
    mode, keys, stops, out, confidence,
):  # fmt: skip
    """Draft every row after the `lengths` of all requests; returns the lengths of the drafts.

    A request has `counts[request]` cursors. A search appends more: `found[request]` in all, valid at the position
    `found_at[request]`. `counts` does not change, so a later search, in a history that has grown, starts from the same
    cursors as if no draft had been asked for before.

    `LiveView`, `ArchiveView` and `Model` are passed array by array: numba takes microseconds to unpack a named tuple.
    """
    live = LiveView(tokens, links, heads, indexed, prompt_lengths, tags)
    archive = ArchiveView(nodes, archive_heads, cursor)
    model = Model(log_weights, escapes, exponents, certainty)
    drafted = np.zeros(len(requests), np.int64)
    own = np.empty_like(cursors[0])
    scratch = new_scratch(model)
    for i in range(len(requests)):
        request, length = requests[i], lengths[requests[i]]
        if want[i] <= 0:
            continue
        if found_at[request] != length:
            row = live.tokens[request]
            found[request] = refill(cursors[request], counts[request], row, length, request, live, archive)
            found_at[request] = length
        count = found[request]
        own[:count] = cursors[request, :count]
        drafted[i] = _draft_row(
            request, length, want[i], own, count, live, archive, model, scratch, mode, keys[request], stops,
            out[i], confidence[i],
        )  # fmt: skip
    return drafted


@numba.njit
def _move_rows(requests, starts, ends, cursors, counts, found, found_at, live, archive, met, met_counts):
    """Move every request's cursors past its tokens `starts[i] .. ends[i] - 1`.

    `met` (int32 `[tokens, MAX_CURSORS, 4]`) and `met_counts` (int64 `[tokens]`) receive the cursors at each token.
    """
    token = 0
    for i in range(len(requests)):
        request = requests[i]
        row, own, count = live.tokens[request], cursors[request], counts[request]
        for position in range(starts[i], ends[i]):
            if position == starts[i] and found_at[request] == position:  # a draft searched here, in the same history
                count = found[request]
            else:
                count = refill(own, count, row, position, request, live, archive)
            met[token, :count] = own[:count]
            met_counts[token] = count
            token += 1
            count = advance(own, count, row[position], row, position + 1, position + 1, request, live, archive)
        counts[request] = count


@cached_njit(nogil=True)
def _follow_rows(
    requests, lengths, observed, most, starts, ends, cursors, counts, found, found_at,
    tokens, links, heads, indexed, prompt_lengths, tags, nodes, archive_heads, cursor,
    met, met_counts,
):  # fmt: skip
    """Move cursors past newly committed tokens and index them; nothing if `met` has no room. Returns the token count.

    `starts` and `ends` (int64 `[batch]`) receive each request's tokens observed before and now; `observed` (int64
    `[num_requests]`) is updated. Positions from `most` on are not indexed. Other arguments: see `_move_rows`.
    """
    live = LiveView(tokens, links, heads, indexed, prompt_lengths, tags)
    archive = ArchiveView(nodes, archive_heads, cursor)
    total = 0
    for i in range(len(requests)):
        starts[i], ends[i] = observed[requests[i]], lengths[requests[i]]
        total += ends[i] - starts[i]
    if total <= len(met):
        _move_rows(requests, starts, ends, cursors, counts, found, found_at, live, archive, met, met_counts)
        for i in range(len(requests)):
            observed[requests[i]] = ends[i]
        index_live(live, requests, np.minimum(ends, most))
        found_at[:] = -1  # the history has grown, also for requests that this step left out
    return total


@cached_njit(nogil=True)
def _learn_rows(requests, starts, ends, tokens, met, met_counts, model, mode, keys):
    """Learn from the tokens that `_move_rows` passed, as if each had been drafted from its cursors."""
    scratch = new_scratch(model)
    token = 0
    for i in range(len(requests)):
        request = requests[i]
        for position in range(starts[i], ends[i]):
            count, cursors = met_counts[token], met[token]
            token += 1
            if count > 0:
                at = mix(cursors, count, model, scratch)
                best = choose(cursors, count, at, model, scratch, mode, keys[request], position, True)
                learn(cursors, count, tokens[request, position], best, at, model, scratch, mode)


class _PutOff(NamedTuple):
    """Tokens of one step to learn from later: int64 `[n]` requests, first and last position, and the draft mode."""

    requests: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    mode: int


class HistorySpeculator(Speculator):
    """Drafts from the running requests and a bounded archive of finished ones.

    Finished requests stay in the live index, where their siblings keep matching them, and are archived together when
    the call ends (`refresh`, the first `start` of another call, or `state_dict`). So indexing them costs nothing while
    decoding, no token is found twice, and an aborted call leaves the archive intact: only finished requests are
    written, each as a whole.

    Args:
        max_tokens: Capacity of the archive in tokens; the oldest rollouts are dropped first.
    """

    name = "history"

    def __init__(self, max_tokens: int = 4_000_000) -> None:
        self.policy_version = -1
        self._vocab_size: int | None = None  # of the bound policy
        self._archive = Archive(max_tokens)
        self._model = new_model()
        self._archived: Sequences | None = None  # the call archived last, so that `refresh` skips it
        self._sequences: Sequences | None = None
        self._live: LiveIndex | None = None
        self._finished: list[int] = []
        self._cursors, self._counts, self._observed = new_cursors(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
        # Cursors including those that a draft has found, and the position that it searched at, -1 for none.
        self._found, self._found_at = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._put_off: _PutOff | None = None
        self._met, self._met_counts = new_cursors(0), np.zeros(0, np.int64)  # cursors at its tokens

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy. An archive with tokens beyond its vocabulary is dropped: drafts index its logits."""
        super().bind(policy, couples_noise)
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
        live = self._live_of(sequences)
        widest = bounds(max_draft_tokens)[1]
        if widest <= 0:
            return Draft.empty(len(requests))
        tokens = np.zeros((len(requests), widest), np.int64)
        confidence = np.zeros((len(requests), widest), np.float32)
        lengths = _draft_rows(
            requests, sequences.lengths, max_draft_tokens, self._cursors, self._counts, self._found, self._found_at,
            *live.view, *self._archive.view, *self._model,
            self._mode(sequences), sequences.noise_keys, sequences.sampling.stops, tokens, confidence,
        )  # fmt: skip
        return Draft(tokens, lengths, confidence)

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Move the cursors past committed tokens and index the tokens; `learn` scores the predictions later."""
        self.learn()
        live = self._live_of(sequences)
        requests = verified.requests
        starts, ends = np.empty_like(requests), np.empty_like(requests)
        while True:
            num_tokens = _follow_rows(
                requests, sequences.lengths, self._observed, live.most, starts, ends, self._cursors, self._counts,
                self._found, self._found_at, *live.view, *self._archive.view, self._met, self._met_counts,
            )  # fmt: skip
            if num_tokens <= len(self._met):
                break
            self._met, self._met_counts = new_cursors(2 * num_tokens), np.zeros(2 * num_tokens, np.int64)
        self._put_off = _PutOff(requests, starts, ends, self._mode(sequences))
        self._finished.extend(requests[verified.finished].tolist())

    def learn(self) -> None:
        """Score the cursors' predictions of the latest tokens."""
        if self._put_off is not None and self._live is not None and self._sequences is not None:
            requests, starts, ends, mode = self._put_off
            _learn_rows(
                requests, starts, ends, self._live.view.tokens, self._met, self._met_counts, self._model, mode,
                self._sequences.noise_keys,
            )  # fmt: skip
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
        self.learn()
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
        self.learn()
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
        self._put_off = None
        self._sequences, self._live, self._finished = None, None, []
