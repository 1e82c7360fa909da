"""The default speculators of an engine."""

from __future__ import annotations

from collections.abc import Iterable

from atlas_rl.decode.compile_kernels import compile_kernels
from atlas_rl.decode.guard import Faults, GuardedSpeculator
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.learning_budget import divide_budget
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator


def default_speculators() -> list[Speculator]:
    """The history index and the recurrent head."""
    return [HistorySpeculator(), RecurrentSpeculator()]


def bind_all(
    speculators: Iterable[Speculator], policy: PolicyView, faults: Faults, *, couples_noise: bool
) -> dict[str, GuardedSpeculator]:
    """Bind speculators to a policy; returns them by name, in order.

    Args:
        speculators: Speculators that are not bound yet.
        policy: Policy that they draft for.
        faults: Receives their errors from then on.
        couples_noise: See `Speculator.bind`.

    Raises:
        ValueError: One of them cannot draft for this policy.
    """
    compile_kernels()
    speculators = list(speculators)
    divide_budget(speculators)
    bound = {speculator.name: GuardedSpeculator(speculator, faults) for speculator in speculators}
    for speculator in bound.values():
        speculator.bind(policy, couples_noise)
    return bound
