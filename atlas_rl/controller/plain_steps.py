"""Steps without drafts: when the next one is due, and how far they are off what was expected of them.

The speed of a shared machine, or of one that grows warm, changes in two ways: reading weights and arithmetic slow down by
different factors. A plain step waits for weights, one that verifies many drafts for arithmetic. So steps with drafts cannot
tell what plain ones have come to take, and these are measured themselves, the more often the less they agree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from atlas_rl.controller.base import Step

_KNOWN = 3  # forwards of about a size after which its cost is known: their median ignores one outlier
_APART = 4  # steps between plain steps while the size is not known yet
_SELDOM = 100  # steps after which plain decoding is measured anew while it is as expected
_OFTEN = 25  # the same while it is not
_AS_EXPECTED = 0.05  # bound on the relative distance of a step from what was expected
_SHARES = 16  # latest plain steps that give the forward's share of such a step
_LATEST = 3  # latest plain steps whose median is how far they are off


class PlainSteps:
    """Follows the steps without drafts of a run."""

    def __init__(self) -> None:
        self._every = _SELDOM
        self._since = _SELDOM  # the first step of a run is plain
        self._shares: deque[float] = deque(maxlen=_SHARES)
        self._latest: deque[tuple[int, int, float]] = deque(maxlen=_LATEST)  # requests, cached tokens, seconds

    def passed(self, *, drafted: bool) -> None:
        """A step was decided on, with drafts to verify or without."""
        self._since = self._since + 1 if drafted else 0

    def are_due(self, num_samples: int) -> bool:
        """Whether to measure a step without drafts, given the number of forwards of about its size so far.

        Drafting is compared with plain decoding, so plain decoding must have been measured at this batch size. If its
        cost were only inferred, say from one interrupted step, drafting could look free, and while every step has
        drafts, nothing would correct that. The report's estimate of a run without speculation needs it as well.
        """
        return self._since >= (self._every if num_samples >= _KNOWN else _APART * (num_samples > 0))

    def observe(self, step: Step, forward_s: float, step_s: float, expected_s: float | None, num_samples: int) -> None:
        """Learn from a step without drafts.

        Args:
            step: The step.
            forward_s: Seconds of its forward.
            step_s: Seconds of the step.
            expected_s: What was predicted for the step; None without evidence.
            num_samples: Forwards of about its size before it.
        """
        self._shares.append(forward_s / step_s)
        if expected_s is None or num_samples < _KNOWN:
            return
        self._latest.append((step.batch, step.context_tokens, step_s))
        as_expected = abs(step_s / expected_s - 1) <= _AS_EXPECTED
        self._every = min(2 * self._every, _SELDOM) if as_expected else max(self._every // 2, _OFTEN)

    def forward_s(self, predicted_s: float, predict: Callable[[int, int], float | None]) -> float | None:
        """Seconds of the forward of a plain step.

        Args:
            predicted_s: What is predicted for the step.
            predict: Returns what is predicted now, given requests and their cached tokens. What is known of the latest plain
                steps may have come into it since.

        Returns:
            None before any plain step was seen.
        """
        if not self._shares:
            return None
        off = [step_s / now_s for *size, step_s in self._latest if (now_s := predict(*size))]
        return predicted_s * (median(off) if off else 1.0) * sum(self._shares) / len(self._shares)
