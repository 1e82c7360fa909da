"""Replays a recorded call for any drafter, exactly and without the policy.

Under drafter-invariant sampling the rollouts do not depend on the drafts. So a recorded run (tokens, the policy's hidden
states, the embeddings of the tokens it used) tells for every drafter, draft length and controller how much would have been
accepted. The decode loop is the real one; only its tokens come from the record. Times come from `Costs`, fitted to a live
run's trace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from atlas_rl.controller.base import Controller
from atlas_rl.core import Draft, Hidden, Rollouts, SamplingParams, Sequences
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy.base import PolicyRunner, Segments, Taps
from atlas_rl.policy.step_tail import StepTail
from atlas_rl.replay.costs import Costs, PaidProposing, ToldClock
from atlas_rl.replay.record import Recorded
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import StepReport
from atlas_rl.sampling.verification import Outcome, Verifier
from atlas_rl.speculators.base import Speculator


def replay(
    recorded: Recorded,
    speculators: Mapping[str, Speculator],
    controller: Controller,
    costs: Costs | None = None,
) -> tuple[StepReport, Rollouts]:
    """Run the decode loop over a recorded call.

    Args:
        recorded: The call; the speculators must be bound to a `RecordedPolicy` that follows it.
        speculators: By name, in the controller's order.
        controller: Plans each step.
        costs: Seconds of forwards and drafts. The controller is told these, and the report adds them up, without prefill
            and sampling. None uses the times of the replay itself, which runs no policy.

    Returns:
        The report of a live run, except for entropies and times (see `costs`), and the rollouts. The caller refreshes the
        drafters with them between calls.
    """
    true = recorded.sequences
    sequences, max_lengths = unfinished(recorded)
    clock = ToldClock() if costs else None
    recorder = StepRecorder(speculators=tuple(speculators), clock=clock or time.perf_counter)
    loop = _ReplayLoop(recorded, speculators, controller, sequences, max_lengths, recorder)
    if costs is not None and clock is not None:
        loop.pay(costs, clock)
    loop.run()
    assert (sequences.lengths == true.lengths).all()
    report = recorder.finish(
        step=0,
        policy_version=true.policy_version,
        mode="standalone",
        num_prompt_tokens=int(true.prompt_lengths.sum()),
        completion_lengths=true.lengths - true.prompt_lengths,
    )
    return report, Rollouts(sequences)


def unfinished(recorded: Recorded) -> tuple[Sequences, np.ndarray]:
    """The requests of a recorded call before their first token, and their final lengths, int64 `[num_requests]`."""
    true = recorded.sequences
    token_ids = np.zeros_like(true.token_ids)
    for request, length in enumerate(true.prompt_lengths):
        token_ids[request, :length] = true.token_ids[request, :length]
    sequences = Sequences(
        token_ids, true.prompt_lengths.copy(), true.prompt_lengths, true.prompt_keys, true.noise_keys, true.sampling,
        true.vocab_size, true.policy_version, true.max_length,
    )  # fmt: skip
    # A rollout that stopped by itself had room to go on: drafts may reach as far as they did in the live run.
    stopped = true.sampling.ends(true.token_ids[np.arange(len(true.lengths)), true.lengths - 1])
    max_lengths = np.minimum(true.prompt_lengths + true.sampling.max_new_tokens, true.max_length)
    return sequences, np.where(stopped, max_lengths, true.lengths)


def head_inputs_at(recorded: Recorded) -> np.ndarray:
    """int64 per request: add a completion token's position to get its index in `recorded.head_inputs`."""
    completions = recorded.sequences.lengths - recorded.sequences.prompt_lengths
    places: np.ndarray = np.cumsum(completions) - completions - recorded.sequences.prompt_lengths
    return places


class _ReplayLoop(DecodeLoop):
    """The decode loop with forwards answered by the record."""

    def __init__(
        self,
        recorded: Recorded,
        speculators: Mapping[str, Speculator],
        controller: Controller,
        sequences: Sequences,
        max_lengths: np.ndarray,
        recorder: StepRecorder,
    ) -> None:
        true = recorded.sequences
        runner, verifier = NoRunner(true.vocab_size), _FromRecord(true)
        super().__init__(runner, verifier, speculators, controller, sequences, len(true.lengths), max_lengths, recorder)
        self._recorded = recorded
        cached = true.lengths - 1
        self._head_inputs_at = head_inputs_at(recorded)
        self._layers_at = np.cumsum(cached) - cached
        self._paid: tuple[Costs, ToldClock] | None = None

    def pay(self, costs: Costs, clock: ToldClock) -> None:
        """Charge forwards and drafts the seconds of `costs`, on the recorder's clock."""
        self._paid = costs, clock
        self.proposing = PaidProposing(self.speculators, self.controller, self.recorder, self.observing, costs, clock)

    def forward(self, requests: np.ndarray, draft: Draft, tail: StepTail | None = None) -> tuple[torch.Tensor, Hidden]:
        lengths, starts = draft.lengths + 1, self.sequences.lengths[requests]
        if self._paid is not None:
            costs, clock = self._paid
            num_tokens, context = int(lengths.sum()), int(starts.sum())
            table = costs.forward.predict(num_tokens, context)
            assert table is not None, "costs were fitted to forwards"
            clock.now_s += float(table[num_tokens])
        first = np.cumsum(lengths) - lengths
        row = np.repeat(np.arange(len(requests)), lengths)
        # Position of the token that is drawn, clipped to the rollout: hidden states beyond its end are never used.
        drawn = starts[row] + np.arange(len(row)) - first[row]
        drawn = np.minimum(drawn, self._recorded.sequences.lengths[requests][row] - 1)
        index = torch.from_numpy(self._layers_at[requests[row]] + drawn - 1)
        logits = torch.empty(0, dtype=torch.float32, device="cpu")
        return logits, Hidden(first, self._head_inputs(requests[row], drawn), self._layers(index))

    def prefill(self, leaders: np.ndarray, first_row: int) -> tuple[torch.Tensor, Hidden]:
        lengths = self.sequences.prompt_lengths[leaders]
        first = np.cumsum(lengths) - lengths
        row = np.repeat(np.arange(len(leaders)), lengths)
        index = torch.from_numpy(self._layers_at[leaders][row] + np.arange(len(row)) - first[row])
        logits = torch.empty(len(leaders), 0, dtype=torch.float32, device="cpu")
        return logits, Hidden(first, self._head_inputs(leaders, lengths), self._layers(index))

    def _head_inputs(self, requests: np.ndarray, drawn: np.ndarray) -> torch.Tensor:
        """Hidden states from which the tokens at positions `drawn` of `requests` (int64 `[n]` each) were drawn."""
        return self._recorded.head_inputs[torch.from_numpy(self._head_inputs_at[requests] + drawn)].float()

    def _layers(self, index: torch.Tensor) -> dict[int, torch.Tensor]:
        return {layer: states[index].float() for layer, states in self._recorded.layers.items()}


class _FromRecord(Verifier):
    """Commits the recorded tokens: a draft is accepted if it is that token, as under drafter-invariant sampling."""

    couples_noise = True

    def __init__(self, true: Sequences) -> None:
        self._true = true

    def decide(self, positions: Any, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("a replay verifies whole drafts")

    def verify(self, logits: torch.Tensor, draft: Draft, sequences: Sequences, requests: np.ndarray) -> Outcome:
        true, width = self._true, int(draft.lengths.max(initial=0)) + 1
        column = sequences.lengths[requests][:, None] + np.arange(width)[None]
        inside = column < true.lengths[requests][:, None]
        tokens = true.token_ids[requests[:, None], np.where(inside, column, 0)].astype(np.int64)
        drafted = np.arange(width)[None] < draft.lengths[:, None]
        padded = np.pad(draft.token_ids[:, : width - 1], ((0, 0), (0, 1)))
        stands = drafted & inside & (padded == tokens)
        num_accepted = np.cumprod(stands, axis=1).sum(axis=1)
        nothing = np.zeros((len(requests), width), np.float32)
        return Outcome(tokens, num_accepted, nothing, nothing.copy(), nothing.copy())


class NoRunner(PolicyRunner):
    """Takes the place of a policy runner: the loop only moves rows."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.max_context = None

    def new_cache(self, num_rows: int, capacity: int) -> None:
        return None

    def session(self, cache: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(
        self, segments: Segments, keep: np.ndarray, taps: Taps | None = None, tail: StepTail | None = None
    ) -> torch.Tensor:
        raise NotImplementedError("a replay runs no policy")

    def copy_rows(self, source: int, targets: Sequence[int], length: int) -> None:
        """Do nothing: there is no cache."""

    def cells_that_fit(self) -> int:
        return 1 << 62

    @property
    def held_cells(self) -> int:
        return 1 << 62

    def reserve(self, num_rows: int, length: int) -> None:
        """Do nothing: there is no cache."""

    def synchronize(self) -> None:
        """Do nothing: there is no device."""
