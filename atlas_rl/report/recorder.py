"""Counts and times one generation step, and makes its `StepReport`.

The decode loop spends a few microseconds per iteration: arrays are stored and counted in bulk later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from atlas_rl.report.report import PHASES, Mode, StepReport
from atlas_rl.report.sums import thin_curve

_FLUSH_ROWS = 1 << 16
_CURVE_POINTS = 1 << 12  # points of the active batch that are kept if nobody asks for a report for a long time


class StepRecorder:
    """Records one generation step. Make a new one for each step.

    Seconds are exclusive: while a timer runs inside another, only the inner phase is charged, so that the phases add up.
    The generation runs inside `with recorder.generating():`; its seconds that no phase claims are `other`. Phases timed
    outside of it, such as a sync before it, count towards `generate_s` too.

        recorder = StepRecorder(speculators=("history",))
        with recorder.generating():
            with recorder.time("forward"):
                logits = ...
            recorder.forward(num_committed=..., num_drafted=..., num_accepted=...)
        report = recorder.finish(step=3, policy_version=3, mode="train", ...)

    Args:
        speculators: Names of the speculators that may draft, in the order that `drafters` of `forward` refers to; empty
            if speculation is off.
        clock: Returns seconds since some fixed moment.
    """

    def __init__(self, *, speculators: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self._speculators = tuple(speculators)
        self._clock = clock
        self._seconds = dict.fromkeys((*PHASES, "other"), 0.0)
        self._timers = {phase: _Timer(self, phase) for phase in self._seconds}
        self._running: list[str] = []
        self._since = 0.0
        self._num_forwards = 0
        self._active: list[int] = []  # active requests at every `_active_every`-th forward
        self._active_every = 1
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._pending_rows = 0
        self._num_request_forwards = 0
        self._num_decoded_tokens = 0
        self._drafted = np.zeros(max(1, len(self._speculators)), np.int64)
        self._accepted = np.zeros_like(self._drafted)
        self._drafted_lengths = np.zeros(1, np.int64)
        self._accepted_lengths = np.zeros(1, np.int64)
        self._entropy_sum = 0.0
        self._max_prob_sum = 0.0
        self._num_scored_tokens = 0
        self._warnings: dict[str, None] = {}
        self._faults: dict[str, int] = {}
        self._packing_s, self._packed_bytes = 0.0, 0
        self._capture_s, self._graph_bytes = 0.0, 0
        self._idle_learning_s = 0.0

    def generating(self) -> _Timer:
        """Context of the whole generation; seconds that no phase claims are charged to `other`."""
        return self._timers["other"]

    def time(self, phase: str) -> _Timer:
        """Context that charges its seconds to `phase`, one of `PHASES`; contexts nest."""
        return self._timers[phase]

    def switch(self, phase: str) -> float:
        """Charge the running context's seconds to `phase` from now on, until it ends; returns the clock.

        Phases that follow each other take one reading of the clock each, where a context takes two.
        """
        now, running = self._clock(), self._running
        self._seconds[running[-1]] += now - self._since
        running[-1], self._since = phase, now
        return now

    @property
    def running(self) -> str:
        """Phase that is being charged now; empty outside of all timers."""
        return self._running[-1] if self._running else ""

    @property
    def speculates(self) -> bool:
        """Whether any speculator may draft."""
        return bool(self._speculators)

    @property
    def num_forwards(self) -> int:
        """Decoding forwards so far."""
        return self._num_forwards

    def draft_counts(self) -> dict[str, tuple[int, int]]:
        """Verified and accepted draft tokens so far, per speculator."""
        self._count_pending()
        counts = zip(self._drafted.tolist(), self._accepted.tolist(), strict=True)
        return dict(zip(self._speculators, counts, strict=False))

    def clock(self) -> float:
        """Seconds since some fixed moment."""
        return self._clock()

    def seconds(self, phase: str) -> float:
        """Seconds charged to `phase` so far, without those of a running timer."""
        return self._seconds[phase]

    def move(self, source: str, target: str, seconds: float) -> None:
        """Move seconds between phases: the host waits for device work in a later phase than the one that launched it."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def forward(
        self,
        *,
        num_committed: np.ndarray,
        num_drafted: np.ndarray | None = None,
        num_accepted: np.ndarray | None = None,
        drafters: np.ndarray | None = None,
    ) -> None:
        """Record one decoding forward of the target over the active batch. Do not write to the arrays afterwards.

        Args:
            num_committed: int `[batch]`, tokens appended per request.
            num_drafted: int `[batch]`, draft tokens verified per request; None for a forward without drafts.
            num_accepted: int `[batch]`, draft tokens accepted per request; required with `num_drafted`.
            drafters: int `[batch]`, index of the speculator that drafted; None means the first. Ignored for requests
                without drafts.

        Raises:
            ValueError: Drafts come without `num_accepted`, or the recorder has no speculators.
        """
        batch = len(num_committed)
        self._note_active(batch)
        self._num_forwards += 1
        self._num_request_forwards += batch
        self._num_decoded_tokens += int(num_committed.sum())
        if num_drafted is None:
            return
        if num_accepted is None or not self._speculators:
            raise ValueError("drafts need num_accepted and a recorder that knows its speculators")
        self._pending.append((num_drafted, num_accepted, drafters))
        self._pending_rows += batch
        if self._pending_rows >= _FLUSH_ROWS:
            self._count_pending()

    def distribution(self, *, entropy_sum: float, max_prob_sum: float, num_tokens: int) -> None:
        """Record sums over `num_tokens` drawn tokens: entropy of the processed distribution (nats), top probability."""
        self._entropy_sum += entropy_sum
        self._max_prob_sum += max_prob_sum
        self._num_scored_tokens += num_tokens

    def packed(self, seconds: float, num_bytes: int) -> None:
        """Record weight copies: seconds of packing (also counted in the running phase), and most bytes at once."""
        self._packing_s += seconds
        self._packed_bytes = max(self._packed_bytes, num_bytes)

    def captured(self, seconds: float, num_bytes: int) -> None:
        """Record CUDA graphs of a call: seconds of capturing (also counted in the running phase), and bytes."""
        self._capture_s += seconds
        self._graph_bytes = max(self._graph_bytes, num_bytes)

    def studied(self, seconds: float) -> None:
        """Record seconds that drafters learned while nobody waited; no phase counts them."""
        self._idle_learning_s += seconds

    def warn(self, message: str) -> None:
        """Add a warning to the report; equal messages are added once."""
        self._warnings[message] = None

    def faults(self, counts: Mapping[str, int], messages: Iterable[str]) -> None:
        """Record caught errors: their number by drafter, and the warnings about them."""
        for name, count in counts.items():
            self._faults[name] = self._faults.get(name, 0) + count
        for message in messages:
            self.warn(message)

    def finish(
        self,
        *,
        step: int,
        policy_version: int,
        mode: Mode,
        num_prompt_tokens: int,
        completion_lengths: Sequence[int] | np.ndarray,
        no_speculation_s: float | None = None,
        baseline_tokens_per_s: float | None = None,
        step_s: float | None = None,
    ) -> StepReport:
        """The finished report; arguments as in `StepReport`, `completion_lengths` one per request.

        Raises:
            RuntimeError: A timer is still running.
            ValueError: More draft tokens were accepted than drafted.
        """
        if self._running:
            raise RuntimeError(f"finish() inside the timers {self._running}")
        self._count_pending()
        lengths = tuple(int(n) for n in completion_lengths)
        scored = self._num_scored_tokens
        drafted_by_position = _reached(self._drafted_lengths)
        accepted_by_position = _reached(self._accepted_lengths)
        missing = len(drafted_by_position) - len(accepted_by_position)
        names = self._speculators
        phases: dict[str, Any] = {f"{phase}_s": seconds for phase, seconds in self._seconds.items()}
        return StepReport(
            step=step,
            policy_version=policy_version,
            mode=mode,
            num_requests=len(lengths),
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=sum(lengths),
            num_forwards=self._num_forwards,
            num_request_forwards=self._num_request_forwards,
            num_decoded_tokens=self._num_decoded_tokens,
            drafted={name: int(n) for name, n in zip(names, self._drafted, strict=False)},
            accepted={name: int(n) for name, n in zip(names, self._accepted, strict=False)},
            drafted_by_position=drafted_by_position,
            accepted_by_position=accepted_by_position + (0,) * missing,
            generate_s=sum(self._seconds.values()),
            **phases,
            packing_s=self._packing_s,
            packed_bytes=self._packed_bytes,
            capture_s=self._capture_s,
            graph_bytes=self._graph_bytes,
            idle_learning_s=self._idle_learning_s,
            entropy=self._entropy_sum / scored if scored else None,
            mean_max_prob=self._max_prob_sum / scored if scored else None,
            num_scored_tokens=scored,
            no_speculation_s=no_speculation_s,
            baseline_tokens_per_s=baseline_tokens_per_s,
            step_s=step_s,
            active_batch_curve=thin_curve([(self._active_every * i, n) for i, n in enumerate(self._active)]),
            completion_lengths=lengths,
            drafter_faults=dict(self._faults),
            warnings=tuple(self._warnings),
        )

    def _note_active(self, batch: int) -> None:
        if self._num_forwards % self._active_every:
            return
        self._active.append(batch)
        if len(self._active) == _CURVE_POINTS:
            self._active, self._active_every = self._active[::2], 2 * self._active_every

    def _count_pending(self) -> None:
        if not self._pending:
            return
        drafted = np.concatenate([row[0] for row in self._pending])
        accepted = np.concatenate([row[1] for row in self._pending])
        drafters = np.concatenate(
            [np.zeros(len(row[0]), np.int64) if row[2] is None else row[2] for row in self._pending]
        )
        self._pending.clear()
        self._pending_rows = 0
        if (accepted > drafted).any():
            raise ValueError("more draft tokens accepted than drafted")
        used = drafted > 0
        drafted, accepted, drafters = drafted[used], accepted[used], drafters[used]
        num_drafters = len(self._drafted)
        self._drafted += np.bincount(drafters, weights=drafted, minlength=num_drafters).astype(np.int64)
        self._accepted += np.bincount(drafters, weights=accepted, minlength=num_drafters).astype(np.int64)
        self._drafted_lengths = _added(self._drafted_lengths, np.bincount(drafted))
        self._accepted_lengths = _added(self._accepted_lengths, np.bincount(accepted))


class _Timer:
    """Reusable context manager of one phase; holds no state of its own, so it may nest in itself."""

    __slots__ = ("_phase", "_recorder")

    def __init__(self, recorder: StepRecorder, phase: str) -> None:
        self._recorder = recorder
        self._phase = phase

    def __enter__(self) -> None:
        recorder = self._recorder
        now = recorder._clock()
        if recorder._running:
            recorder._seconds[recorder._running[-1]] += now - recorder._since
        recorder._running.append(self._phase)
        recorder._since = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recorder = self._recorder
        now = recorder._clock()
        recorder._seconds[recorder._running.pop()] += now - recorder._since
        recorder._since = now


def _reached(length_counts: np.ndarray) -> tuple[int, ...]:
    """Number of rows that reach position 0, 1, ..., from counts of rows by length `[max_len + 1]`."""
    return tuple(int(n) for n in np.cumsum(length_counts[::-1])[::-1][1:])


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two count vectors of different lengths."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total
