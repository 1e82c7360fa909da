"""The interface that runs a policy in process, and the values that pass through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from atlas_rl.policy.step_tail import StepTail

_MARGIN = 32  # tokens
_NO_STATES = torch.zeros(0, 0, dtype=torch.float32, device="cpu")


@dataclass(slots=True)
class Segments:
    """New tokens of some batch rows, packed without padding.

    Cache row `first_row + i`, or `rows[i]`, gets `lengths[i]` tokens at positions `starts[i], starts[i] + 1, ...` of its
    sequence.

    Attributes:
        token_ids: int64 `[num_tokens]`, row by row; a tensor if they are already on the device.
        first_row: First cache row, of consecutive ones.
        starts: int64 `[rows]`, position of each row's first new token; everything before it is cached.
        lengths: int64 `[rows]`, at least 1 each.
        rows: int64 `[rows]`, cache rows instead of consecutive ones from `first_row`; if they have gaps, reading them
            costs a copy.
        settled: int64 `[rows]`, number of tokens of each row that no later forward replaces; recurrent layers advance
            their state to there. None: the tokens cached before, and the first new one. All others are drafts.
    """

    token_ids: np.ndarray | torch.Tensor
    first_row: int
    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray | None = None
    settled: np.ndarray | None = None

    @property
    def settled_tokens(self) -> np.ndarray:
        """int64 `[rows]`: see `settled`."""
        return self.starts + 1 if self.settled is None else self.settled


@dataclass(slots=True)
class Taps:
    """Hidden states to capture during one forward.

    Attributes:
        wants_head_inputs: Whether to catch the input of the LM head.
        wants_layers: Decoder layers whose input to catch; the number of layers stands for the last layer's output.
        head_inputs: Filled by the forward: `[len(keep), hidden]`; `[0, 0]` if not wanted.
        layers: Filled by the forward: per layer `[num_tokens, hidden]`, of all packed tokens.
    """

    wants_head_inputs: bool = False
    wants_layers: tuple[int, ...] = ()
    head_inputs: torch.Tensor = _NO_STATES
    layers: dict[int, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether any hidden states are wanted."""
        return self.wants_head_inputs or bool(self.wants_layers)


class PolicyRunner(ABC):
    """Runs the policy over packed segments of ragged rows, with one attention cache row per request.

    Cells beyond a row's valid length may hold rejected drafts; they are overwritten by the next `forward` of the row
    and are never attended to before that. A row may be cut back to any length from its last settled one
    (`Segments.settled`) on, or to 0.
    """

    vocab_size: int
    max_context: int | None
    """Longest sequence the policy can take (tokens), or None when it has no limit of its own."""

    @abstractmethod
    def new_cache(self, num_rows: int, capacity: int) -> Any:
        """A new attention cache that grows with use, up to `num_rows` rows of `capacity` tokens."""

    @abstractmethod
    def session(self, cache: Any) -> AbstractContextManager[None]:
        """Context in which the policy is ready to generate into `cache`; afterwards it is restored, also after errors.

        Inside: no dropout, no gradient. Afterwards training mode, attention implementation, cache settings and every
        module are as before. Sessions of different models may be nested. Sessions of different threads wait for each
        other; a plain forward in another thread neither waits nor notices (`policy/threads.py`).
        """

    @abstractmethod
    def forward(
        self, segments: Segments, keep: np.ndarray, taps: Taps | None = None, tail: StepTail | None = None
    ) -> torch.Tensor:
        """Append the segments to the cache and return float32 logits `[len(keep), vocab]`, contiguous.

        The logits may be changed in place, and the next forward may overwrite them. States in `taps` are not
        overwritten.

        Args:
            segments: Tokens to run.
            keep: int64 indices into the packed tokens whose logits are wanted.
            taps: Hidden states to catch, filled in place.
            tail: Work on the logits that may join the forward; its `result` says whether it did.
        """

    @property
    def works_beside_host(self) -> bool:
        """Whether the host can work while a forward runs, as on a GPU."""
        return False

    @property
    def once_s(self) -> float:
        """Seconds so far that forwards took for work that is done once: packing weights, comparing routes, capturing.

        The next forward over as many tokens takes that much less, so this is no part of what a forward costs.
        """
        return 0.0

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Token counts that the session's decode forwards are padded to, ascending; empty if they are not padded."""
        return ()

    def unrunnable(self) -> np.ndarray | None:
        """Tokens whose embeddings are not finite, bool `[vocab]`; None if there are none.

        Their keys and values must not get into the cache as drafts: see `decode/stand_ins.py`.
        """
        return None

    @abstractmethod
    def copy_rows(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` cached tokens of row `source` to each of `targets`."""

    @abstractmethod
    def cells_that_fit(self) -> int:
        """Tokens that memory allows in the session's cache now, over all rows, including those it already holds.

        Every row takes as many cells as the longest one needs, plus `state_cells`. Before the first forward this is an
        estimate.
        """

    @property
    def state_cells(self) -> int:
        """Size of a row's recurrent state, as the number of cache tokens that take as much memory."""
        return 0

    @property
    @abstractmethod
    def held_cells(self) -> int:
        """Tokens allocated in every row of the session's cache."""

    @abstractmethod
    def reserve(self, num_rows: int, length: int) -> None:
        """Allocate `length` tokens for each of the first `num_rows` rows.

        Rows keep their content up to that length. Rows from `num_rows` on may be dropped. Forwards also make room, but
        without checking memory. The size of a token is known from the first forward on: a reservation before it
        allocates nothing, and that forward may raise `MemoryError` as well, which leaves the cache empty.

        Raises:
            MemoryError: No memory is left. Rows keep their content, and `held_cells` is their size.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for pending forwards and copies, so that a clock read afterwards is meaningful.

        Work queued on the device after the last of them is not waited for. Does nothing on a CPU.
        """


@dataclass(frozen=True, slots=True)
class PolicyCache:
    """The policy's own attention cache, for speculators that run the policy's modules; valid until the call ends.

    The runner's session is open meanwhile. The last committed token of a request is not cached yet. Cells from there on
    may be written: the policy's next forward writes them before it reads them.

    Attributes:
        runner: Runs the policy over its cache.
        rows_of: Cache rows, int64 `[n]`, of requests in the batch, int64 `[n]`.
    """

    runner: PolicyRunner
    rows_of: Callable[[np.ndarray], np.ndarray]


def roomy(length: int, most: int | None = None) -> int:
    """Tokens to allocate if `length` are needed and texts grow: at least 32 more, or a fifth; `most` at most.

    Arrays that grow like this hold a fifth more than is used, and all copies made on the way add up to at most five
    times the last array. Doubling would copy once and hold twice as much. Holding bytes costs more than copying them: a
    decode step reads the whole cache anyway, and a fifth lasts for very many steps.
    """
    wanted = length + max(_MARGIN, length // 5)
    return max(length, wanted if most is None else min(wanted, most))


def retire(active: np.ndarray, finished: np.ndarray, cached: Callable[[int], int], runner: PolicyRunner) -> np.ndarray:
    """Drop finished rows and move the last rows into the gaps, so that the last requests run as a small batch.

    Args:
        active: int64 `[batch]`, the request in each cache row.
        finished: bool `[batch]`.
        cached: Cached tokens of a request, which move with it.
        runner: Its session is open.

    Returns:
        int64 `[batch - finished]`, the request in each row now.
    """
    if not finished.any():
        return active
    kept = int((~finished).sum())
    remaining = active.copy()
    gaps = np.flatnonzero(finished[:kept])
    movers = np.flatnonzero(~finished[kept:]) + kept
    for gap, mover in zip(gaps, movers, strict=True):
        runner.copy_rows(int(mover), [int(gap)], cached(int(active[mover])))
        remaining[gap] = active[mover]
    return remaining[:kept]
