"""Passes verified tokens to speculators no earlier than a draft needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from atlas_rl.core import Verified
from atlas_rl.speculators.base import Speculator


class Observing:
    """Passes verified tokens to speculators: before they draft next, else while the next forward runs.

    A step in which no speculator is asked does not need the observation, and would keep the device waiting for it.

    Args:
        speculators: Speculators by name.
        observe: Passes an outcome to one speculator.
        is_hidden: Whether the device runs a forward while outcomes are passed to speculators that are not asked.

    Attributes:
        is_hidden: As in the arguments.
        waiting: By speculator, the outcome that it has not observed yet.
    """

    def __init__(
        self,
        speculators: Mapping[str, Speculator],
        observe: Callable[[Speculator, Verified], None],
        is_hidden: bool = False,
    ) -> None:
        self._speculators, self._observe, self.is_hidden = speculators, observe, is_hidden
        self.waiting: dict[str, Verified] = {}

    def put_off(self, verified: Verified) -> None:
        """Keep the outcome of a forward for later; the outcome of the previous one has been passed on."""
        self.waiting = dict.fromkeys(self._speculators, verified)

    def hand_over(self, name: str) -> None:
        """Pass the outcome to one speculator, which is asked next."""
        verified = self.waiting.pop(name, None)
        if verified is not None:
            self._observe(self._speculators[name], verified)

    def hand_over_all(self) -> None:
        """Pass the outcome to all: the device runs the next forward, or requests are about to change."""
        for name in tuple(self.waiting):
            self.hand_over(name)

    def drop(self) -> None:
        """Drop the outcome; it is unreliable."""
        self.waiting = {}
