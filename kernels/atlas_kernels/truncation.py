"""Parameters of top-k, top-p and min-p, for `truncate`, its reference and its kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHARE_BITS = 31
"""Probabilities are compared as multiples of `2**-31`."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens of a distribution are kept.

    Attributes:
        top_k: Most tokens, plus those that are equal to the last one; 0 keeps all.
        top_p: Least share of the probability, in (0, 1]; 1 keeps all tokens.
        min_p: Least probability, as a share in [0, 1] of the largest; 0 keeps all.

    Raises:
        ValueError: A number is out of range.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps every token), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1] (0 keeps every token), got {self.min_p}")

    @property
    def dropped_share(self) -> int:
        """`1 - top_p`, as a multiple of `2**-31` that is below 1."""
        return min(round((1 - self.top_p) * 2**SHARE_BITS), 2**SHARE_BITS - 1)

    @property
    def least_share(self) -> int:
        """`min_p` as a multiple of `2**-31`, rounded up."""
        return min(math.ceil(self.min_p * 2**SHARE_BITS), 2**SHARE_BITS - 1)
