"""The interface of every speculator, and the values that pass through it.

All arrays on this seam are numpy: the decode loop is host code, and a draft is a handful of integers. A speculator that
runs a network keeps its tensors to itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_rl.rollout.noise import Stream, draft_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from atlas_rl.rollout.backends.base import Backend
    from atlas_rl.rollout.sampling import SamplingParams


@dataclass(slots=True)
class Sequences:
    """Every request of one generation call, in arrays that never move: a request's index is its name.

    The decode loop owns them and appends; speculators read.

    Attributes:
        token_ids: int32 `[num_requests, capacity]`, prompt then completion; cells past the length are undefined.
        lengths: int64 `[num_requests]`, prompt plus committed completion tokens.
        prompt_lengths: int64 `[num_requests]`.
        prompt_keys: int64 `[num_requests]`, equal for equal prompts (a hash of the prompt's tokens).
        noise_keys: uint64 `[num_requests]`, keys of the counter-based noise (`rollout/noise.py`).
        sampling: Sampling parameters of the call.
        vocab_size: Size of the policy's vocabulary.
        policy_version: Version of the policy that generates.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    prompt_keys: np.ndarray
    noise_keys: np.ndarray
    sampling: SamplingParams
    vocab_size: int
    policy_version: int

    def completion(self, request: int) -> list[int]:
        """The committed completion tokens of one request."""
        return self.token_ids[request, self.prompt_lengths[request] : self.lengths[request]].tolist()

    def draft_noise(self, requests: np.ndarray, couples_noise: bool) -> tuple[Stream, np.ndarray]:
        """What drafts of some requests, int64 `[n]`, are drawn with: the stream, and keys uint64 `[n]`.

        Args:
            requests: int64 `[n]`.
            couples_noise: The policy's own noise; otherwise noise that the request's drafts of no other step have.
        """
        keys = self.noise_keys[requests]
        if couples_noise:
            return Stream.TARGET, keys
        return Stream.DRAFT, draft_keys(keys, self.lengths[requests])


@dataclass(slots=True)
class Draft:
    """Draft tokens for a batch of requests, ragged rows padded to the longest.

    Attributes:
        token_ids: int64 `[batch, draft_len]`; cells past `lengths` are undefined.
        lengths: int64 `[batch]`; 0 means that the speculator has nothing to say about the request.
        confidence: float32 `[batch, draft_len]` in (0, 1): the speculator's own estimate that the position is accepted,
            given that the positions before it were. Under rejection verification it must be a function of the prefix
            alone, never of the drawn token; under drafter-invariant verification it may also read the noise.
        draft_probs: Only for engines that verify by rejection, float32 `[batch, draft_len, vocab]` on the policy's
            device: the distribution each draft token was drawn from. `None` means one-hot drafts.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    confidence: np.ndarray
    draft_probs: torch.Tensor | None = None

    @staticmethod
    def empty(batch: int) -> Draft:
        """A draft without a token for any of `batch` requests."""
        return Draft(np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64), np.zeros((batch, 0), np.float32))

    def of(self, rows: np.ndarray) -> Draft:
        """The draft of some rows only, int64 `[n]`."""
        draft_probs = None if self.draft_probs is None else self.draft_probs[rows]
        return Draft(self.token_ids[rows], self.lengths[rows], self.confidence[rows], draft_probs)

    def spread(self, rows: np.ndarray, batch: int) -> Draft:
        """This draft as one for a batch of which it covers `rows` (int64, one per row of the draft); none elsewhere."""
        if len(rows) == batch:
            return self
        width = self.token_ids.shape[1]
        token_ids, lengths = np.zeros((batch, width), np.int64), np.zeros(batch, np.int64)
        confidence = np.full((batch, width), 0.5, np.float32)
        token_ids[rows], lengths[rows], confidence[rows] = self.token_ids, self.lengths, self.confidence
        draft_probs = None
        if self.draft_probs is not None:
            draft_probs = self.draft_probs.new_zeros(batch, *self.draft_probs.shape[1:])
            draft_probs[rows] = self.draft_probs
        return Draft(token_ids, lengths, confidence, draft_probs)


@dataclass(slots=True)
class Hidden:
    """The policy's hidden states at the positions of one forward, for speculators that ask for them.

    Request (or prompt) `i` of the call that hands them over has its positions at `first[i]`, `first[i] + 1`, ...

    Attributes:
        first: int64 `[batch]`.
        last: `[num_positions, hidden]`, input of the policy's LM head; None where no speculator reads it.
        layers: Per layer that a speculator asked for, `[num_positions, hidden]`: the input of decoder layer `i`, which is
            what `i` layers have made of the embedding.
    """

    first: np.ndarray
    last: torch.Tensor | None
    layers: dict[int, torch.Tensor]


@dataclass(slots=True)
class Verified:
    """What one target forward settled, handed to every speculator whether or not its draft was used.

    By the time it is handed over, the tokens have been appended to `Sequences`.

    Attributes:
        requests: int64 `[batch]`, indices into `Sequences`.
        token_ids: int64 `[batch, max_committed]`, committed tokens: accepted drafts, then recovered or bonus token.
        num_committed: int64 `[batch]`, at least 1.
        num_accepted: int64 `[batch]`, accepted draft tokens.
        num_drafted: int64 `[batch]`, draft tokens that were verified.
        finished: bool `[batch]`, requests that end with this step; they never appear again.
        hidden: Hidden states at the verified positions: entry `first[i] + j` is what token `j` of request `i` was drawn
            from. None where no speculator reads them. Entries past the committed tokens mean nothing.
    """

    requests: np.ndarray
    token_ids: np.ndarray
    num_committed: np.ndarray
    num_accepted: np.ndarray
    num_drafted: np.ndarray
    finished: np.ndarray
    hidden: Hidden | None = None

    def outcome_of(self, draft: Draft, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the committed tokens say about a draft, whether or not it was the one that was verified.

        Args:
            draft: Proposed for the positions that were committed now.
            rows: int64 `[n]`, rows of this batch that the draft covers; None for all.

        Returns:
            int64 `[n]` twice: draft positions whose fate is known, and how many of them were right. A position is known
            while all before it were right and a token was committed there.
        """
        covered = slice(None) if rows is None else rows
        width = min(draft.token_ids.shape[1], self.token_ids.shape[1])
        reach = np.minimum(draft.lengths, self.num_committed[covered])
        equal = draft.token_ids[:, :width] == self.token_ids[covered, :width]
        equal &= np.arange(width)[None] < reach[:, None]
        right = np.cumprod(equal, axis=1).sum(axis=1)
        return np.minimum(right + 1, reach), right


@dataclass(slots=True)
class Rollouts:
    """Finished rollouts of one generation call, for `Speculator.refresh`.

    Attributes:
        sequences: Every request, complete.
        generate_s: Seconds that generating them took, refreshes aside; None where nobody measured.
    """

    sequences: Sequences
    generate_s: float | None = None


class Speculator(ABC):
    """Proposes continuations that the policy verifies.

    Nothing a speculator does can change what is generated, only how fast: under drafter-invariant verification a draft
    is accepted exactly when it is the token the policy would have drawn. A speculator never touches the policy's
    weights, training mode or random state. Implementations raise on internal failure; the loop never hides it.
    """

    name: str
    """Short name used in reports, such as `history` or `draft_lm`."""

    couples_noise: bool = True
    """Whether drafts are drawn with the policy's own noise (`Stream.TARGET`). Engines that verify by rejection set it
    to False, and the speculator then draws with noise of that draft's own or proposes its likeliest token. Either way
    `Sequences.draft_noise` says what to draw with."""

    reads_hidden: bool = False
    """Whether `Verified.hidden.last` is wanted."""

    reads_layers: tuple[int, ...] = ()
    """Decoder layers whose inputs are wanted, of prompts (`read_prompts`) and of verified positions."""

    @property
    def ready(self) -> bool:
        """Whether it can draft yet; until then it is not asked."""
        return True

    @property
    def expected_survival(self) -> np.ndarray | None:
        """Mean probability that draft position 0, 1, ... is accepted together with all before it: float64 `[n]`.

        As measured at the last refresh on the newest rollouts, for speculators that can; None otherwise. It tells the
        controller that a speculator has become good, or bad, without asking it for drafts.
        """
        return None

    def bind(self, policy: nn.Module) -> None:  # noqa: B027 - most need nothing
        """The policy to draft for, before anything else and again whenever the engine gets another one.

        A speculator may read its weights while a call runs (`start`, `propose`, `observe`), when they are whole on every
        rank; at a refresh they may be sharded away.
        """

    def share_cache(  # noqa: B027 - most need nothing
        self, backend: Backend, rows_of: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """The policy's own cache, before the first `start` of a call, for speculators that run the policy's modules.

        Valid until the call ends, and its session is open meanwhile. A request's last committed token is not cached yet;
        cells from there on may be written, because the policy's next forward writes them before it reads them.

        Args:
            backend: Runs the policy over its cache.
            rows_of: Cache rows, int64 `[n]`, of requests in the batch, int64 `[n]`.
        """

    def read_prompts(  # noqa: B027 - most need nothing
        self, sequences: Sequences, groups: list[np.ndarray], hidden: Hidden
    ) -> None:
        """Hidden states of whole prompts: prompt `i` is that of every request in `groups[i]` (int64 `[n]`).

        Called for speculators with `reads_layers`, after the `start` of those requests and before their first `observe`.
        """

    @abstractmethod
    def start(self, sequences: Sequences, requests: np.ndarray) -> None:
        """Requests enter the batch: int64 `[n]` indices into `sequences`, whose prompts are in place.

        Called before the first `propose` that names them; mutates only the speculator's state.
        """

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int:
        """Committed tokens that `propose` for these requests (int64 `[n]`) would have to run before it drafts.

        The controller tells their time from that of drafting: a speculator that was not asked for long has more of them.
        """
        return 0

    @abstractmethod
    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for each request.

        Args:
            sequences: All requests of the call; the context of request `r` is `token_ids[r, :lengths[r]]`.
            requests: int64 `[batch]`.
            max_draft_tokens: int64 `[batch]`, most tokens wanted per request; 0 asks for nothing.

        Returns:
            A `Draft` of the same batch order, each row at most `max_draft_tokens` long.
        """

    @abstractmethod
    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Learn from verified tokens and let go of the state of finished requests."""

    @abstractmethod
    def refresh(self, rollouts: Rollouts, policy_version: int) -> None:
        """The policy moved on to `policy_version`; `rollouts` are the newest finished ones, made by an earlier one."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draft as well as this one: arrays, tensors, numbers, strings; none by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; raises `ValueError` when the state belongs to another kind of speculator or policy."""
        if state:
            raise ValueError(f"the speculator '{self.name}' has no state of its own, got keys {sorted(state)}")
