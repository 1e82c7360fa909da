"""What a step with drafts exposes beside the drafts themselves: plans, admission, and the commit of more tokens.

Asking a drafter takes more of a step than its draft. All host time between an outcome and the next forward is measured
(`Step.exposed_s`), and the drafts' own part of it is charged to the drafters (`Step.draft_s`). The rest is compared with
that of steps without drafts. The difference is the price of drafting at all: the first drafter of a step pays it.
"""

from __future__ import annotations

from collections import deque

from atlas_rl.controller.base import Step

_STEPS = 15  # latest steps of a kind whose median counts


class Exposed:
    """Host seconds of steps with and without drafts, drafts left out, by octave of the batch."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, bool], deque[float]] = {}
        self._medians: dict[tuple[int, bool], float] = {}
        self._extra_s: dict[int, float] = {}  # by octaves of which both kinds were seen

    def observe(self, step: Step) -> float:
        """Learn from a step, and return the seconds by which it exceeded a usual one without drafts.

        0 for a step without drafts, and while no such step of about this batch was seen.
        """
        own_s = max(0.0, step.exposed_s - step.wasted_s - sum(step.draft_s.values()))
        octave, drafts = step.batch.bit_length(), bool(step.drafts)
        plain_s = self._medians.get((octave, False))
        kept = self._seconds.setdefault((octave, drafts), deque(maxlen=_STEPS))
        kept.append(own_s)
        self._medians[octave, drafts] = sorted(kept)[len(kept) // 2]
        if (octave, not drafts) in self._medians:
            self._extra_s[octave] = max(0.0, self._medians[octave, True] - self._medians[octave, False])
        return max(0.0, own_s - plain_s) if drafts and plain_s is not None else 0.0

    def extra_s(self, batch: int) -> float:
        """Seconds that drafting at all adds to a step of `batch` requests: of the nearest octave known, 0 before any."""
        octave = batch.bit_length()
        if octave not in self._extra_s:
            if not self._extra_s:
                return 0.0
            octave = min(self._extra_s, key=lambda known: abs(known - octave))
        return self._extra_s[octave]
