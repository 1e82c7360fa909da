"""Heads on the policy's own features: what EAGLE-3, multi-token prediction and DFlash share.

Most draft token by token: at position i such a head reads the embedding of token x_{i+1} and a feature of position i,
and predicts x_{i+2}. Where the policy has run, the feature is computed from its hidden states; elsewhere it is the
head's own output of the previous step. DFlash drafts all tokens in one forward (`dflash/`), and shares what follows.

During a call the head keeps its own attention cache, with a row for each request that it drafts for. Committed
positions enter it with the policy's features; drafted ones with the head's own, overwritten once the policy has run
there. If there is no memory for another row, requests get no drafts of this head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from atlas_rl.core import Draft, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.policy.base import Segments
from atlas_rl.policy.cpu_linear import by_columns
from atlas_rl.policy.memory import free_bytes
from atlas_rl.policy.ragged_attention import RaggedBatch, active
from atlas_rl.policy.upload import uploaded
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.drawing import Drawing
from atlas_rl.speculators.warm_up import draw_from_logits

if TYPE_CHECKING:
    from atlas_rl.policy.base import PolicyCache
    from atlas_rl.policy.view import PolicyView

_FUSED_TOGETHER = 256  # most observed positions whose states are kept unfused


class FeatureHeadSpeculator(Speculator):
    """Drafts with a head on the policy's features, under the sampling parameters of the call.

    A subclass loads its head in `bind` and hands it to `_keep`, sets in `needs` which layers it reads, sets `_cell_bytes`
    (bytes per token in the head's cache), and implements `_features_of`, `_logits`, and either `_step` or its own `_forward`
    and `_draft`.
    """

    head: Any
    _cell_bytes: int
    _draft_room = 32
    """Cache cells past the longest text, for drafts beyond a request's end."""

    _token_ids: torch.Tensor | None = None
    """The policy's ids of the head's vocabulary, int64 `[n]`; None for the whole vocabulary."""

    def __init__(self) -> None:
        self._sequences: Sequences | None = None
        self._cache: RaggedBatch | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        super().bind(policy, couples_noise)
        self._policy, self._device = policy, policy.device

    def _keep(self, head: nn.Module) -> None:
        """Draft with this head, whose linear layers' weights are stored by columns from now on."""
        self.head = head
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = by_columns(module.weight.data)

    def weights(self) -> Iterable[torch.Tensor]:
        weights: Iterable[torch.Tensor] = self.head.parameters()
        return weights

    @abstractmethod
    def _features_of(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        """Features `[tokens, hidden]` of positions that the policy has run, from `[tokens, hidden]` of each layer."""

    def _step(self, embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the head over packed tokens; its cache is active (`ragged_attention`).

        Args:
            embeddings: `[tokens, hidden]`, of the token after each position, in the features' number format.
            features: `[tokens, hidden]`, of each position.
            positions: int64 `[tokens]`.

        Returns:
            Features for the next step, `[tokens, hidden]`.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a step nor a `_forward` of its own")

    @abstractmethod
    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, n]` over the head's vocabulary, from the output of `_step`."""

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[tokens, hidden]`: the policy's, unless the head has its own."""
        return self._policy.embed(token_ids)

    def compile_for(self, sampling: SamplingParams) -> None:
        draw_from_logits(
            sampling,
            self._policy.vocab_size,
            self._device,
            couples_noise=self._couples_noise,
            dtype=self._logits_dtype,
            token_ids=self._token_ids,
        )

    @property
    def _logits_dtype(self) -> torch.dtype:
        return torch.float32

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Give new requests a cache row each, and keep the features of their prompts."""
        if sequences is not self._sequences:
            num_requests = len(sequences.lengths)
            self._sequences = sequences
            self._cache = RaggedBatch(
                num_requests,
                sequences.max_length + self._draft_room,
                honour_softcap=False,
                free_bytes=lambda: free_bytes(self._device),
            )
            self._row_of = np.full(num_requests, -1)  # cache rows; -1 before a request has run
            self._cached = np.zeros(num_requests, np.int64)
            self._features: list[list[torch.Tensor]] = [[] for _ in range(num_requests)]  # not in the cache yet
            self._has_prompt = np.zeros(num_requests, bool)  # running requests with known prompt features
            self._prompt_in: dict[int, int] = {}  # by prompt key: a request whose row holds the prompt
            self._unfused: list[tuple[np.ndarray, np.ndarray, dict[int, torch.Tensor]]] = []
        if not prompts.groups:
            return
        with torch.no_grad():
            features = self._features_of(prompts.hidden.layers)
        # The last position of a prompt is run later, with the token that follows it.
        for group, first in zip(prompts.groups, prompts.hidden.starts, strict=True):
            for request in group:
                self._features[request].append(features[first : first + sequences.prompt_lengths[request]])
            self._has_prompt[group] = True

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int:
        """Positions whose features have not been run yet."""
        known = requests[self._has_prompt[requests]]
        fresh = known[self._cached[known] == 0]
        copied = np.setdiff1d(fresh, self._leaders(sequences, fresh)) if len(fresh) else fresh
        waiting = (sequences.lengths[known] - 1 - self._cached[known]).sum()
        return int(waiting - (sequences.prompt_lengths[copied] - 1).sum())

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request."""
        assert sequences is self._sequences, "propose() before start()"
        known = np.flatnonzero(self._has_prompt[requests])
        if len(known) < len(requests):  # engines with a prefix cache may not run a prompt again
            return self.propose(sequences, requests[known], max_draft_tokens[known]).spread(known, len(requests))
        depth = self._depth(sequences, requests, int(max_draft_tokens.max(initial=0)))
        if depth > 0 and self._make_room(sequences, requests, self._cells_of(depth)):
            return self.propose(sequences, requests, max_draft_tokens)  # without the dropped requests
        if depth <= 0:
            return Draft.empty(len(requests))
        with torch.no_grad():
            self._fuse()
            self._run_prompts(sequences, requests[self._cached[requests] == 0])
            return self._draft(sequences, requests, max_draft_tokens, depth)

    def _depth(self, sequences: Sequences, requests: np.ndarray, wanted: int) -> int:
        """Most tokens to draft for requests (int64 `[n]`), if `wanted` are."""
        return min(wanted, int(sequences.max_length + self._draft_room - sequences.lengths[requests].max(initial=0)))

    def _cells_of(self, depth: int) -> int:
        """Cells past a text that a draft of `depth` tokens takes."""
        return depth

    def _draft(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray, depth: int) -> Draft:
        """Draft token by token; all rows run to the longest wanted draft, shorter ones are cut."""
        one, lengths = np.ones(len(requests), np.int64), sequences.lengths[requests]
        drawing = self._drawing(sequences, requests, depth * one)
        features = self._catch_up(sequences, requests)
        indices = drawing.draw(self._logits(features))
        for position in range(depth - 1):
            tokens = indices if self._token_ids is None else self._token_ids[indices]
            features = self._forward(tokens, features, requests, lengths - 1 + position, one)
            indices = drawing.draw(self._logits(features))
        return drawing.finish(max_draft_tokens)

    def _drawing(self, sequences: Sequences, requests: np.ndarray, depths: np.ndarray) -> Drawing:
        """A draft of so many tokens for each request, int64 `[n]`."""
        return Drawing(
            self.name,
            sequences,
            requests,
            depths,
            self._device,
            couples_noise=self._couples_noise,
            token_ids=self._token_ids,
        )

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the features of committed positions until the head next runs."""
        starts = sequences.lengths[verified.requests] - verified.num_committed
        # The first token was drawn from the prompt's last position, which `start` has handled.
        going = self._has_prompt[verified.requests] & ~verified.finished
        rows = np.flatnonzero((starts > sequences.prompt_lengths[verified.requests]) & going)
        self._forget(sequences, verified.requests[verified.finished])
        if not len(rows):
            return
        counts = verified.num_committed[rows]
        index = np.concatenate(
            [np.arange(first, first + n) for first, n in zip(verified.hidden.starts[rows], counts, strict=True)]
        )
        taken = uploaded(index, self._device)
        states = {n: states[taken] for n, states in verified.hidden.layers.items()}
        self._unfused.append((verified.requests[rows], counts, states))
        if sum(int(counts.sum()) for _, counts, _ in self._unfused) >= _FUSED_TOGETHER:
            self._fuse()

    def release(self) -> None:
        """Free the cache, and the features and states that are not in it yet."""
        self._sequences, self._cache, self._features, self._unfused = None, None, [], []

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Free the cache of requests that still run. A static drafter does not follow the policy."""
        self.release()
        return None

    def _forget(self, sequences: Sequences, requests: np.ndarray) -> None:
        """Drop all state of requests, int64 `[n]`."""
        self._has_prompt[requests] = False
        self._row_of[requests] = -1
        for request in requests.tolist():
            self._features[request] = []
            key = int(sequences.prompt_keys[request])
            if self._prompt_in.get(key) == request:
                del self._prompt_in[key]

    def _make_room(self, sequences: Sequences, requests: np.ndarray, depth: int) -> bool:
        """Assign rows to requests (int64 `[n]`); returns whether requests were dropped because memory is short."""
        cache = self._cache
        assert cache is not None, "room is made for requests that start() has told of"
        kept = np.flatnonzero(self._row_of >= 0)
        fresh = requests[self._row_of[requests] < 0]
        num_rows = len(kept) + len(fresh)
        longest = int(sequences.lengths[np.concatenate([kept, fresh])].max(initial=0)) + depth
        if num_rows > cache.held_rows or longest > cache.held_cells:
            cells = cache.cells_that_fit(self._cell_bytes)
            if num_rows > max(1, cells // longest):
                # Requests without a row are dropped first, then the shortest of the others.
                by_length = kept[np.argsort(-sequences.lengths[kept], kind="stable")]
                self._forget(sequences, np.concatenate([by_length, fresh])[max(1, cells // longest) :])
                return True
            self._close_gaps(cache, kept)
            cache.reserve(num_rows, longest, cells)
        free = np.setdiff1d(np.arange(cache.held_rows), self._row_of[kept])
        self._row_of[fresh] = free[: len(fresh)]
        return False

    def _close_gaps(self, cache: RaggedBatch, kept: np.ndarray) -> None:
        """Move rows of the requests in `kept` (int64 `[n]`), so that they occupy the first `n`."""
        rows = self._row_of[kept]
        gaps = np.setdiff1d(np.arange(len(kept)), rows)
        for request, gap in zip(kept[rows >= len(kept)].tolist(), gaps.tolist(), strict=True):
            cache.copy_rows(int(self._row_of[request]), np.array([gap]), int(self._cached[request]))
            self._row_of[request] = gap

    def _fuse(self) -> None:
        """Compute features of the positions observed since the last time, reading the weights once."""
        if not self._unfused:
            return
        requests, counts = (np.concatenate([entry[i] for entry in self._unfused]) for i in range(2))
        parts = [states for *_, states in self._unfused]
        self._unfused = []
        with torch.no_grad():
            features = self._features_of({n: _joined([states[n] for states in parts]) for n in parts[0]})
        for request, part in zip(requests, features.split(counts.tolist()), strict=True):
            if self._has_prompt[request]:
                self._features[request].append(part)

    def _leaders(self, sequences: Sequences, fresh: np.ndarray) -> np.ndarray:
        """One request for each prompt that is in no row yet."""
        keys, first = np.unique(sequences.prompt_keys[fresh], return_index=True)
        return fresh[first[[int(key) not in self._prompt_in for key in keys]]]

    def _run_prompts(self, sequences: Sequences, fresh: np.ndarray) -> None:
        """Run the prompts of new requests except their last position, once per distinct prompt."""
        fresh, cache = fresh[sequences.prompt_lengths[fresh] > 1], self._cache
        if cache is None or not len(fresh):
            return
        lengths = sequences.prompt_lengths - 1
        leaders = self._leaders(sequences, fresh)
        if len(leaders):
            tokens = np.concatenate([sequences.token_ids[r, 1 : 1 + lengths[r]] for r in leaders]).astype(np.int64)
            features = torch.cat([self._features[r][0][:-1] for r in leaders])
            self._forward(tokens, features, leaders, np.zeros_like(leaders), lengths[leaders])
        self._prompt_in |= zip(sequences.prompt_keys[leaders].tolist(), leaders.tolist(), strict=True)
        for request in fresh:
            self._features[request][0] = self._features[request][0][-1:]
        self._cached[fresh] = lengths[fresh]
        keys = sequences.prompt_keys[fresh]
        for key in np.unique(keys):
            source, siblings = self._prompt_in[int(key)], fresh[keys == key]
            rows = self._row_of[siblings[siblings != source]]
            cache.copy_rows(int(self._row_of[source]), rows, int(lengths[source]))

    def _catch_up(self, sequences: Sequences, requests: np.ndarray) -> torch.Tensor:
        """Run committed positions that are not cached yet; returns each request's last features."""
        fresh: list[torch.Tensor] = []
        tokens, counts, starts = [], np.zeros(len(requests), np.int64), self._cached[requests]
        for row, (request, start) in enumerate(zip(requests, starts, strict=True)):
            counts[row] = sum(len(part) for part in self._features[request])
            fresh += self._features[request]
            self._features[request] = []
            tokens.append(sequences.token_ids[request, start + 1 : start + 1 + counts[row]])
        assert (starts + counts == sequences.lengths[requests] - 1).all(), "a feature for every position but the last"
        self._cached[requests] = starts + counts
        out = self._forward(np.concatenate(tokens).astype(np.int64), torch.cat(fresh), requests, starts, counts)
        return out[uploaded(np.cumsum(counts) - 1, self._device)]

    def _forward(
        self,
        tokens: np.ndarray | torch.Tensor,
        features: torch.Tensor,
        requests: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
    ) -> torch.Tensor:
        """Run packed `[tokens, hidden]` through the head, with keys and values in the requests' cache rows."""
        cache = self._cache
        assert cache is not None, "it was made when start() told of the requests"
        segments = Segments(tokens, 0, starts, counts, self._row_of[requests])
        if isinstance(tokens, np.ndarray):
            (ids,) = cache.place(segments, self._device, tokens)
        else:
            cache.place(segments, self._device)
            ids = tokens
        embeddings = self._embed(ids).to(features.dtype)
        with active(cache):
            return self._step(embeddings, features, cache.placed.token_positions)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
