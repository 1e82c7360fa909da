"""Measures a forward's seconds on an asynchronous device by events, without waiting for it.

Waiting for every forward to time it would keep the host from preparing the next step. Instead, two events mark a
forward in the device's queue. They are read after the sampler has waited for its tokens, when both have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from atlas_rl.report.recorder import StepRecorder


@dataclass(slots=True)
class _Marked:
    """A queued forward: its events, and the host seconds already charged to its phase."""

    phase: str
    began: Any
    ended: Any
    charged_s: float


class ForwardTime:
    """Charges the forwards of one device to their phases.

    Args:
        device: Device of the forwards. On a CPU the host's clock suffices.
        make_event: Makes an event that supports timing; for tests.
    """

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        self._queued = device.type != "cpu"
        self._make_event = make_event or (lambda: torch.Event(device=device.type, enable_timing=True))
        self._marked: _Marked | None = None

    @contextmanager
    def running(self, recorder: StepRecorder, phase: str) -> Iterator[None]:
        """Context in which a forward of this phase is started."""
        self._marked = None
        before = recorder.clock()
        began = self._event()
        with recorder.time(phase):
            yield
        if began is not None:
            self._marked = _Marked(phase, began, self._event(), recorder.clock() - before)

    def settle(self, recorder: StepRecorder, phase: str, since_s: float) -> None:
        """Move the forwards' share of a host wait, in `phase` since `since_s`, to the forwards' own phase."""
        marked, self._marked = self._marked, None
        if marked is None:
            return
        missing_s = marked.began.elapsed_time(marked.ended) / 1e3 - marked.charged_s
        recorder.move(phase, marked.phase, min(max(missing_s, 0.0), recorder.clock() - since_s))

    def _event(self) -> Any:
        if not self._queued:
            return None
        event = self._make_event()
        event.record()
        return event
