"""What a step with drafts exposes beside the drafts themselves: plans, admission, and the commit of more tokens.

Asking a drafter takes more of a step than its draft. All host time between an outcome and the next forward is measured
(`Step.exposed_s`), and the drafts' own part of it is charged to the drafters (`Step.draft_s`). The rest is compared with
that of steps without drafts. The difference is the price of drafting at all: the first drafter of a step pays it.
"""

from __future__ import annotations

from collections import deque

from atlas_rl.controller.base import Step
from atlas_rl.controller.cost import OCTAVES

_STEPS = 15  # latest steps of a kind whose median counts
_KNOWN = 3  # steps of a kind from which on its median ignores one interrupted step


class Exposed:
    """Host seconds of steps with and without drafts, drafts left out, by octave of the batch (its bit length).

    Attributes:
        extra_s: By octave, the seconds that drafting at all adds to a step: of the nearest octave in which both kinds of
            step are known, 0 before any. Written while learning, read by plans.
    """

    def __init__(self) -> None:
        self.extra_s = [0.0] * OCTAVES
        self._seconds: dict[tuple[int, bool], deque[float]] = {}
        self._medians: dict[tuple[int, bool], float] = {}

    def observe(self, step: Step) -> float:
        """Learn from a step, and return the seconds by which it exceeded a usual one without drafts.

        Where no such step of about this batch was seen, what plans expect (`extra_s`), for else it would be paid twice:
        there, and as part of the forward. 0 for a step without drafts.
        """
        own_s = max(0.0, step.exposed_s - step.wasted_s - sum(step.draft_s.values()))
        octave, drafts = step.batch.bit_length(), bool(step.drafts)
        plain_s = self._medians.get((octave, False))
        kept = self._seconds.setdefault((octave, drafts), deque(maxlen=_STEPS))
        kept.append(own_s)
        median = sorted(kept)[(len(kept) - 1) // 2]
        if median != self._medians.get((octave, drafts)) or len(kept) == _KNOWN:
            self._medians[octave, drafts] = median
            self._tabulate()
        if not drafts:
            return 0.0
        return min(own_s, self.extra_s[octave]) if plain_s is None else max(0.0, own_s - plain_s)

    def _tabulate(self) -> None:
        """Write down `extra_s`."""
        medians, often = self._medians, {kind for kind, kept in self._seconds.items() if len(kept) >= _KNOWN}
        known = [octave for octave, drafts in often if drafts and (octave, False) in often]
        own_s = {octave: max(0.0, medians[octave, True] - medians[octave, False]) for octave in known}
        for octave in range(OCTAVES) if known else ():
            self.extra_s[octave] = own_s[min(known, key=lambda near: abs(near - octave))]
