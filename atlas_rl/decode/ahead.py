"""Drafts that are queued on the device behind the verification of a step, for the next step.

On a GPU the device knows the outcome of a verification before the host does, and a drafter may need no more than that
for its next draft. Such a draft is planned while the forward runs. It starts when the verification ends, without waiting
for the host: the host commits meanwhile, and finds the draft when it plans the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.base import Controller, Step
from atlas_rl.core import Draft, SamplingParams, Sequences
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
        speculators: By name, those that draft ahead; drafts are asked of them in no other way.
        controller: Plans.
        recorder: Receives the seconds.

    Attributes:
        names: Names of the speculators.
    """

    def __init__(self, speculators: Mapping[str, Speculator], controller: Controller, recorder: StepRecorder) -> None:
        self.names = tuple(speculators)
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
        drafts of the step before. So nothing is queued there.
        """
        possible = runner.works_beside_host and verifier.couples_noise and controller.plans_ahead
        able = {name: one for name, one in speculators.items() if possible and one.drafts_ahead(sampling)}
        return cls(able, controller, recorder)

    def queue(self, step: Step, sequences: Sequences, coming: Coming) -> None:
        """Plan and queue the drafts of the step after `step`, whose forward runs, inside a context of the recorder."""
        self._recorder.switch("controller")
        ready = [name for name in self.names if name in step.ready]
        plan = self._controller.plan_ahead(step, ready) if ready else {}
        self._has_planned = bool(ready)
        self._recorder.switch("draft")
        for name, num_tokens in plan.items():
            fetch = self._speculators[name].propose_ahead(sequences, coming, num_tokens)
            self._queued[name] = _Queued(coming.requests, num_tokens, fetch)

    def drop(self) -> None:
        """The outcome did not hold: nothing that was queued behind it is of use."""
        self._queued.clear()

    def fetch(self, sequences: Sequences, requests: np.ndarray, step: Step) -> None:
        """Put the queued drafts into a step of some requests (int64 `[batch]`), inside `recorder.time("controller")`.

        The step is charged for the wait. What the device draws beside the host's work costs nothing.
        """
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
