"""Seconds of a forward that a device runs while the host goes on, told by events alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from atlas_rl.report.recorder import StepRecorder
from atlas_rl.vllm.internals.forward_time import ForwardTime


@dataclass
class Machine:
    """A host and a device with a queue. Events are passed when the device gets to them."""

    host_s: float = 0.0
    device_s: float = 0.0  # when the queue is empty
    num_waits: int = 0

    def event(self) -> Event:
        return Event(self)

    def launch(self, seconds: float) -> None:
        self.device_s = max(self.device_s, self.host_s) + seconds

    def download(self) -> None:
        self.num_waits += 1
        self.host_s = max(self.host_s, self.device_s)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.at_s = machine, 0.0

    def record(self) -> None:
        self.at_s = max(self.machine.device_s, self.machine.host_s)

    def elapsed_time(self, later: Event) -> float:
        assert max(self.at_s, later.at_s) <= self.machine.host_s, "an event that has not passed has no time"
        return 1e3 * (later.at_s - self.at_s)


def step(machine: Machine, recorder: StepRecorder, clock: ForwardTime, *, forward_s: float, launches_s: float) -> None:
    with clock.running(recorder, "forward"):
        machine.launch(forward_s)
        machine.host_s += launches_s
    with recorder.time("sample"):
        began_s = recorder.clock()
        machine.launch(0.5)
        machine.download()
        clock.settle(recorder, "sample", began_s)


@pytest.mark.parametrize(
    ("launches_s", "forward_s", "sample_s"),
    [
        (1.0, 4.0, 0.5),  # the device is slower than the host's launches
        (6.0, 6.0, 0.5),  # the host is slower: the forward took as long as its launches
    ],
)
def test_a_forward_gets_its_seconds_and_the_sum_stays(launches_s: float, forward_s: float, sample_s: float) -> None:
    machine = Machine()
    recorder = StepRecorder(clock=lambda: machine.host_s)
    clock = ForwardTime(torch.device("cuda"), machine.event)
    for _ in range(3):
        step(machine, recorder, clock, forward_s=4.0, launches_s=launches_s)
    assert recorder.seconds("forward") == pytest.approx(3 * forward_s)
    assert recorder.seconds("sample") == pytest.approx(3 * sample_s)
    assert recorder.seconds("forward") + recorder.seconds("sample") == pytest.approx(machine.host_s)
    assert machine.num_waits == 3, "nobody waits but for what was drawn"


def test_work_that_was_queued_before_is_not_the_forwards() -> None:
    machine = Machine()
    recorder = StepRecorder(clock=lambda: machine.host_s)
    machine.launch(10.0)
    step(machine, recorder, ForwardTime(torch.device("cuda"), machine.event), forward_s=4.0, launches_s=1.0)
    assert recorder.seconds("forward") == pytest.approx(4.0)
    assert recorder.seconds("sample") == pytest.approx(10.5)


def test_a_forward_that_nothing_was_drawn_from_is_forgotten() -> None:
    machine = Machine()
    recorder = StepRecorder(clock=lambda: machine.host_s)
    clock = ForwardTime(torch.device("cuda"), machine.event)
    with clock.running(recorder, "prefill"):
        machine.launch(4.0)
    step(machine, recorder, clock, forward_s=2.0, launches_s=1.0)
    assert recorder.seconds("prefill") == 0
    clock.settle(recorder, "sample", 0.0)
    assert recorder.seconds("forward") == pytest.approx(2.0)


def test_on_a_cpu_the_host_knows() -> None:
    machine = Machine()
    recorder = StepRecorder(clock=lambda: machine.host_s)

    def no_event() -> Event:
        raise AssertionError("a CPU has no queue")

    clock = ForwardTime(torch.device("cpu"), no_event)
    step(machine, recorder, clock, forward_s=4.0, launches_s=4.0)
    assert recorder.seconds("forward") == 4.0
    assert recorder.seconds("sample") == 0.5
