"""Groups forwards of equal cost: those padded to one size, and unpadded ones of about one size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


class StepSizes:
    """Buckets of sizes, in tokens. Up to the last padded size, a bucket holds all sizes padded to the same one.

    Beyond it, and without padding, buckets are exact below 16, then eighths of an octave.

    Args:
        padded: Sizes that forwards are padded to, rising; empty if forwards are not padded.

    Attributes:
        padded: See above.
        edges: The same, int64 `[n]`.
        last: The last of them; -1 if there is none.
    """

    def __init__(self, padded: Sequence[int] = ()) -> None:
        self.padded = tuple(padded)
        self.last = self.padded[-1] if self.padded else -1
        self.edges = np.array(self.padded, np.int64)

    def bucket(self, num_tokens: int) -> int:
        """Smallest size in the bucket of `num_tokens`."""
        if num_tokens <= self.last:
            place = bisect_left(self.padded, num_tokens)
            return self.padded[place - 1] + 1 if place else 0
        width = _width(num_tokens)
        return max(num_tokens // width * width, self.last + 1)

    def end(self, bucket: int) -> int:
        """One beyond the largest size in a bucket, which is given by its smallest."""
        if bucket <= self.last:
            return self.padded[bisect_left(self.padded, bucket)] + 1
        width = _width(bucket)
        return bucket // width * width + width

    def run(self, max_tokens: int) -> np.ndarray:
        """Tokens that forwards over 0, 1, ... `max_tokens` tokens run: int64 `[max_tokens + 1]`."""
        sizes = np.arange(max_tokens + 1)
        padded = min(self.last, max_tokens) + 1
        sizes[:padded] = self.edges[np.searchsorted(self.edges, sizes[:padded])]
        return sizes


def _width(num_tokens: int) -> int:
    """Number of sizes in an unpadded bucket."""
    return 1 if num_tokens < 16 else 1 << (num_tokens.bit_length() - 4)
