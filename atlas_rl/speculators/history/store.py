"""Token storage of the history index: an archive of finished rollouts, and the running requests in place.

Both are indexed by hash chains, as in LZ77. An *entry* is a token, filed under the hash of the few tokens before it.
`heads[family, bucket]` is the newest entry of a bucket, and every entry links to the next older one. Following a chain
from the hash of the current context therefore visits continuations of that context, newest first. Its cost depends on
the number of visits, not on the number of entries. Two chain families share the entries: GLOBAL chains run through all
text, PROMPT chains through rollouts of one prompt, and hash a shorter context.

Links and heads hold `code + 1`, so that 0 ends a chain and fresh tables are zero pages. A hash is never trusted: the
search compares tokens.

    store    code                         bytes per token
    archive  ring position                16 (one node: token, two links, tag) + 8 (heads)
    live     pos * requests + request     8 (links) + heads; the tokens stay where the decode loop keeps them

Live codes let texts grow: more positions add codes, and no code changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.speculators.saved_state import SavedState

if TYPE_CHECKING:
    from atlas_rl.core import Sequences

GLOBAL, PROMPT = 0, 1
# Tokens of context that an entry is filed under, hence the shortest match that a chain of the family can find.
ORDERS = (4, 1)
MAX_MATCH = 24
"""Matches are measured up to this many tokens."""

MAX_CODE = 2**31 - 2
"""Links hold `code + 1` in 32 bits."""

SEPARATOR = -1
"""Token of the node after every archived rollout: no context matches across it."""

TOKEN, LINK, INFO = 0, 1, 3  # columns of an archive node; `LINK + family` is the link of that family
_IN_PROMPT, _UNINDEXED, _TAG_SHIFT = 1, 2, 2
_TAG_BITS = 29
_GROWTH = 1.5
_MIN_TOKENS = 4096

_MAX_LIVE_BUCKETS = 1 << 20


class LiveView(NamedTuple):
    """View of the running requests for kernels; `buckets` heads per family."""

    tokens: np.ndarray  # int32 [requests, capacity]
    links: np.ndarray  # int32 [positions * requests, 2]
    heads: np.ndarray  # int32 [2, buckets]
    indexed: np.ndarray  # int64 [requests], tokens that may be read as context or continuation
    prompt_lengths: np.ndarray  # int64 [requests]
    tags: np.ndarray  # int32 [requests], hash of the prompt


class ArchiveView(NamedTuple):
    """View of the archive for kernels."""

    nodes: np.ndarray  # int32 [capacity, 4]
    heads: np.ndarray  # int32 [2, buckets]
    cursor: np.ndarray  # int64 [2]: next ring position to write, tokens stored


def prompt_tags(prompt_keys: np.ndarray) -> np.ndarray:
    """29-bit hashes of prompts, stored with every archived token: int32 `[n]` from int64 keys `[n]`."""
    mixed = prompt_keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(64 - _TAG_BITS)).astype(np.int32)


# ------------------------------------------------------------------------------------------------------------- kernels


@numba.njit(inline="always")
def bucket_of(context, end, family, tag, buckets):
    """Bucket of the last `ORDERS[family]` tokens before index `end` of `context`."""
    h = np.uint64(0)
    if family == PROMPT:
        h = np.uint64(tag + 1) * np.uint64(0xD6E8FEB86659FD93)
    for k in range(end - ORDERS[family], end):
        h = (h ^ np.uint64(context[k] + 1)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(31)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    return np.int64(((h >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32))


@numba.njit(inline="always")
def tag_of(info):
    """Prompt tag of an archive node."""
    return info >> _TAG_SHIFT


@numba.njit(inline="always")
def in_prompt(info):
    """Whether an archive node is part of a prompt."""
    return info & _IN_PROMPT != 0


@cached_njit(nogil=True)
def index_live(live, requests, ends):
    """Index the tokens from `indexed[request]` up to `ends[i]` of every request."""
    num_requests = len(live.tokens)
    buckets = live.heads.shape[1]
    for i in range(len(requests)):
        request = requests[i]
        row = live.tokens[request]
        for pos in range(live.indexed[request], ends[i]):
            code = pos * num_requests + request
            for family in range(2):
                if pos < ORDERS[family]:
                    live.links[code, family] = 0
                    continue
                bucket = bucket_of(row, pos, family, live.tags[request], buckets)
                live.links[code, family] = live.heads[family, bucket]
                live.heads[family, bucket] = code + 1
        live.indexed[request] = ends[i]


@numba.njit(inline="always")
def _write_node(archive, token, info):
    """Write a node at the write position, over the oldest node if the ring is full; returns its code."""
    code = archive.cursor[0]
    capacity = len(archive.nodes)
    archive.nodes[code, TOKEN] = token
    archive.nodes[code, LINK + GLOBAL] = 0
    archive.nodes[code, LINK + PROMPT] = 0
    archive.nodes[code, INFO] = info
    archive.cursor[0] = code + 1 if code + 1 < capacity else 0
    archive.cursor[1] = min(archive.cursor[1] + 1, capacity)
    return code


@numba.njit(inline="always")
def _file_node(archive, code, context, end, run, tag):
    """Link a written node into the chains of the `run` tokens of context before it."""
    for family in range(2):
        if run >= ORDERS[family]:
            bucket = bucket_of(context, end, family, tag, archive.heads.shape[1])
            archive.nodes[code, LINK + family] = archive.heads[family, bucket]
            archive.heads[family, bucket] = code + 1


@cached_njit(nogil=True)
def _append(archive, tokens, prompt_length, tag, index_prompt, version):
    """Append one rollout and its separator, which carries the policy version.

    Without `index_prompt` only the tail of the prompt is stored, as context of the first completion tokens.
    """
    first = 0 if index_prompt else max(0, prompt_length - MAX_MATCH)
    for pos in range(first, len(tokens)):
        prompt = pos < prompt_length
        filed = index_prompt or not prompt
        info = (tag << _TAG_SHIFT) | (_IN_PROMPT if prompt else 0) | (0 if filed else _UNINDEXED)
        code = _write_node(archive, tokens[pos], info)
        if filed:
            _file_node(archive, code, tokens, pos, pos - first, tag)
    _write_node(archive, SEPARATOR, version)


@cached_njit(nogil=True)
def _replay(archive, tokens, infos):
    """Append nodes in the order of `oldest_first`, with the same links as before."""
    run = 0
    for i in range(len(tokens)):
        code = _write_node(archive, tokens[i], infos[i])
        if tokens[i] == SEPARATOR:
            run = 0
            continue
        if infos[i] & _UNINDEXED == 0:
            _file_node(archive, code, tokens, i, run, tag_of(infos[i]))
        run += 1


# -------------------------------------------------------------------------------------------------------------- stores


class LiveIndex:
    """In-place index of the requests of one generation call; dropped with the call.

    It grows with the texts. Positions whose codes exceed 31 bits (very many very long texts) are not indexed.

    Attributes:
        view: View for kernels.
        most: Positions of each text that have codes.
        prompt_owner: By prompt key, the request whose copy of the prompt is indexed: more copies would crowd the
            chains.
    """

    def __init__(self, sequences: Sequences) -> None:
        num_requests = len(sequences.lengths)
        self.most = MAX_CODE // num_requests
        # Zero pages cost no memory until tokens fall into their buckets.
        buckets = min(max(num_requests * sequences.max_length, 64), _MAX_LIVE_BUCKETS)
        self.view = LiveView(
            tokens=sequences.token_ids,
            links=np.empty((num_requests * min(sequences.token_ids.shape[1], self.most), 2), np.int32),
            heads=np.zeros((2, buckets), np.int32),
            indexed=np.zeros(num_requests, np.int64),
            prompt_lengths=sequences.prompt_lengths,
            tags=prompt_tags(sequences.prompt_keys),
        )
        self.prompt_owner: dict[int, int] = {}

    def follow(self, sequences: Sequences) -> None:
        """Update the view of texts that may have been reallocated."""
        view = self.view
        if sequences.token_ids is view.tokens:
            return
        num_requests, capacity = sequences.token_ids.shape
        links = np.empty((num_requests * min(capacity, self.most), 2), np.int32)
        links[: len(view.links)] = view.links
        self.view = view._replace(tokens=sequences.token_ids, links=links)

    def add(self, sequences: Sequences, requests: np.ndarray) -> None:
        """Index the texts of new requests, one copy of each distinct prompt."""
        for request, key in zip(requests.tolist(), sequences.prompt_keys[requests].tolist(), strict=True):
            if self.prompt_owner.setdefault(key, request) != request:
                self.view.indexed[request] = self.view.prompt_lengths[request]
        index_live(self.view, requests, np.minimum(sequences.lengths[requests], self.most))

    @property
    def nbytes(self) -> int:
        """Bytes of links and tables (the tokens belong to the decode loop)."""
        return sum(a.nbytes for a in (self.view.links, self.view.heads, self.view.indexed, self.view.tags))


class Archive:
    """Ring of finished rollouts: the newest overwrite the oldest; grows geometrically up to `max_tokens`."""

    def __init__(self, max_tokens: int) -> None:
        if not 2 * MAX_MATCH <= max_tokens <= MAX_CODE:
            raise ValueError(f"max_tokens must be in [{2 * MAX_MATCH}, 2**31 - 2], got {max_tokens}")
        self.max_tokens = max_tokens
        self.view = self._allocate(min(_MIN_TOKENS, max_tokens))

    @staticmethod
    def _allocate(capacity: int) -> ArchiveView:
        nodes = np.zeros((capacity, 4), np.int32)
        nodes[:, TOKEN] = SEPARATOR
        return ArchiveView(nodes, np.zeros((2, capacity), np.int32), np.zeros(2, np.int64))

    def append(
        self, tokens: np.ndarray, prompt_length: int, tag: int, *, index_prompt: bool, policy_version: int
    ) -> None:
        """Archive one rollout: int32 tokens, prompt then completion. If it is longer than the ring, its end is kept."""
        if len(tokens) > self.max_tokens - 1:
            cut = len(tokens) - (self.max_tokens - 1)
            tokens, prompt_length = tokens[cut:], max(0, prompt_length - cut)
        self._grow(len(self) + len(tokens) + 1)
        _append(self.view, tokens, prompt_length, tag, index_prompt, policy_version)

    def _grow(self, needed: int) -> None:
        """Make room for `needed` nodes, up to the maximum; chains are rebuilt for the larger tables."""
        capacity = len(self.view.nodes)
        if needed <= capacity or capacity == self.max_tokens:
            return
        old = self.oldest_first()
        self.view = self._allocate(min(max(needed, int(capacity * _GROWTH)), self.max_tokens))
        _replay(self.view, *old)

    def oldest_first(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and info words of the stored nodes in writing order: int32 `[n]` each."""
        write, stored = self.view.cursor.tolist()
        nodes = self.view.nodes[:stored]
        order = np.roll(nodes, -write, axis=0) if stored == len(self.view.nodes) else nodes
        return np.ascontiguousarray(order[:, TOKEN]), np.ascontiguousarray(order[:, INFO])

    @property
    def largest_token(self) -> int:
        """Largest stored token id; -1 if empty."""
        return int(self.view.nodes[:, TOKEN].max())

    def __len__(self) -> int:
        return int(self.view.cursor[1])

    @property
    def nbytes(self) -> int:
        """Bytes of nodes and tables."""
        return sum(a.nbytes for a in self.view)

    def state_dict(self) -> dict[str, Any]:
        """Tokens and info words; the chains are rebuilt from them."""
        tokens, infos = self.oldest_first()
        return {"tokens": tokens, "infos": infos, "capacity": len(self.view.nodes)}

    @classmethod
    def from_state(cls, state: SavedState, max_tokens: int, vocab_size: int | None) -> Archive:
        """An archive from a `state_dict`; a smaller ring keeps the newest tokens.

        Args:
            state: Saved state. It is not trusted, because kernels draft from its numbers and follow chains built from
                them.
            max_tokens: Capacity of the new archive.
            vocab_size: Vocabulary size of the policy, whose logits are indexed by drafted tokens; None without a
                policy.

        Raises:
            ValueError: The state is not one of an archive of this policy.
        """
        capacity = state.integer("capacity", 1, MAX_CODE)
        tokens = state.integers("tokens", SEPARATOR, (vocab_size or MAX_CODE) - 1)
        infos = state.integers("infos", -1, 2**31 - 1)
        if not len(tokens) == len(infos) <= capacity:
            raise ValueError(f"history index: {len(tokens)} tokens and {len(infos)} infos, expected {capacity} at most")
        if (infos[tokens != SEPARATOR] < 0).any():  # separators hold a policy version instead
            raise ValueError("history index: infos has values below 0, which are no prompt tags")
        archive = cls(max_tokens)
        archive.view = cls._allocate(min(capacity, max_tokens))
        _replay(archive.view, tokens.astype(np.int32), infos.astype(np.int32))
        return archive
