"""What an engine's host adds to a round: the time that the device waits for it.

    exposed host time of a round that drafts = round_s + request_s * batch

A plain step has no such term here. The start of kernels is in the roofline (`Efficiency.kernel_s`, taken from engines), engines
run the rest of a plain step's host work beside the device, and plain decoding on one GPU is predicted within 9% without it. A
round that drafts goes between host and device several times: drafts are built, verified, and what was accepted is read before
the next round can be laid out.

Both terms are fitted to one publication, EAGLE-3, and judged on all others. The rule was fixed before the fit: only a speedup
over batch sizes tells the two terms apart, and EAGLE-3 is the only publication that has one, for two engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Seconds that the device waits for an engine's host in each round that drafts.

    Attributes:
        round_s: However many requests there are.
        request_s: For each request.

    Raises:
        ValueError: Either is negative or no number.
    """

    round_s: float = 0.0
    request_s: float = 0.0

    def __post_init__(self) -> None:
        for option, value in (("--round-overhead-ms", self.round_s), ("--request-overhead-ms", self.request_s)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{option} must be a number of at least 0, got {1e3 * value:g}")

    def exposed_s(self, batch: int) -> float:
        """Seconds of one round of `batch` requests."""
        return self.round_s + self.request_s * batch


NO_HOST = Host()


ENGINES: Mapping[str, Host] = {
    "sglang": NO_HOST,
    "vllm": NO_HOST,
    # Engines of which nothing calibrates: the mean of those above.
    "tensorrt-llm": NO_HOST,
    "together": NO_HOST,
}
