"""Runs several generation calls in turns on one thread, a decode step each, so that all see the same machine state.

A shared host changes its speed within minutes, by more than the differences to measure. Calls that run one after the
other are then compared with the host and not with each other. Here every call is a coroutine (greenlet) that lets the
others run before each of its steps, and its clock stands still meanwhile. Whatever slows the machine slows all calls,
in proportion.

    turns = Turns()
    engine = AtlasRolloutEngine(model=shell(policy), controller=InTurns(GoodputController(names), turns), clock=turns.clock)
    outcomes = turns.run({"ours": lambda: engine.generate(...), "other": ...}, expected_s)

Calls must not share modules that a call changes: `shell` gives each its own, around the same weights.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from greenlet import greenlet
from torch import nn

from atlas_rl.controller.base import Admission, Controller, Step, step_record
from atlas_rl.core import Verified


@dataclass(slots=True)
class Outcome:
    """Result of a call, and the seconds of its own turns."""

    value: Any
    seconds: float


class Turns:
    """Runs calls in turns; see the module's docstring.

    Args:
        machine_clock: Returns seconds since some fixed moment.
    """

    def __init__(self, machine_clock: Callable[[], float] = time.perf_counter) -> None:
        self._now_s = machine_clock
        self._hub: greenlet | None = None
        self._own_s: dict[str, float] = {}
        self._running: str | None = None
        self._since = 0.0

    def clock(self) -> float:
        """Seconds of the running call's own turns; the machine's clock if no call is running."""
        now = self._now_s()
        return now if self._running is None else self._own_s[self._running] + now - self._since

    def pass_on(self) -> None:
        """Let the others run; returns at the caller's next turn. Does nothing outside of `run`."""
        if self._running is not None:
            assert self._hub is not None
            self._hub.switch()

    def run(self, calls: Mapping[str, Callable[[], Any]], expected_s: Mapping[str, float]) -> dict[str, Outcome]:
        """Run all calls to completion.

        Args:
            calls: Calls by name.
            expected_s: Expected duration of each call, in any unit. The call that has had the smallest share of it is
                next, so that all end at about the same time and none runs alone.

        Returns:
            Outcomes by name. An error in a call is raised here, and the other calls are abandoned.
        """
        self._hub, self._own_s = greenlet.getcurrent(), dict.fromkeys(calls, 0.0)
        turns = {name: greenlet(call) for name, call in calls.items()}
        outcomes: dict[str, Outcome] = {}
        # The gradient mode belongs to the thread, not to a greenlet: all calls must leave it as it is here.
        with torch.no_grad():
            while turns:
                name = min(turns, key=lambda n: self._own_s[n] / expected_s[n])
                self._running, self._since = name, self._now_s()
                try:
                    value = turns[name].switch()
                finally:
                    self._own_s[name] += self._now_s() - self._since
                    self._running = None
                if turns[name].dead:
                    outcomes[name] = Outcome(value, self._own_s[name])
                    del turns[name]
        return outcomes


class InTurns(Controller):
    """Wraps a controller so that its engine lets others run before every decode step.

    Attributes:
        trace: For every step, the fields that `Costs.of` reads, and the controller's own record if it keeps one.
    """

    def __init__(self, controller: Controller, turns: Turns) -> None:
        self.speculators = controller.speculators
        self.trace: list[dict[str, Any]] = []
        self._controller, self._turns = controller, turns

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        if not step.asked:
            self._turns.pass_on()
        return self._controller.plan(step)

    def admit(self, step: Step) -> Admission:
        return self._controller.admit(step)

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        record = self._controller.observe(step, admission, verified, forward_s, step_s)
        own = step_record(step, admission, verified, forward_s, self.speculators)
        self.trace.append(own | {"step_s": step_s} | (record or {}))
        return None

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        self._controller.policy_updated(expected)

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        return self._controller.plain_forward_s(batch, context_tokens)

    def forwards_are_padded(self, sizes: Sequence[int]) -> None:
        self._controller.forwards_are_padded(sizes)

    def take_calibration(self) -> dict[str, tuple[int, float]]:
        return self._controller.take_calibration()


def shell(model: nn.Module) -> Any:
    """A new module tree and config of `model` around the same parameters and buffers."""
    kept = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, kept)  # type: ignore[arg-type]
