"""The time per round that the device waits for an engine's host.

    t_host [s] = round_s + request_s * batch        in a round that drafts, 0 in a plain step

A round that drafts goes back and forth between host and device several times: drafts are laid out, verified, and read
back before the next round can begin. A plain step's host work is not counted: engines overlap it with the device's
work, and the start of kernels is part of the roofline (`Efficiency.kernel_s`, which was taken from engines).

Both terms are fitted to one publication, EAGLE-3 (arXiv 2503.01840), and tested on all others. That rule was fixed
before the fit: the two terms can be told apart only by speedups over batch sizes, and EAGLE-3 is the only publication
that has them, for two engines. `benchmarks/planner.py` fits them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Seconds that the device waits for an engine's host in each round that drafts.

    Attributes:
        round_s: Per round, for any number of requests.
        request_s: Per round and request.

    Raises:
        ValueError: A value is negative or not a number.
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


_CALIBRATED = {
    "sglang": Host(round_s=3.6e-3, request_s=0.085e-3),
    "vllm": Host(round_s=2.8e-3, request_s=0.175e-3),
}
TYPICAL = Host(
    round_s=fmean(host.round_s for host in _CALIBRATED.values()),
    request_s=fmean(host.request_s for host in _CALIBRATED.values()),
)
"""The mean of those that are calibrated."""

ENGINES: Mapping[str, Host] = {
    "typical": TYPICAL,
    **_CALIBRATED,
    "tensorrt-llm": TYPICAL,  # no row calibrates it
    "together": TYPICAL,  # no row calibrates it either
    "none": NO_HOST,
}


def host_of(engine: str, *, round_ms: float | None = None, request_ms: float | None = None) -> Host:
    """The host of `engine`. Measured milliseconds per round or per request replace its own values.

    Raises:
        ValueError: The engine is unknown, or milliseconds are negative or not a number.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine '{engine}': known are {', '.join(ENGINES)}")
    own = ENGINES[engine]
    return Host(
        round_s=own.round_s if round_ms is None else round_ms / 1e3,
        request_s=own.request_s if request_ms is None else request_ms / 1e3,
    )
