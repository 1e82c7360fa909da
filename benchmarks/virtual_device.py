"""A simulated device in virtual time.

Time is the processor time of the loop's thread, minus the simulation's own time (`outside`), plus the
waits for the device. Submitting a forward returns at once. Reading its results advances the clock to the moment at
which the device would have finished. So host code is real and counted, a wait takes no time to simulate, and other
processes on the machine disturb little. Work that torch gives to other threads would not be counted, so give it one
thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

CALL_S = 8e-6
"""Host seconds of one call into the driver (a copy, a launch, a replay of a graph): assumed, not measured."""


class Device:
    """Runs submitted work in order, in virtual time.

    Attributes:
        busy_s: Seconds of submitted work: the total time if the host took none.
        gaps_s: Per forward of the policy, the seconds that the device waited for the host since the previous forward.
        waited_s: Seconds that the host waited, by phase of the recorder.
        ready_s: Virtual time at which all submitted work has ended.
        shift_s: Virtual time minus the processor time of the thread.
        num_outside: Number of open contexts of `outside`.
        began_s: Processor time at which the first of them was entered.
    """

    def __init__(self) -> None:
        self.shift_s, self.ready_s = 0.0, 0.0
        self.num_outside, self.began_s = 0, 0.0
        self._gap_s = 0.0
        self.busy_s = 0.0
        self.gaps_s: list[float] = []
        self.waited_s: dict[str, float] = defaultdict(float)
        self.phase: Callable[[], str] = lambda: ""

    def clock(self) -> float:
        """Seconds of virtual time."""
        return time.thread_time() + self.shift_s

    def submit(self, seconds: float, *, calls: int = 1) -> None:
        """Submit work of `seconds`; submitting costs the host `calls` driver calls."""
        self.shift_s += calls * CALL_S
        now = self.clock()
        self._gap_s += max(0.0, now - self.ready_s)
        self.ready_s = max(now, self.ready_s) + seconds
        self.busy_s += seconds

    def forward(self, seconds: float) -> None:
        """Submit a forward of the policy: an upload and a graph."""
        self.submit(seconds, calls=2)
        self.gaps_s.append(self._gap_s)
        self._gap_s = 0.0

    def wait(self, ready_s: float | None = None) -> None:
        """Read results on the host, after waiting for them: for all submitted work, or for what ends at `ready_s`."""
        waiting = (self.ready_s if ready_s is None else ready_s) - self.clock()
        if waiting > 0:
            self.shift_s += waiting
            self.waited_s[self.phase()] += waiting

    def outside(self) -> _Outside:
        """Context for the simulation's own work, which takes no virtual time."""
        return _Outside(self)


class _Outside:
    """See `Device.outside`; contexts nest."""

    __slots__ = ("_device",)

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None:
        device = self._device
        if not device.num_outside:
            device.began_s = time.thread_time()
        device.num_outside += 1

    def __exit__(self, *error: object) -> None:
        device = self._device
        device.num_outside -= 1
        if not device.num_outside:
            device.shift_s -= time.thread_time() - device.began_s
