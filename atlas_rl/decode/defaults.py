"""The speculators that an engine has when nobody names any."""

from __future__ import annotations

from collections.abc import Iterable

from atlas_rl.decode.compile_kernels import compile_kernels
from atlas_rl.decode.guard import Faults, GuardedSpeculator
from atlas_rl.policy.view import PolicyView
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator


def default_speculators() -> list[Speculator]:
    """Both organs of the adaptive speculator: the history index and the recurrent head. The static one is added if given."""
    return [HistorySpeculator(), RecurrentSpeculator()]


def bind_all(
    speculators: Iterable[Speculator], policy: PolicyView, faults: Faults, *, couples_noise: bool
) -> dict[str, GuardedSpeculator]:
    """Get speculators ready to draft for a policy; by name, in their order.

    Args:
        speculators: Not bound yet.
        policy: What they draft for.
        faults: Gets what goes wrong in them from then on.
        couples_noise: See `Speculator.bind`.

    Raises:
        ValueError: One of them cannot draft for this policy.
    """
    compile_kernels()
    bound = {speculator.name: GuardedSpeculator(speculator, faults) for speculator in speculators}
    for speculator in bound.values():
        speculator.bind(policy, couples_noise)
    return bound
