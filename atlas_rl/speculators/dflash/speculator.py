"""DFlash and DSpark as a speculator: static, trained before the run and never changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlas_rl.core import Draft, Needs, SamplingParams, Sequences
from atlas_rl.policy.base import Segments
from atlas_rl.policy.upload import uploaded
from atlas_rl.speculators.dflash.attention import BlockAttention
from atlas_rl.speculators.dflash.checkpoint import load_dflash
from atlas_rl.speculators.dflash.head import DFlashHead
from atlas_rl.speculators.feature_head import FeatureHeadSpeculator
from atlas_rl.speculators.warm_up import write_cache

if TYPE_CHECKING:
    from atlas_rl.policy.view import PolicyView


class DFlashSpeculator(FeatureHeadSpeculator):
    """Drafts a block of tokens in one forward of a DFlash head, under the sampling parameters of the call.

    Each position of a draft has a distribution of its own, which does not depend on the tokens drawn at the others: a
    token is drawn from each. Only the Markov head of DSpark adds the influence of the token before. The block always has
    the length that the head was trained with, whatever draft length is wanted, so that the distributions depend on the
    text alone; only the wanted positions go through the LM head.

    The head's cache holds keys and values of the positions that the policy has run. A block's own are written behind
    them, and overwritten by the next ones.

    Args:
        head: A loaded head, which is moved to the policy's device, or the folder of a checkpoint, which is read once
            the policy is known.

    Raises:
        ValueError: At `bind`: the checkpoint is damaged or belongs to another policy.
    """

    name = "dflash"
    head: DFlashHead

    def __init__(self, head: DFlashHead | str | Path) -> None:
        super().__init__()
        self._given = head

    def bind(self, policy: PolicyView, couples_noise: bool) -> None:
        """Load the head for this policy."""
        super().bind(policy, couples_noise)
        given = self._given
        self._keep(given.to(policy.device) if isinstance(given, DFlashHead) else load_dflash(given, policy))
        config = self.head.config
        self.needs = Needs(layers=config.layers)
        self._token_ids = self.head.token_ids
        self._draft_room = max(self._draft_room, config.block_size)
        self._cell_bytes = (
            config.layer.num_hidden_layers * 2 * self._kv_heads * config.layer.head_dim * self._dtype.itemsize
        )

    def compile_for(self, sampling: SamplingParams) -> None:
        write_cache(self._kv_heads, self.head.config.layer.head_dim, self._dtype, self._device)
        super().compile_for(sampling)

    @property
    def _kv_heads(self) -> int:
        layer = self.head.config.layer
        return layer.num_key_value_heads or layer.num_attention_heads

    @property
    def _dtype(self) -> torch.dtype:
        return self.head.fc.weight.dtype

    @property
    def _logits_dtype(self) -> torch.dtype:
        return torch.float32 if self.head.lm_head is None else self.head.lm_head.weight.dtype

    def _features_of(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        return self.head.fuse(states)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return (self.head.embed_tokens or self._policy.embed)(token_ids)

    def _depth(self, sequences: Sequences, requests: np.ndarray, wanted: int) -> int:
        return min(wanted, self.head.config.max_draft_tokens)

    def _cells_of(self, depth: int) -> int:
        """The block begins with the text's last token."""
        return self.head.config.block_size - 1

    def _forward(
        self,
        tokens: np.ndarray | torch.Tensor,
        features: torch.Tensor,
        requests: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
    ) -> torch.Tensor:
        """Write keys and values of context positions, packed `[tokens, hidden]`, into the requests' cache rows."""
        cache = self._cache
        assert cache is not None, "it was made when start() told of the requests"
        cache.place(Segments(tokens, 0, starts, counts, self._row_of[requests]), self._device)
        keep = BlockAttention(cache, self.head.config.spans).keep
        self.head.read(features[None], cache.placed.token_positions[None], keep)
        return features

    def _draft(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray, depth: int) -> Draft:
        """Draft all positions at once; each row is as long as wanted, and the block allows."""
        depths = np.minimum(max_draft_tokens, depth)
        asked = np.flatnonzero(depths)
        if len(asked) < len(requests):  # a block costs as much for one token as for all
            draft = self._draft(sequences, requests[asked], max_draft_tokens[asked], depth)
            return draft.spread(asked, len(requests))
        drawing = self._drawing(sequences, requests, depths)
        self._catch_up(sequences, requests)
        # Position by position, as they are drawn.
        config, counts = self.head.config, [len(own) for own in drawing.rows]
        places = config.first_place + np.repeat(np.arange(len(counts)), counts)
        index = np.concatenate(drawing.rows) * config.block_size + places
        ids, out = self._run_blocks(sequences, requests)
        markov, previous = self.head.markov_head, ids[:: config.block_size]
        for logits in self._logits(out[uploaded(index, self._device)]).split(counts):
            if markov is None:
                drawing.draw(logits)
                continue
            drawn = drawing.draw(logits + markov(previous))
            previous = drawn if self._token_ids is None else self._token_ids[drawn]
        return drawing.finish(max_draft_tokens)

    def _run_blocks(self, sequences: Sequences, requests: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and inputs of the LM head, at every position of every request's block.

        Returns:
            int64 `[requests * block_size]`, and `[requests * block_size, hidden]`.
        """
        cache, config = self._cache, self.head.config
        assert cache is not None, "it was made when start() told of the requests"
        lengths = sequences.lengths[requests]
        tokens = np.full((len(requests), config.block_size), config.mask_token_id, np.int64)
        tokens[:, 0] = sequences.token_ids[requests, lengths - 1]
        sizes = np.full(len(requests), config.block_size)
        segments = Segments(tokens.reshape(-1), 0, lengths - 1, sizes, self._row_of[requests])
        (ids,) = cache.place(segments, self._device, tokens.reshape(-1))
        embeddings = self._embed(ids).to(self._dtype)
        attend = BlockAttention(cache, config.spans)
        return ids, self.head(embeddings[None], cache.placed.token_positions[None], attend)[0]

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        """By the checkpoint's own LM head or the policy's present one, with its scale and cap if it has these."""
        return self._policy.logits(features) if self.head.lm_head is None else self.head.lm_head(features)
