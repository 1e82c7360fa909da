"""Draft LM: any causal LM with the policy's tokenizer drafts token by token (arXiv 2211.17192).

A static speculator: large, trained before the run, never changed by it. It keeps its own attention cache during a call,
and catches up with all tokens committed since it last drafted, whoever drafted them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from atlas_rl.core import Draft, Prompts, Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.policy.base import PolicyCache, Segments, retire
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.causal_lm import load_causal_lm, load_tokenizer
from atlas_rl.speculators.drawing import Drawing
from atlas_rl.speculators.identify import check_finite
from atlas_rl.speculators.warm_up import draw_from_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas_rl.policy.ragged_attention import RaggedBatch
    from atlas_rl.policy.view import PolicyView

# Largest difference of vocabulary sizes, as a share of the larger one, that padding and added tokens explain.
_PADDING_SHARE = 0.2
_DRAFT_ROOM = 32  # cells past the longest text: all rows run to the longest wanted draft, even those about to end


class DraftLM(Speculator):
    """Drafts with a small causal LM, under the sampling parameters of the call.

    Coupled to the policy's noise, each draft token is the one that the draft LM itself would commit at that position
    (acceptance close to 1 - TV). Without coupling it is an independent draw from `Draft.draft_probs`.

    One tokenizer can come with embeddings of different sizes, padded differently or extended by added tokens. The draft
    LM then drafts over the rows that both have. It reads tokens without an embedding as its token 0, which costs only
    acceptance.

    Args:
        model: The draft LM; moved to the policy's device, and only read.
        vocab_size: The policy's vocabulary size.
        same_tokenizer: Whether its tokenizer is known to be the policy's; vocabulary sizes may then differ by any
            amount.

    Raises:
        ValueError: It is no causal LM, has weights that are not finite, or another vocabulary (here and at `bind`).
    """

    name = "draft_lm"

    def __init__(self, model: nn.Module, vocab_size: int, *, same_tokenizer: bool = False) -> None:
        self._runner = InProcessRunner(model)
        check_finite(dict(self._runner.model.named_parameters()), "the draft LM")
        self._same_tokenizer = same_tokenizer
        self._set_vocabulary(vocab_size)
        self._sequences: Sequences | None = None
        self._cache: RaggedBatch | None = None

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Draft for this policy, on its present device; its vocabulary may have grown."""
        super().bind(policy, couples_noise)
        if self._runner.device != policy.device:
            self._runner = InProcessRunner(self._runner.model.to(policy.device))
        self._set_vocabulary(policy.vocab_size)

    def compile_for(self, sampling: SamplingParams) -> None:
        one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
        with self._runner.session(self._runner.new_cache(1, 1)):
            self._runner.forward(Segments(zero, 0, zero, one, zero, settled=one), zero)
        draw_from_logits(sampling, self._vocab_size, self._runner.device, couples_noise=self._couples_noise)

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Give the new requests cache rows; their prompts run at the first draft."""
        if sequences is not self._sequences:
            num_requests = len(sequences.lengths)
            self._sequences = sequences
            self._cache = self._runner.new_cache(num_requests, sequences.max_length + _DRAFT_ROOM)
            self._active = np.zeros(0, np.int64)
            self._cached = np.zeros(num_requests, np.int64)  # valid cached tokens of each request
            self._drafted: dict[int, np.ndarray] = {}  # tokens of its last draft
        self._active = np.concatenate([self._active, requests])

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int:
        """Uncached tokens of all active requests that fit its context; they run together."""
        lengths = sequences.lengths[self._active]
        waiting = lengths - self._cached[self._active]
        return int(waiting[self._room(lengths) > 0].sum())

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request; all rows run to the longest wanted draft, or to the end of the context."""
        assert sequences is self._sequences, "propose() before start()"
        self._make_room(sequences, int(max_draft_tokens.max(initial=0)))
        known = np.flatnonzero(np.isin(requests, self._active))
        if len(known) < len(requests):
            return self.propose(sequences, requests[known], max_draft_tokens[known]).spread(known, len(requests))
        active, room = self._active, self._room(sequences.lengths[self._active])
        depth = min(int(max_draft_tokens.max(initial=0)), int(room.max(initial=0)))
        if depth <= 0:
            return Draft.empty(len(requests))
        draft = self._run(sequences, np.clip(room, 0, depth))
        row_of = {request: row for row, request in enumerate(active.tolist())}
        rows = np.array([row_of[int(request)] for request in requests], np.int64)
        if len(rows) < len(active) or (np.diff(rows) != 1).any():
            draft = draft.of(rows)
        draft.lengths = np.minimum(max_draft_tokens, draft.lengths)
        return draft

    def _run(self, sequences: Sequences, depths: np.ndarray) -> Draft:
        """Draft `depths` tokens (int64 `[active]`) for every active request."""
        assert self._cache is not None
        active, lengths = self._active, sequences.lengths[self._active]
        drawing = Drawing(self.name, sequences, active, depths, self._runner.device, couples_noise=self._couples_noise)
        first = drawing.rows[0]
        fresh = [
            sequences.token_ids[r, self._cached[r] : n] for r, n in zip(active[first], lengths[first], strict=True)
        ]
        tokens: np.ndarray | torch.Tensor = np.concatenate(fresh).astype(np.int64)
        with self._runner.session(self._cache):
            for position, rows in enumerate(drawing.rows):
                new = np.ones(len(rows), np.int64) if position else lengths[rows] - self._cached[active[rows]]
                starts = lengths[rows] + position - new
                segments = Segments(self._readable(tokens), 0, starts, new, rows, settled=lengths[rows])
                logits = self._in_policys_vocabulary(self._runner.forward(segments, np.cumsum(new) - 1))
                tokens = drawing.draw(logits)
        draft = drawing.finish(depths)
        ran = depths > 0
        self._cached[active[ran]] = (lengths + depths - 1)[ran]
        self._drafted = {int(active[row]): draft.token_ids[row, : depths[row]] for row in np.flatnonzero(ran)}
        return draft

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the cached drafts that were committed, and release finished requests."""
        assert sequences is self._sequences, "observe() before start()"
        assert self._cache is not None
        for row, request in enumerate(verified.requests.tolist()):
            count = int(verified.num_committed[row])
            before = int(sequences.lengths[request]) - count
            drafted = self._drafted.pop(request, np.zeros(0, np.int64))[:count]
            same = drafted == verified.token_ids[row, : len(drafted)]
            stood = len(same) if same.all() else int(same.argmin())
            self._cached[request] = min(int(self._cached[request]), before + stood, before + count - 1)
        ended = np.isin(self._active, verified.requests[verified.finished])
        if ended.any():
            with self._runner.session(self._cache):
                self._active = retire(self._active, ended, lambda request: int(self._cached[request]), self._runner)

    def release(self) -> None:
        """Free the cache, and with it the CUDA graphs that were captured over it."""
        self._sequences, self._cache, self._drafted = None, None, {}

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Free the cache of requests that still run. A static drafter does not follow the policy."""
        self.release()
        return None

    def _make_room(self, sequences: Sequences, depth: int) -> None:
        """If memory is short, drop the shortest requests for good; other drafters may draft for them."""
        cache, lengths = self._cache, sequences.lengths[self._active]
        assert cache is not None, "room is made for requests that start() has told of"
        needed = min(int(lengths.max(initial=0)) + depth, cache.capacity)
        if needed <= cache.held_cells and len(lengths) <= cache.held_rows:
            return
        with self._runner.session(cache):
            excess = len(lengths) - max(1, self._runner.cells_that_fit() // (max(1, needed) + self._runner.state_cells))
            if excess > 0:
                lost = np.zeros(len(lengths), bool)
                lost[np.argsort(lengths, kind="stable")[:excess]] = True
                self._active = retire(self._active, lost, lambda request: int(self._cached[request]), self._runner)
            self._runner.reserve(len(self._active), needed)

    def _room(self, lengths: np.ndarray) -> np.ndarray:
        """Most tokens that each row can still draft, given the cache and the model's context; 0 or less for none."""
        assert self._cache is not None
        limit = min(self._cache.capacity, self._runner.max_context or self._cache.capacity)
        return limit - lengths + 1

    def _set_vocabulary(self, vocab_size: int) -> None:
        own = self._runner.vocab_size
        if not self._same_tokenizer and min(own, vocab_size) < (1 - _PADDING_SHARE) * max(own, vocab_size):
            raise ValueError(
                f"the draft LM has a vocabulary of {own} tokens, the policy one of {vocab_size}: padding explains less, and "
                "a draft LM needs the policy's tokenizer"
            )
        self._vocab_size = vocab_size

    def _readable(self, token_ids: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """Tokens, int64 `[n]`, with 0 for tokens without an embedding in the draft LM."""
        embeddings = self._runner.model.get_input_embeddings().weight.shape[0]
        return token_ids if embeddings >= self._vocab_size else token_ids * (token_ids < embeddings)

    def _in_policys_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, draft vocab]` over the policy's vocabulary; -inf for tokens that the draft LM lacks."""
        missing = self._vocab_size - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self._vocab_size].contiguous()


def load_draft_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a draft LM from a folder, to a device and in a number format; `ValueError` as for `load_causal_lm`."""
    return load_causal_lm(folder, dtype).to(device)


def shares_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the tokenizer in a draft LM's folder is the policy's; False if either is unknown.

    Tokens that only one of them has count as added and are ignored.

    Raises:
        ValueError: It is another tokenizer, or damaged.
    """
    if tokenizer is None or not (folder / "tokenizer_config.json").is_file():
        return False
    own = _by_id(load_tokenizer(folder, "draft_model").get_vocab())
    policys = _by_id(tokenizer.get_vocab())
    common = own.keys() & policys.keys()
    differing = [token_id for token_id in common if own[token_id] != policys[token_id]]
    if differing or len(common) < (1 - _PADDING_SHARE) * max(len(own), len(policys)):
        reason = f"token {min(differing)} is another" if differing else f"{len(own)} tokens instead of {len(policys)}"
        raise ValueError(
            f"draft_model: the tokenizer in '{folder}' is not the policy's ({reason}); drafts are token ids"
        )
    return True


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {token_id: token for token, token_id in vocabulary.items()}
