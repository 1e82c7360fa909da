"""The verbs `plan` and `propose`: asks speculators as planned, and merges their drafts into one per request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.controller.base import Admission, Controller, Rest, Step
from atlas_rl.core import Draft, Sequences
from atlas_rl.counts import asked_of, bounds, tokens_of
from atlas_rl.decode.ahead import DraftsAhead
from atlas_rl.decode.observing import Observing
from atlas_rl.policy.upload import uploaded
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import Speculator


class Proposing:
    """Asks speculators for drafts, one after the other, until the controller stops.

    Args:
        speculators: By name, in the controller's order.
        controller: Plans each step.
        recorder: Receives the seconds.
        observing: Outcomes that speculators have not observed yet; one that is asked observes first.
        ahead: Drafts that were queued while the previous forward ran; None for none.

    Attributes:
        num_asked: Draft tokens asked for so far, per speculator that was asked.
        num_proposed: Draft tokens proposed so far, likewise.
    """

    def __init__(
        self,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        recorder: StepRecorder,
        observing: Observing,
        ahead: DraftsAhead | None = None,
    ) -> None:
        self.num_asked: dict[str, int] = defaultdict(int)
        self.num_proposed: dict[str, int] = defaultdict(int)
        self._speculators, self._controller, self._recorder = speculators, controller, recorder
        self._observing, self._ahead = observing, ahead

    def run(self, sequences: Sequences, requests: np.ndarray, room: np.ndarray, rest: Rest | None = None) -> Step:
        """Plan a step and draft for it, inside `recorder.time("controller")`.

        Args:
            sequences: All requests of the call.
            requests: int64 `[batch]`, those of the step.
            room: int64 `[batch]`, most draft tokens each can still use.
            rest: As in `Step`.

        Returns:
            The step, with its drafts.
        """
        backlog = {}
        for name, speculator in self._speculators.items():
            tokens = speculator.backlog(sequences, requests)
            if tokens is not None:
                backlog[name] = tokens
        context_tokens = tokens_of(requests, sequences.lengths)
        drawn_as = self.drawn_as(sequences, requests)
        step = Step(room, context_tokens, list(backlog), backlog=backlog, drawn_as=drawn_as, rest=rest)
        if self._ahead is not None and self._ahead.names:
            self._ahead.fetch(sequences, requests, step)
            for name, draft in step.drafts.items():
                self._count(name, asked_of(step.asked[name])[1], draft)
        while True:
            plan = self._controller.plan(step)
            if not plan:
                return step
            for name, wanted in plan.items():
                self.ask(name, sequences, requests, wanted, step)
            if not step.left:
                return step

    def ask(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray, step: Step) -> None:
        """Ask one speculator for drafts of a step, at most `wanted` (int64 `[batch]`) tokens each."""
        began_s = self._update(name, sequences, requests, step)
        batch, (num_asked, num_wanted) = len(requests), asked_of(wanted)
        if num_asked == batch:
            draft = self.draft(name, sequences, requests, wanted)
        elif num_asked:
            asked = np.flatnonzero(wanted > 0)
            step.backlog[name] = self._speculators[name].backlog(sequences, requests[asked]) or 0
            draft = self.draft(name, sequences, requests[asked], wanted[asked]).spread(asked, batch)
        else:
            draft = Draft.empty(batch)
        step.asked[name], step.drafts[name] = wanted, draft
        self._count(name, num_wanted, draft)
        step.draft_s[name] = self._recorder.switch("controller") - began_s

    def _count(self, name: str, num_wanted: int, draft: Draft) -> None:
        """Count a draft of which `num_wanted` tokens were asked for."""
        self.num_asked[name] += num_wanted
        self.num_proposed[name] += asked_of(draft.lengths)[1]

    def draft(self, name: str, sequences: Sequences, requests: np.ndarray, wanted: np.ndarray) -> Draft:
        """Ask one speculator for drafts of some requests, at least one token each."""
        return self._speculators[name].propose(sequences, requests, wanted)

    def drawn_as(self, sequences: Sequences, requests: np.ndarray) -> Hashable:
        """Key of the distribution that the requests' tokens are drawn from."""
        return sequences.sampling.distribution

    def _update(self, name: str, sequences: Sequences, requests: np.ndarray, step: Step) -> float:
        """Show a speculator the latest tokens, begin to draft, and return the time from which asking it is charged.

        If it observed later, the device would run a forward meanwhile: then asking is what exposes it. If nothing runs
        beside the host, it takes as long either way.
        """
        recorder, observing = self._recorder, self._observing
        if name not in observing.waiting:
            return recorder.switch("draft")
        began_s = recorder.switch("observe")
        observing.hand_over(name)
        observed_s = recorder.switch("draft")
        if observing.is_hidden:
            return began_s
        step.exposed_s -= observed_s - began_s
        return observed_s


@cached_njit(nogil=True)
def take_rows(
    token_ids: np.ndarray,
    confidence: np.ndarray,
    drafters: np.ndarray,
    index: int,
    lengths: np.ndarray,
    own_tokens: np.ndarray,
    own_confidence: np.ndarray,
) -> None:
    """Copy the tokens and confidences of drafter `index` into its rows, up to their lengths; a compiled loop."""
    for row in range(len(drafters)):
        if drafters[row] == index:
            for column in range(lengths[row]):
                token_ids[row, column] = own_tokens[row, column]
                confidence[row, column] = own_confidence[row, column]


def merge(drafts: Mapping[str, Draft], names: list[str], admission: Admission, vocab_size: int) -> Draft:
    """Merge drafts into one per request: from the admitted speculator, to the admitted length."""
    batch, width = len(admission.lengths), bounds(admission.lengths)[1]
    if width == 0:
        return Draft.empty(batch)
    merged = Draft(np.zeros((batch, width), np.int64), admission.lengths, np.zeros((batch, width), np.float32))
    any_drawn = False
    for name, draft in drafts.items():
        any_drawn = any_drawn or draft.draft_probs is not None
        take_rows(
            merged.token_ids, merged.confidence, admission.drafters, names.index(name), admission.lengths,
            np.ascontiguousarray(draft.token_ids, np.int64), np.ascontiguousarray(draft.confidence, np.float32),
        )  # fmt: skip
    if any_drawn:
        rows_of = {
            name: np.flatnonzero((admission.drafters == names.index(name)) & (admission.lengths > 0)) for name in drafts
        }
        merged.draft_probs = _merged_probs(drafts, rows_of, merged, vocab_size)
    return merged


def _merged_probs(
    drafts: Mapping[str, Draft], rows_of: Mapping[str, np.ndarray], merged: Draft, vocab_size: int
) -> torch.Tensor | None:
    """`draft_probs` of the merged draft; rows without a draft are undefined. Does not wait for the device."""
    used = [name for name, rows in rows_of.items() if len(rows)]
    with_probs = [probs for name in used if (probs := drafts[name].draft_probs) is not None]
    if not with_probs:
        return None
    width = merged.token_ids.shape[1]
    if len(used) == 1:  # nothing to merge, and a copy over a large vocabulary is not free
        return with_probs[0][:, :width]
    draft_probs = with_probs[0].new_zeros(*merged.token_ids.shape, vocab_size)
    for name in used:
        own, rows = drafts[name].draft_probs, rows_of[name]
        index = uploaded(rows, draft_probs.device)
        if own is not None:
            draft_probs[index, : own.shape[1]] = own[index, :width]
        else:
            tokens = uploaded(merged.token_ids[rows], draft_probs.device)
            columns = torch.arange(width, device=draft_probs.device)
            draft_probs[index[:, None], columns, tokens] = 1.0
    return draft_probs
