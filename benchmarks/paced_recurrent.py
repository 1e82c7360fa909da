"""The recurrent head beside a simulated device (`paced.py`): its network's time is the device's, its host code is real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from atlas_rl.core import Prompts, SamplingParams, Sequences
from atlas_rl.policy.base import PolicyCache
from atlas_rl.replay.record import Recorded
from atlas_rl.speculators.base import NO_PROMPTS, Coming
from atlas_rl.speculators.drawing import Drawing
from atlas_rl.speculators.recurrent.draft_graphs import FetchedDraft
from atlas_rl.speculators.recurrent.head import FoldedHead
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.paced import PacedLoop

TABLE_CALLS, FOLD_CALLS = 16, 12
"""Driver calls of the recurrent head's preparation, assumed: to read the policy's tables when a call begins, and to fold
the head after each refresh."""

AHEAD_S, AHEAD_CALLS = 20e-6, 14
"""Device seconds and driver calls of finding the inputs of a draft on the device, assumed: ten kernels of 2 microseconds."""

_REMEMBERED = 16  # longest draft


class PacedRecurrent(RecurrentSpeculator):
    """The recurrent head, with its network run off the clock, cached, and charged to the device.

    A draft is a function of prefix, noise and weights. The recorded texts are fixed, so each (request, position) is
    drafted once, at least as deep as requested.
    """

    loop: PacedLoop | None = None  # None while it learns, which is not timed

    def follow(self, recorded: Recorded, of: np.ndarray, loop: PacedLoop) -> None:
        """Draft in `loop`, whose requests are `of` (int64 `[n]`) of `recorded`."""
        if not hasattr(self, "_drafted"):
            shape = *recorded.sequences.token_ids.shape, _REMEMBERED
            self._drafted, self._sure = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
            self._depths = np.zeros(shape[:2], np.int64)
        self._of, self.loop = of, loop

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        if self.loop is None or sequences is self.learner.sequences:
            super().start(sequences, requests, prompts, cache)
            return
        device = self.loop.device
        with device.outside():
            super().start(sequences, requests, prompts, cache)
        device.submit(self.loop.costs.tables_s(self.learner.head), calls=TABLE_CALLS)

    def _folded_head(self) -> tuple[FoldedHead, torch.Tensor]:
        if self.loop is None:
            return super()._folded_head()
        device, former = self.loop.device, self._folded
        with device.outside():
            folded = super()._folded_head()
        if self._folded is not former:
            device.submit(self.loop.costs.fold_s(self.learner.head), calls=FOLD_CALLS)
        return folded

    def _draw(self, head: FoldedHead, token_ids: torch.Tensor, drawing: Drawing, depth: int) -> None:
        loop = self.loop
        assert loop is not None, "it drafts in paced loops only"
        with loop.device.outside():
            requests, newest = (carried.numpy() for carried in drawing.carried)
            drawn = self._looked_up(head, token_ids, loop.sequences, requests, newest, depth)
            indices = self.learner.index_of[drawn.token_ids]
            drawing.take(torch.from_numpy(indices), torch.from_numpy(drawn.max_probs))
        loop.device.submit(
            loop.costs.draft_s(len(requests), depth), calls=3
        )  # an upload, the kernel, and the download's
        loop.device.wait()

    def drafts_ahead(self, sampling: SamplingParams) -> bool:
        return self.loop is not None and self.learner.trained

    def _queue_ahead(
        self, sequences: Sequences, coming: Coming, known: np.ndarray, num_tokens: int
    ) -> Callable[[], FetchedDraft]:
        loop, (head, token_ids) = self.loop, self._folded_head()
        assert loop is not None, "it drafts in paced loops only"
        with loop.device.outside():
            requests, _, positions, starts = known
            accepted = coming.num_accepted.numpy()
            self._newest[torch.from_numpy(requests)] = coming.hidden.head_inputs[torch.from_numpy(starts + accepted)]
            # Requests that end have no next position.
            after = np.minimum(positions + accepted, sequences.token_ids.shape[1] - 1)
            lengths = sequences.lengths.copy()
            lengths[requests] = after
            chosen = coming.token_ids.numpy()[starts + accepted]
            drawn = self._looked_up(
                head,
                token_ids,
                replace(sequences, lengths=lengths),
                requests,
                self.learner.index_of[chosen],
                num_tokens,
            )
        loop.device.submit(loop.costs.draft_s(len(requests), num_tokens) + AHEAD_S, calls=AHEAD_CALLS)
        ready_s = loop.device.ready_s

        def fetch() -> FetchedDraft:
            loop.device.wait(ready_s)
            return drawn

        return fetch

    def _looked_up(
        self,
        head: FoldedHead,
        token_ids: torch.Tensor,
        sequences: Sequences,
        requests: np.ndarray,
        newest: np.ndarray,
        depth: int,
    ) -> FetchedDraft:
        """Drafts after the present texts."""
        own, positions = self._of[requests], sequences.lengths[requests]
        missing = np.flatnonzero(self._depths[own, positions] < depth)
        if len(missing):
            self._remember(head, token_ids, sequences, requests[missing], newest[missing], depth)
        ids = token_ids.numpy()[self._drafted[own, positions, :depth]]
        return FetchedDraft(ids, self._sure[own, positions, :depth].copy(), None)

    def _keep(self, states: torch.Tensor, places: torch.Tensor) -> None:
        if self.loop is None:
            super()._keep(states, places)
            return
        with self.loop.device.outside():
            super()._keep(states, places)
        self.loop.device.submit(0.0, calls=4)  # an upload, a read and a write of rows, and a change of type

    def _remember(
        self,
        head: FoldedHead,
        token_ids: torch.Tensor,
        sequences: Sequences,
        requests: np.ndarray,
        newest: np.ndarray,
        depth: int,
    ) -> None:
        depth = next(d for d in (4, 8, 12, _REMEMBERED) if d >= depth)
        drawing = Drawing(
            self.name, sequences, requests, np.full(len(requests), depth), self._device,
            couples_noise=self._couples_noise, token_ids=token_ids, carried=(requests, newest),
        )  # fmt: skip
        super()._draw(head, drawing, depth)
        own, positions = self._of[requests], sequences.lengths[requests]
        self._drafted[own, positions, :depth] = torch.stack(drawing._indices, dim=1).numpy()
        self._sure[own, positions, :depth] = torch.stack(drawing._max_probs, dim=1).numpy()
        self._depths[own, positions] = depth
