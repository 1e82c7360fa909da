"""Tracks the policy version and its rollouts, and refreshes the drafters when it changes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from atlas_rl.checks import shown
from atlas_rl.controller.base import Controller
from atlas_rl.core import Rollouts, Sequences
from atlas_rl.speculators.base import Speculator

MAX_VERSION = 2**31 - 1
_MAX_DIGITS = 10


class RolloutExchange(ABC):
    """Exchanges finished rollouts between ranks and sums what drafters learned."""

    @abstractmethod
    def put(self, sequences: Sequences) -> None:
        """Add a finished call of this rank."""

    @abstractmethod
    def take(self) -> tuple[list[Sequences], float]:
        """New calls of other ranks since the last `take`, and the seconds of their transfer."""

    @abstractmethod
    def refreshed(self, speculators: Mapping[str, Speculator]) -> None:
        """This rank has refreshed these speculators, which may have learned."""


class PolicyTracker:
    """Keeps the policy's version, and refreshes drafters when it changes.

    Order at an update: the version advances, then every speculator is refreshed with the newest rollouts, then the
    controller is told. Rollouts are handed over once; an aborted call is never handed over.

    Attributes:
        version: Policy version.
        exchange: Brings other ranks' rollouts; None if there are no other ranks.
    """

    def __init__(self) -> None:
        self.version = 0
        self.exchange: RolloutExchange | None = None
        self._newest: Rollouts | None = None
        self._refresh_s = self._measuring_s = 0.0

    def checked(self, version: str | int | None) -> int | None:
        """Convert an external version to a number, or None.

        Raises:
            ValueError: Not a whole number, too large to be kept with every rollout, or below the present version; or None,
                which adds one, at the largest.
        """
        if version is None:
            if self.version >= MAX_VERSION:
                raise ValueError(f"the policy version is {self.version}, and none above {MAX_VERSION} can be kept")
            return None
        text = str(version)
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else -1
        if isinstance(version, bool) or not 0 <= number <= MAX_VERSION:
            raise ValueError(f"a policy version is a whole number up to {MAX_VERSION}, got {shown(version)}")
        if number < self.version:
            raise ValueError(f"policy versions do not fall: this one is {self.version}, got {number}")
        return number

    def at_step(self, step: int, *, used: bool) -> int:
        """Version of a trainer's policy at one of its steps: the step, or a later one if that is taken.

        Another run or another trainer counts its steps anew. A version with rollouts belongs to the weights that drew
        them.

        Args:
            step: The trainer's step.
            used: Whether there are rollouts of the present version.
        """
        return max(step, self.version + int(used))

    def finished(self, rollouts: Rollouts) -> None:
        """A generation call ended; its rollouts are the newest."""
        self._newest = rollouts
        if self.exchange is not None:
            self.exchange.put(rollouts.sequences)

    def measured(self, seconds: float) -> None:
        """Exclude the seconds of a measuring rerun from the time that learning gets a share of."""
        self._measuring_s += seconds

    def advance(
        self, speculators: Mapping[str, Speculator], controller: Controller | None, version: int | None = None
    ) -> None:
        """The policy's weights changed. `version` None adds one."""
        self.version = self.version + 1 if version is None else version
        if self.exchange is not None and not speculators:
            # Another rank of its group drafts for this one: nobody here would ever take them.
            self._refresh_s += self.exchange.take()[1]
        if self._newest is None:
            return
        began = time.perf_counter()
        if self.exchange is not None:
            elsewhere, seconds = self.exchange.take()
            self._newest = replace(self._newest, elsewhere=tuple(elsewhere))
            self._refresh_s += seconds
        self._newest = replace(self._newest, measuring_s=self._measuring_s)
        measured = {name: speculator.refresh(self._newest, self.version) for name, speculator in speculators.items()}
        if self.exchange is not None:
            self.exchange.refreshed(speculators)
        if controller is not None:
            controller.policy_updated({name: survival for name, survival in measured.items() if survival is not None})
        self._newest, self._measuring_s = None, 0.0
        self._refresh_s += time.perf_counter() - began

    def take_refresh_s(self) -> float:
        """Seconds of refreshes since the last call."""
        seconds, self._refresh_s = self._refresh_s, 0.0
        return seconds
