"""Basic types: sampling parameters, requests of a call, drafts, outcomes of verification, finished rollouts.

All arrays are numpy: the decode loop is host code, and a draft is a handful of integers. Tensors appear only where a network
made them: hidden states, and draft probabilities under rejection verification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_kernels.noise import Stream, draft_keys
from atlas_kernels.truncation import Truncation
from atlas_rl.checks import number, token_ids, whole
from atlas_rl.policy.base import roomy
from atlas_rl.policy.upload import uploaded

TEMPERATURES = (1e-20, 1e20)
"""Least and largest temperature above 0. Logits up to 1e8 stay finite in float32, also with the largest penalty."""

REPETITION_PENALTIES = (1e-10, 1e10)
"""Least and largest repetition penalty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the policy's logits.

    The processed distribution is: repetition penalty, then temperature, then top-k, top-p and min-p, in the order of
    `transformers.generate`. `temperature=0` means greedy decoding. Speculation never changes this distribution.

    Args:
        max_new_tokens: Tokens to generate per request, at least 1.
        temperature: Softmax temperature, in `[1e-20, 1e20]`, or 0, which is greedy.
        top_k: Keep the `top_k` likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches `top_p`, in `(0, 1]`.
        min_p: Keep tokens with at least `min_p` times the probability of the likeliest, in `[0, 1]`.
        repetition_penalty: Divides positive and multiplies negative logits of tokens already in the sequence
            (arXiv 1909.05858), in `[1e-10, 1e10]`; 1 is off.
        eos_token_ids: Tokens that end a request, or one such token; the ending token is part of the completion.
        seed: Seed of the counter-based noise; equal seeds give equal tokens.
        suppress_tokens: Tokens that are never drawn, their logits are `-inf`; in process only.

    Raises:
        ValueError: A value is out of its range; the message says which range holds.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least, most = TEMPERATURES
        low, high = REPETITION_PENALTIES
        checked: dict[str, Any] = {
            "max_new_tokens": whole("max_new_tokens", self.max_new_tokens, 1),
            "temperature": number(
                "temperature",
                self.temperature,
                f"0 (greedy) or in [{least:g}, {most:g}]",
                lambda value: value == 0 or least <= value <= most,
            ),
            "top_k": whole("top_k", self.top_k, 0, hint="(0 keeps every token)"),
            "top_p": number("top_p", self.top_p, "in (0, 1] (1 keeps every token)", lambda value: 0 < value <= 1),
            "min_p": number("min_p", self.min_p, "in [0, 1] (0 keeps every token)", lambda value: 0 <= value <= 1),
            "repetition_penalty": number(
                "repetition_penalty",
                self.repetition_penalty,
                f"in [{low:g}, {high:g}] (1 is off)",
                lambda value: low <= value <= high,
            ),
            "eos_token_ids": token_ids("eos_token_ids", self.eos_token_ids),
            "seed": whole("seed", self.seed, 0, 2**63 - 1),
            "suppress_tokens": token_ids("suppress_tokens", self.suppress_tokens),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether every position takes the likeliest token (no noise is drawn)."""
        return self.temperature == 0

    @property
    def distribution(self) -> tuple[float | tuple[int, ...], ...]:
        """Identity of the processed distribution: equal for parameters that differ only in seed or limits."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.suppress_tokens

    @property
    def stops(self) -> np.ndarray:
        """`eos_token_ids` as int64 `[n]`; do not write to it."""
        return _as_array(self.eos_token_ids)

    def ends(self, token_ids: np.ndarray) -> np.ndarray:
        """Whether each token ends a request: bool, shaped like `token_ids` (int64)."""
        # Not `np.isin`: it sorts, which for a step's handful of tokens took 0.15 ms, four times a step.
        return (token_ids[..., None] == self.stops).any(axis=-1)

    @property
    def truncates(self) -> bool:
        """Whether some tokens get probability zero (top-k, top-p or min-p is on)."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def truncation(self) -> Truncation:
        """Parameters of top-k, top-p and min-p."""
        return Truncation(self.top_k, self.top_p, self.min_p)

    @property
    def plain(self) -> bool:
        """Whether the processed distribution is the policy's softmax at `temperature`, but for suppressed tokens."""
        return not self.greedy and not self.truncates and self.repetition_penalty == 1


@dataclass(slots=True)
class Sequences:
    """All requests of one generation call, in rows that never move: the row index identifies the request.

    The decode loop owns them and appends; speculators read.

    Attributes:
        token_ids: int32 `[num_requests, capacity]`, prompt then completion; cells past the length are undefined.
            `reserve` replaces the array when texts grow, so do not keep references to it.
        lengths: int64 `[num_requests]`, prompt plus committed completion tokens.
        prompt_lengths: int64 `[num_requests]`.
        prompt_keys: int64 `[num_requests]`, equal for equal prompts (a hash of the prompt's tokens).
        noise_keys: uint64 `[num_requests]`, keys of the counter-based noise (`atlas_kernels/noise.py`).
        sampling: Sampling parameters of the call.
        vocab_size: Size of the policy's vocabulary.
        policy_version: Version of the policy that generates.
        max_length: Most tokens that any request can reach; at least the initial capacity of `token_ids`.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    prompt_keys: np.ndarray
    noise_keys: np.ndarray
    sampling: SamplingParams
    vocab_size: int
    policy_version: int
    max_length: int = 0

    def __post_init__(self) -> None:
        self.max_length = max(self.max_length, self.token_ids.shape[1])

    def reserve(self, length: int) -> None:
        """Make room for texts of `length` tokens."""
        num_requests, capacity = self.token_ids.shape
        if length > capacity:
            grown = np.zeros((num_requests, roomy(length, self.max_length)), np.int32)
            grown[:, :capacity] = self.token_ids
            self.token_ids = grown

    def trimmed(self) -> Sequences:
        """A copy whose `token_ids` end with the longest text."""
        return replace(self, token_ids=self.token_ids[:, : int(self.lengths.max(initial=0))].copy(), max_length=0)

    def prompt(self, request: int) -> list[int]:
        """The prompt tokens of one request."""
        return self.token_ids[request, : self.prompt_lengths[request]].tolist()

    def completion(self, request: int) -> list[int]:
        """The committed completion tokens of one request."""
        return self.token_ids[request, self.prompt_lengths[request] : self.lengths[request]].tolist()

    def completion_tokens(self) -> np.ndarray:
        """The committed completion tokens of all requests, one after another: int32 `[n]`."""
        at = np.arange(self.token_ids.shape[1])[None]
        return self.token_ids[(at >= self.prompt_lengths[:, None]) & (at < self.lengths[:, None])]

    def draft_noise(self, requests: np.ndarray, couples_noise: bool) -> tuple[Stream, np.ndarray]:
        """Noise for drafts of some requests, int64 `[n]`: the stream, and keys uint64 `[n]`.

        Args:
            requests: int64 `[n]`.
            couples_noise: Whether to return the policy's own noise; otherwise noise that only this step's drafts of a
                request have.
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
        lengths: int64 `[batch]`; 0 means no draft for the request.
        confidence: float32 `[batch, draft_len]` in (0, 1): the speculator's own estimate that the position is accepted,
            given that the positions before it were. Under rejection verification it must be a function of the prefix
            alone, never of the drawn token; under drafter-invariant verification it may also read the noise.
        draft_probs: Only for engines that verify by rejection, float32 `[batch, draft_len, vocab]` on the policy's
            device: the distribution each draft token was drawn from. `None` means one-hot drafts.
        probs_are_checked: Whether the speculator has checked that `draft_probs` are finite, in a transfer that it made
            anyway. Otherwise the receiver of the draft checks, and on a GPU the host waits for that.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    confidence: np.ndarray
    draft_probs: torch.Tensor | None = None
    probs_are_checked: bool = False

    @staticmethod
    def empty(batch: int) -> Draft:
        """An empty draft for each of `batch` requests."""
        return Draft(np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64), np.zeros((batch, 0), np.float32))

    def of(self, rows: np.ndarray) -> Draft:
        """The draft of the given rows only, int64 `[n]`."""
        probs = self.draft_probs
        draft_probs = None if probs is None else probs.index_select(0, uploaded(rows, probs.device))
        return Draft(
            self.token_ids[rows], self.lengths[rows], self.confidence[rows], draft_probs, self.probs_are_checked
        )

    def spread(self, rows: np.ndarray, batch: int) -> Draft:
        """Scatter this draft into a batch of `batch` rows: row i goes to `rows[i]`, all other rows are empty."""
        if len(rows) == batch:
            return self
        width = self.token_ids.shape[1]
        token_ids, lengths = np.zeros((batch, width), np.int64), np.zeros(batch, np.int64)
        confidence = np.full((batch, width), 0.5, np.float32)
        token_ids[rows], lengths[rows], confidence[rows] = self.token_ids, self.lengths, self.confidence
        draft_probs = None
        if self.draft_probs is not None:
            draft_probs = self.draft_probs.new_zeros(batch, *self.draft_probs.shape[1:])
            draft_probs.index_copy_(0, uploaded(rows, draft_probs.device), self.draft_probs)
        return Draft(token_ids, lengths, confidence, draft_probs, self.probs_are_checked)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a speculator needs from the policy's forwards. Known once the speculator is bound, and fixed from then on.

    Attributes:
        head_inputs: Whether it needs `Hidden.head_inputs` of verified positions.
        layers: Decoder layers for `Hidden.layers`, of prompts and of verified positions.
        cache: Whether it needs the policy's own attention cache.
    """

    head_inputs: bool = False
    layers: tuple[int, ...] = ()
    cache: bool = False

    @staticmethod
    def of(each: Iterable[Needs]) -> Needs:
        """The union of several speculators' needs; layers ascend."""
        all_of_them = list(each)
        return Needs(
            any(needs.head_inputs for needs in all_of_them),
            tuple(sorted({layer for needs in all_of_them for layer in needs.layers})),
            any(needs.cache for needs in all_of_them),
        )


@dataclass(slots=True)  # one or more per step: a frozen one takes a call per field to make
class Hidden:
    """The policy's hidden states at the positions of one forward, for speculators that need them.

    Request (or prompt) `i` of the batch has its positions at `starts[i]`, `starts[i] + 1`, ...

    Attributes:
        starts: int64 `[batch]`.
        head_inputs: `[num_positions, hidden]`, input of the policy's LM head; `[0, 0]` if no speculator needs it.
        layers: Per layer `i` that a speculator needs, `[num_positions, hidden]`: the input of decoder layer `i`, which
            is the output of the first `i` layers. In process, `i` may be the number of layers.
    """

    starts: np.ndarray
    head_inputs: torch.Tensor
    layers: dict[int, torch.Tensor]

    @staticmethod
    def none() -> Hidden:
        """Empty: no hidden states are needed."""
        return Hidden(np.zeros(0, np.int64), torch.zeros(0, 0, dtype=torch.float32, device="cpu"), {})


@dataclass(frozen=True, slots=True)
class Prompts:
    """Hidden states of whole prompts.

    Attributes:
        groups: Per prompt int64 `[n]`, the requests that share it.
        hidden: Layers at every position of the prompts; prompt `i` begins at `hidden.starts[i]`.
    """

    groups: Sequence[np.ndarray] = ()
    hidden: Hidden = field(default_factory=Hidden.none)


@dataclass(slots=True)  # one per step, as `Hidden`
class Verified:
    """Outcome of one target forward, passed to every speculator whether or not its draft was used.

    By the time it is handed over, the tokens have been appended to `Sequences`.

    Attributes:
        requests: int64 `[batch]`, indices into `Sequences`.
        token_ids: int64 `[batch, max_committed]`, committed tokens: accepted drafts, then recovered or bonus token.
        num_committed: int64 `[batch]`, at least 1.
        num_accepted: int64 `[batch]`, accepted draft tokens.
        num_drafted: int64 `[batch]`, draft tokens that were verified.
        finished: bool `[batch]`, requests that end with this step; they never appear again.
        hidden: Hidden states at the verified positions: token `j` of request `i` was drawn from entry `starts[i] + j`.
            Entries past the committed tokens are undefined.
    """

    requests: np.ndarray
    token_ids: np.ndarray
    num_committed: np.ndarray
    num_accepted: np.ndarray
    num_drafted: np.ndarray
    finished: np.ndarray
    hidden: Hidden = field(default_factory=Hidden.none)

    def outcome_of(self, draft: Draft, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a draft the committed tokens confirm, whether or not it was the verified draft.

        Args:
            draft: Draft for the positions that this step committed.
            rows: int64 `[n]`, rows of this batch that the draft covers; None for all.

        Returns:
            int64 `[n]` twice: number of draft positions whose outcome is known, and how many of them were right. An
            outcome is known if all positions before it were right and a token was committed at it.
        """
        tokens, counts = self.token_ids, self.num_committed
        if rows is not None:
            tokens, counts = tokens[rows], counts[rows]
        drafted = np.ascontiguousarray(draft.token_ids, np.int64)
        return outcomes(drafted, draft.lengths, np.ascontiguousarray(tokens, np.int64), counts)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Finished rollouts of one generation call, for `Speculator.refresh`.

    Attributes:
        sequences: Every request, complete.
        generate_s: Seconds spent on generating them, without refreshes; None if not measured.
        accepted: Accepted draft tokens by speculator name; empty if not counted.
        elsewhere: Calls of other ranks that finished since the last refresh: token ids, without hidden states.
        measuring_s: Seconds since the last refresh spent on reruns for measurement, which are not part of the run.
    """

    sequences: Sequences
    generate_s: float | None = None
    accepted: Mapping[str, int] = field(default_factory=dict)
    elsewhere: tuple[Sequences, ...] = ()
    measuring_s: float = 0.0

    def share_of(self, speculator: str) -> float | None:
        """Share of the accepted draft tokens that this speculator drafted; None if none were accepted or counted."""
        total = sum(self.accepted.values())
        return self.accepted.get(speculator, 0) / total if total else None


@lru_cache(maxsize=256)
def _as_array(token_ids: tuple[int, ...]) -> np.ndarray:
    """Token ids as int64 `[n]`, made once: a step needs them four times."""
    return np.array(token_ids, np.int64)


@cached_njit(nogil=True)
def outcomes(
    drafts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, num_committed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`Verified.outcome_of` of drafts, int64 `[n, draft_len]`, against committed tokens, int64 `[n, width]`."""
    known, right = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    for row in range(len(lengths)):
        reach, count = min(lengths[row], num_committed[row]), 0
        while count < min(reach, drafts.shape[1], tokens.shape[1]) and drafts[row, count] == tokens[row, count]:
            count += 1
        known[row], right[row] = min(count + 1, reach), count
    return known, right


def prompt_key(row: np.ndarray) -> int:
    """Signed 64-bit hash of a prompt, int32 `[n]`."""
    digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
