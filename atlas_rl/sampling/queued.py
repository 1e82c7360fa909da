"""Verification as part of a captured decode step: one copy brings its inputs with the tokens, one fetches its results."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch

from atlas_kernels.verify import Verification
from atlas_rl.core import Draft, Sequences
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.policy.upload import begin_download
from atlas_rl.sampling.packing import padded_positions


class QueuedVerification(StepTail):
    """Verification of the drafts of one step, padded to as many requests as the step has tokens.

    Args:
        draft: Drafts of the batch.
        sequences: All requests.
        requests: int64 `[batch]`.
        launch: Queues the kernels over `[logits, drafts, starts, keys, positions]`, without draft probabilities.
        key: Equal if `launch` is the same.

    Attributes:
        starts: int64 `[batch + 1]`, first position of each request among the packed ones; known once `inputs` are.
    """

    starts: np.ndarray

    def __init__(
        self,
        draft: Draft,
        sequences: Sequences,
        requests: np.ndarray,
        launch: Callable[[list[torch.Tensor]], Verification],
        key: Hashable,
    ) -> None:
        self._draft, self._sequences, self._requests = draft, sequences, requests
        self._launch, self.key = launch, key

    def inputs(self, size: int) -> np.ndarray:
        sequences, draft = self._sequences, self._draft
        numbers = padded_positions(
            size, self._requests, sequences.lengths, sequences.noise_keys, draft.token_ids, draft.lengths
        )
        self.starts = numbers[3 * size : 3 * size + self._requests.size + 1]
        return numbers

    def run(self, logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Verify; the result is int32 `[7 * size]`: accepted counts, tokens (int64 each) and three figures (float32)."""
        size = len(inputs) // 4
        drafts, keys, positions = inputs[: 3 * size].view(3, size)
        verified = self._launch([logits, drafts, inputs[3 * size :], keys, positions])
        numbers = verified.num_accepted, verified.token_ids
        figures = verified.logprobs, verified.entropies, verified.max_probs
        return torch.cat([each.view(torch.int32) for each in (*numbers, *figures)])

    def decided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the results on the device, once the step has run: int64 `[n]` tokens and `[batch]` accepted counts."""
        assert self.result is not None, "the step has not run it"
        size = len(self.result) // 7
        num_accepted, token_ids = self.result[: 4 * size].view(torch.int64).view(2, size)
        return token_ids[: int(self.starts[-1])], num_accepted[: self._requests.size]

    def begin_download(self) -> Callable[[], list[np.ndarray]]:
        """Queue the copy of the results, once the step has run; the returned function waits for it and cuts the padding.

        It gives int64 `[batch]` accepted counts, int64 `[n]` tokens, and float32 `[n]` logprobs, entropies and largest
        probabilities.
        """
        assert self.result is not None, "the step has not run it"
        fetch, total, batch = begin_download([self.result]), int(self.starts[-1]), self._requests.size

        def fetched() -> list[np.ndarray]:
            (here,) = fetch()
            size = here.size // 7
            numbers, figures = here[: 4 * size].view(np.int64), here[4 * size :].view(np.float32)
            parts = figures[:total], figures[size : size + total], figures[2 * size : 2 * size + total]
            return [numbers[:batch], numbers[size : size + total], *parts]

        return fetched
