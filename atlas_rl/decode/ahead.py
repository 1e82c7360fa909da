"""Drafts that are queued on the device behind the verification of a step, for the next step.

On a GPU the device knows the outcome of a verification before the host does, and a drafter may need no more than that
for its next draft. Such a draft is planned while the forward runs. It starts when the verification ends, without waiting
for the host: the host commits meanwhile, and finds the draft when it plans the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.base import Controller, Step
from atlas_rl.core import Draft, Hidden, SamplingParams, Sequences
from atlas_rl.counts import bounds
from atlas_rl.policy.base import PolicyRunner
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.sampling.verification import Verifier
from atlas_rl.speculators.base import Coming, Speculator


class _Queued(NamedTuple):
    """A draft of `num_tokens` tokens for each of some requests, int64 `[n]`; `fetch` waits for it."""

    requests: np.ndarray
    num_tokens: int
    fetch: Callable[[], Draft]


class DraftsAhead:
    """The drafts that are queued, and those who make them.

    Args:
        speculators: By name, those that draft ahead.
        controller: Plans.
        recorder: Receives the seconds.

    Attributes:
        names: Names of the speculators.
        offered: Those that the controller could queue drafts of for the next step, which are asked in no other way then.
            Before the first forward all of them: they begin behind it.
        once_s: Seconds so far that queuing took for work that is done once, such as capturing.
    """

    def __init__(self, speculators: Mapping[str, Speculator], controller: Controller, recorder: StepRecorder) -> None:
        self.names = self.offered = tuple(speculators)
        self.once_s = 0.0
        self._speculators, self._controller, self._recorder = speculators, controller, recorder
        self._queued: dict[str, _Queued] = {}
        self._has_planned = False  # the next step

    @classmethod
    def of(
        cls,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        recorder: StepRecorder,
        runner: PolicyRunner,
        verifier: Verifier,
        sampling: SamplingParams,
    ) -> DraftsAhead:
        """For one call.

        Under rejection verification, what is drafted must depend on the prefix alone, but a plan made ahead also reads the
        drafts of the step before. So nothing is queued there. Nor is a draft of a speculator that the controller does
        not know: it may have been made for the first of them only.
        """
        possible = runner.works_beside_host and verifier.couples_noise and controller.plans_ahead
        known = controller.speculators if possible else ()
        able = {name: one for name, one in speculators.items() if name in known and one.drafts_ahead(sampling)}
        return cls(able, controller, recorder)

    def queue(
        self,
        step: Step,
        sequences: Sequences,
        requests: np.ndarray,
        decided: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None,
        hidden: Hidden,
    ) -> None:
        """Plan and queue the drafts of the step after `step`, whose forward runs, inside a context of the recorder.

        Args:
            step: The step.
            sequences: All requests of the call.
            requests: int64 `[batch]`, those of the step.
            decided: See `Verifying`. If the host decides, nothing can be queued.
            hidden: States of the forward.
        """
        self.offered, self._has_planned = (), False
        if decided is None or bounds(step.room)[1] <= 1:  # the step takes a token of everybody's room at least
            return
        self.offered = tuple([name for name in self.names if name in step.ready])
        self._has_planned = bool(self.offered)
        if not self.offered:
            return
        self._recorder.switch("controller")
        plan = self._controller.plan_ahead(step, self.offered)
        if not plan:
            return
        self._recorder.switch("draft")
        coming = Coming(requests, *decided(), hidden)
        for name, num_tokens in plan.items():
            speculator = self._speculators[name]
            once_s = speculator.once_s
            fetch = speculator.propose_ahead(sequences, coming, num_tokens)
            self.once_s += max(0.0, speculator.once_s - once_s)  # less if it has failed
            self._queued[name] = _Queued(requests, num_tokens, fetch)

    def drop(self) -> None:
        """The outcome did not hold: nothing that was queued behind it is of use."""
        self._queued.clear()

    def fetch(self, sequences: Sequences, requests: np.ndarray, step: Step) -> None:
        """Put the queued drafts into a step of some requests (int64 `[batch]`), inside `recorder.time("controller")`.

        The step is charged for the wait. What the device draws beside the host's work costs nothing.
        """
        step.ahead = self.offered
        step.planned_ahead, self._has_planned = self._has_planned, False
        while self._queued:
            name, (drafted_for, num_tokens, fetch) = self._queued.popitem()
            began_s = self._recorder.switch("draft")
            draft = fetch()
            row_of = np.full(len(sequences.lengths), -1)
            asked, tokens, confidence, lengths, anybody = of_active(
                drafted_for, row_of, requests, step.room, num_tokens, np.ascontiguousarray(draft.token_ids, np.int64),
                np.ascontiguousarray(draft.confidence, np.float32), draft.lengths.astype(np.int64),
            )  # fmt: skip
            waited_s = self._recorder.switch("controller") - began_s
            if anybody:
                step.asked[name], step.drafts[name] = asked, Draft(tokens, lengths, confidence)
                step.draft_s[name] = waited_s
            else:  # all of its requests have ended, or have no room left
                step.wasted_s += waited_s


@cached_njit(nogil=True)
def of_active(
    drafted_for: np.ndarray,
    row_of: np.ndarray,
    requests: np.ndarray,
    room: np.ndarray,
    num_tokens: int,
    token_ids: np.ndarray,
    confidence: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
    """The drafts of the requests of a step, of drafts for those of the step before.

    Args:
        drafted_for: int64 `[n]`, requests that drafts were made for.
        row_of: int64 `[num_requests]`, -1 everywhere; overwritten.
        requests: int64 `[batch]`, requests of the step; those without a draft get an empty one.
        room: int64 `[batch]`, most draft tokens each can still use.
        num_tokens: Draft tokens that were asked for, for each.
        token_ids: int64 `[n, width]`, like `Draft`, and the next two.
        confidence: float32 `[n, width]`.
        lengths: int64 `[n]`.

    Returns:
        int64 `[batch]`, tokens asked for; tokens, confidences and lengths of the drafts; whether any was asked for.
    """
    batch, width = len(requests), token_ids.shape[1]
    asked, own_lengths = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    own_tokens, own_confidence = np.zeros((batch, width), np.int64), np.full((batch, width), np.float32(0.5))
    anybody = False
    for row in range(len(drafted_for)):
        row_of[drafted_for[row]] = row
    for row in range(batch):
        former = row_of[requests[row]]
        if former < 0:
            continue
        asked[row] = min(num_tokens, room[row])
        anybody = anybody or asked[row] > 0
        own_lengths[row] = min(lengths[former], room[row])
        for column in range(width):
            own_tokens[row, column], own_confidence[row, column] = token_ids[former, column], confidence[former, column]
    return asked, own_tokens, own_confidence, own_lengths, anybody
