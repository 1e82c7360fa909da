"""Draft LM: any causal LM with the policy's tokenizer drafts token by token (arXiv 2211.17192).

A static speculator: heavyweight, trained before the run, never changed by it. It keeps an attention cache of its own and
catches up with what was committed since it last drafted, whoever drafted that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from atlas_rl.core import Draft, Prompts, Rollouts, Sequences, Verified
from atlas_rl.policy.base import PolicyCache, Segments, retire
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.speculators.base import NO_PROMPTS, Speculator
from atlas_rl.speculators.drawing import draw_full

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas_rl.policy.ragged_attention import RaggedBatch

_DRAFT_ROOM = 32  # cells past the longest text: all rows run to the longest draft wanted, also those about to end


class DraftLM(Speculator):
    """Drafts with a small causal LM, under the sampling parameters of the call.

    Coupled to the policy's noise, each draft token is the one that the draft LM would commit itself at that position
    (acceptance close to 1 - TV). Without coupling it is an independent draw, and `Draft.draft_probs` says from what.

    Args:
        model: The draft LM; only read.
        vocab_size: The policy's vocabulary size.

    Raises:
        ValueError: The draft LM has another vocabulary.
    """

    name = "draft_lm"

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self._runner = InProcessRunner(model)
        if self._runner.vocab_size != vocab_size:
            raise ValueError(
                f"the draft LM has a vocabulary of {self._runner.vocab_size} tokens, the policy one of {vocab_size}: "
                "a draft LM needs the policy's tokenizer"
            )
        self._sequences: Sequences | None = None
        self._cache: RaggedBatch | None = None

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        """Give the new requests a cache row; their prompts are run when the first draft is asked for."""
        if sequences is not self._sequences:
            num_requests, capacity = sequences.token_ids.shape
            self._sequences = sequences
            self._cache = self._runner.new_cache(num_requests, capacity + _DRAFT_ROOM)
            self._active = np.zeros(0, np.int64)
            self._cached = np.zeros(num_requests, np.int64)  # valid cached tokens of each request
            self._drafted: dict[int, np.ndarray] = {}  # tokens of its last draft
        self._active = np.concatenate([self._active, requests])

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int:
        """Tokens that are not cached, of all active requests: it runs them together."""
        return int((sequences.lengths[self._active] - self._cached[self._active]).sum())

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        """Draft for every request; all rows run to the longest draft wanted, shorter ones are cut."""
        assert sequences is self._sequences, "propose() before start()"
        assert self._cache is not None
        active, lengths = self._active, sequences.lengths[self._active]
        depth = min(int(max_draft_tokens.max(initial=0)), self._room(lengths))
        if depth <= 0:
            return Draft.empty(len(requests))
        tokens = np.zeros((len(active), depth), np.int64)
        confidence = np.zeros(tokens.shape, np.float32)
        probs: list[torch.Tensor] = []
        with self._runner.session(self._cache):
            fresh = [sequences.token_ids[r, self._cached[r] : n] for r, n in zip(active, lengths, strict=True)]
            for position in range(depth):
                new = np.array([len(row) for row in fresh], np.int64)
                segments = Segments(np.concatenate(fresh).astype(np.int64), 0, lengths + position - new, new)
                logits = self._runner.forward(segments, np.cumsum(new) - 1)
                tokens[:, position], confidence[:, position], q = draw_full(
                    self.name, logits, sequences, active, tokens[:, :position], couples_noise=self._couples_noise
                )
                if not self._couples_noise:
                    probs.append(q)
                fresh = list(tokens[:, position : position + 1])
        self._cached[active] = lengths + depth - 1
        self._drafted = dict(zip(active.tolist(), tokens, strict=True))
        row_of = {request: row for row, request in enumerate(active.tolist())}
        rows = np.array([row_of[int(request)] for request in requests], np.int64)
        draft_probs = None if self._couples_noise else torch.stack(probs, dim=1)[torch.from_numpy(rows)]
        return Draft(tokens[rows], np.minimum(max_draft_tokens, depth), confidence[rows], draft_probs)

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        """Keep the cached drafts that were committed and let finished requests go."""
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

    def refresh(self, rollouts: Rollouts, policy_version: int) -> np.ndarray | None:
        """Release the cache of the call before. A static drafter does not follow the policy."""
        self._sequences = None
        self._cache = None
        return None

    def _room(self, lengths: np.ndarray) -> int:
        """Most tokens that every row can still draft within the cache and the draft LM's own context."""
        assert self._cache is not None
        limit = min(self._cache.capacity, self._runner.max_context or self._cache.capacity)
        return int(limit - lengths.max(initial=0)) + 1


def load_draft_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load a draft LM from a checkpoint folder, onto a device and in a number format.

    Raises:
        ValueError: No checkpoint there, or its tokenizer is not the policy's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"draft_model: no checkpoint in '{folder}' (config.json is missing); "
            "a four-bit copy of the policy itself is draft_model='fp4'"
        )
    if tokenizer is not None and (folder / "tokenizer_config.json").is_file():
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"draft_model: the tokenizer in '{folder}' is not the policy's; drafts are token ids")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()
