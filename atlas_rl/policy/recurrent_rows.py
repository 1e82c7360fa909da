"""Keeps the recurrent layers' state of each request, such that a rejected draft leaves no trace in it.

A layer with a running state (a gated delta rule, Mamba-2) has no cells that could be overwritten: a token cannot be
removed from its state. So a row's state is kept at its last *settled* token, which no later forward goes back before.
For the tokens after it, the layer's inputs are recorded: they are small, while a copy of the state per token would be
large. The next forward first advances the state over the recorded tokens that were accepted, and then runs the new
ones:

    state at settled --(recorded, accepted)--> --(new, settled)--> state from now on --(drafts)--> dropped

These are two passes of the recurrence, up to the settled token and over the drafts, each over a rectangle of tokens.
Tokens that a row does not have are *not live*: they are zeros, and the recurrence leaves the state exactly as it is.
The first new token of a verification is already committed, so a forward without drafts has only the first pass.

A convolution over the last tokens needs no state beside the record: the record begins as many tokens before the state as the
convolution looks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from atlas_rl.policy.base import Segments
from atlas_rl.policy.memory import allocated
from atlas_rl.policy.upload import upload


class Recurrence(Protocol):
    """A recurrent layer's computation."""

    @property
    def lead(self) -> int:
        """Number of preceding tokens that its convolution reads."""

    @property
    def has_state(self) -> bool:
        """Whether it has a state beyond the convolution."""

    def convolved(self, window: torch.Tensor) -> torch.Tensor:
        """`[rows, lead + tokens, inputs]` to `[rows, tokens, mixed]`."""

    def scan(
        self, mixed: torch.Tensor, live: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs `[rows, tokens, outputs]` and the state after the last token.

        Args:
            mixed: `[rows, tokens, mixed]`, zeros where a row has no token.
            live: bool `[rows, tokens]`; where it is False the state stays exactly as it is.
            state: Before the first token; None for that of an empty text.
        """


@dataclass(slots=True)
class _Steps:
    """The tokens of one forward: for each row, first its recorded and accepted ones, then the new ones.

    Attributes:
        rows: Cache rows: a slice if they are consecutive, else int64 `[batch]`.
        token_rows, token_steps: int64 `[num_tokens]`, place of each new token in the rectangle `[batch, steps]`.
        token_places: int64 `[num_tokens]`, column of its output, with the drafts' outputs after the settled steps'.
        fresh: bool `[batch]`, rows that begin with this forward.
        any_fresh, all_fresh: Whether some rows are fresh, and whether all are.
        first_draft: int64 `[batch]`, settled steps of each row.
        live_settled: bool `[batch, settled]`.
        live_drafts: bool `[batch, drafts]`.
        live_recorded: bool `[batch, recorded]`.
        steps: Most steps of a row.
    """

    rows: slice | torch.Tensor
    token_rows: torch.Tensor
    token_steps: torch.Tensor
    token_places: torch.Tensor
    fresh: torch.Tensor
    any_fresh: bool
    all_fresh: bool
    first_draft: torch.Tensor
    live_settled: torch.Tensor
    live_drafts: torch.Tensor
    live_recorded: torch.Tensor
    steps: int


@dataclass(slots=True)
class _Kept:
    """State of one layer. After a failed forward, every layer's state is consistent: some have advanced, others not.

    Attributes:
        lead: Number of preceding tokens that its convolution reads.
        at: int64 `[num_rows]`, tokens that a row's state has seen.
        recorded: int64 `[num_rows]`, tokens recorded after those.
        records: Inputs of recorded tokens, `[held_rows, lead + most recorded, inputs]`.
        state: `[held_rows, ...]`; None if the layer has none, or before its first run.
    """

    lead: int
    at: np.ndarray
    recorded: np.ndarray
    records: torch.Tensor
    state: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.records] if self.state is None else [self.records, self.state]


class RecurrentRows:
    """The recurrent layers' part of a cache.

    Args:
        num_rows: Most rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._layers: dict[int, _Kept] = {}
        self._placed: tuple[Segments, torch.device] | None = None
        self._steps: tuple[np.ndarray, _Steps] | None = None  # positions of states, and the steps from there

    def __contains__(self, layer: int) -> bool:
        """Whether a layer has run."""
        return layer in self._layers

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for kept in self._layers.values() for tensor in kept.tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all layers; 0 before the first forward."""
        return sum(tensor[:1].nbytes for kept in self._layers.values() for tensor in kept.tensors)

    @property
    def held_rows(self) -> list[int]:
        """Rows of every tensor; they differ if `resize` ended early. Empty before the first forward."""
        return [len(tensor) for kept in self._layers.values() for tensor in kept.tensors]

    def clear(self) -> None:
        """Free everything: no row has a token."""
        self._layers = {}

    def resize(self, held_rows: int) -> None:
        """Allocate `held_rows` rows; the first ones keep their content.

        Raises:
            MemoryError: No memory is left. Some tensors may have been resized.
        """
        for kept in self._layers.values():
            if len(kept.records) != held_rows:
                kept.records = _resized(kept.records, held_rows, *kept.records.shape[1:])
            if kept.state is not None and len(kept.state) != held_rows:
                kept.state = _resized(kept.state, held_rows, *kept.state.shape[1:])

    def place(self, segments: Segments, device: torch.device) -> None:
        """Prepare the next forward."""
        self._placed, self._steps = (segments, device), None

    def run(self, layer: int, new: torch.Tensor, held_rows: int, recurrence: Recurrence) -> torch.Tensor:
        """Run a layer's recurrence over the placed tokens: `[num_tokens, inputs]` to `[num_tokens, outputs]`.

        Raises:
            RuntimeError: A row would continue from before its state, or from after its recorded tokens.
            MemoryError: No memory is left; nothing has changed.
        """
        kept = self._layers.get(layer) or self._begun(new, held_rows, recurrence)
        rows, at, settled, recorded = self._counts(kept)
        steps = self._steps_from(rows, at)
        window = _window(kept, steps, new)
        mixed = recurrence.convolved(window)
        if recurrence.has_state:
            # Autocast would round the state at every step, where the policy's own forward rounds it once a chunk.
            with torch.autocast(new.device.type, enabled=False):
                outputs, state = _scanned(mixed, steps, _state(kept, steps), recurrence)
            if kept.state is None and state is not None:
                kept.state = allocated(state, held_rows, *state.shape[1:]).zero_()
        else:
            outputs, state = mixed[steps.token_rows, steps.token_steps], None
        width = kept.lead + steps.live_drafts.shape[1]
        if width > kept.records.shape[1]:
            kept.records = _resized(kept.records, len(kept.records), width, kept.records.shape[2])
        # From here on nothing fails.
        kept.records[steps.rows, :width] = _from(window, steps.first_draft, width)
        if kept.state is not None and state is not None:
            kept.state[steps.rows] = state
        kept.at[rows], kept.recorded[rows] = settled, recorded
        self._layers[layer] = kept
        return outputs

    def copy_rows(self, source: int, targets: np.ndarray, length: int) -> None:
        """Copy the first `length` tokens of row `source` to rows `targets` (int64 `[n]`).

        Raises:
            RuntimeError: The row has fewer tokens, or cannot be cut back to `length`.
        """
        for kept in self._layers.values():
            at = int(kept.at[source]) if length else 0
            _refuse_gaps(kept, np.array([source]), np.array([length - at]))
            kept.at[targets], kept.recorded[targets] = at, length - at
        tensors = [tensor for kept in self._layers.values() for tensor in kept.tensors]
        if tensors and len(targets):
            to = [tensor[target] for tensor in tensors for target in targets.tolist()]
            torch._foreach_copy_(to, [tensor[source] for tensor in tensors for _ in targets])

    def _begun(self, new: torch.Tensor, held_rows: int, recurrence: Recurrence) -> _Kept:
        lead, nothing = recurrence.lead, np.zeros(self._num_rows, np.int64)
        return _Kept(lead, nothing, nothing.copy(), allocated(new, held_rows, lead, new.shape[1]).zero_())

    def _counts(self, kept: _Kept) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64 `[batch]` each: rows; present and future place of their states; tokens to be recorded after that."""
        assert self._placed is not None, "run() before place()"
        segments, _ = self._placed
        rows = segments.rows
        if rows is None:
            rows = np.arange(segments.first_row, segments.first_row + len(segments.lengths))
        at = np.where(segments.starts == 0, 0, kept.at[rows])
        _refuse_gaps(kept, rows, segments.starts - at)
        settled = segments.settled_tokens
        if (settled < at).any():
            raise RuntimeError("a row of the recurrent layers' cache is to be settled where its state has gone past")
        return rows, at, settled, segments.starts + segments.lengths - settled

    def _steps_from(self, rows: np.ndarray, at: np.ndarray) -> _Steps:
        """The tokens to run from there; computed once, because all layers usually stand at the same token."""
        if self._steps is None or not np.array_equal(self._steps[0], at):
            assert self._placed is not None, "run() before place()"
            segments, device = self._placed
            settled = segments.settled_tokens - at
            made = _steps(rows, segments.starts == 0, segments.starts - at, settled, segments.lengths, device)
            self._steps = at, made
        return self._steps[1]


def _refuse_gaps(kept: _Kept, rows: np.ndarray, wanted: np.ndarray) -> None:
    """Raise `RuntimeError` if rows lack some of the recorded tokens that are wanted."""
    wrong = (wanted < 0) | (wanted > kept.recorded[rows])
    if wrong.any():
        row, first = int(rows[wrong][0]), int(kept.at[rows[wrong][0]])
        raise RuntimeError(
            f"row {row} of the recurrent layers' cache can be continued behind {first} to "
            f"{first + int(kept.recorded[row])} tokens, not behind {first + int(wanted[wrong][0])}"
        )


def _window(kept: _Kept, steps: _Steps, new: torch.Tensor) -> torch.Tensor:
    """Inputs of recorded and new tokens, `[batch, lead + steps, inputs]`; zeros before the beginning."""
    window = kept.records.new_zeros(len(steps.fresh), kept.lead + steps.steps, new.shape[1])
    if not steps.all_fresh:
        live = torch.cat([~steps.fresh[:, None].expand(-1, kept.lead), steps.live_recorded], 1)
        window[:, : live.shape[1]] = _only(kept.records[steps.rows, : live.shape[1]], live)
    window[steps.token_rows, steps.token_steps + kept.lead] = new.to(window.dtype)
    return window


def _state(kept: _Kept, steps: _Steps) -> torch.Tensor | None:
    """The state that the rows continue from; None for the state of empty texts."""
    if steps.all_fresh or kept.state is None:
        return None
    state = kept.state[steps.rows]
    if not steps.any_fresh:
        return state
    return torch.where(steps.fresh.view(-1, *[1] * (state.ndim - 1)), 0, state)


def _scanned(
    mixed: torch.Tensor, steps: _Steps, state: torch.Tensor | None, recurrence: Recurrence
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both passes over `[batch, steps, mixed]`: outputs of the new tokens, and the settled state."""
    outputs = []
    if count := steps.live_settled.shape[1]:
        live = steps.live_settled
        output, state = recurrence.scan(_only(mixed[:, :count], live), live, state)
        outputs.append(output)
    if count := steps.live_drafts.shape[1]:
        live = steps.live_drafts
        output, _ = recurrence.scan(_only(_from(mixed, steps.first_draft, count), live), live, state)
        outputs.append(output)
    return torch.cat(outputs, 1)[steps.token_rows, steps.token_places], state


def _resized(old: torch.Tensor, *shape: int) -> torch.Tensor:
    """A copy of another size: truncated or padded with zeros."""
    new = allocated(old, *shape).zero_()
    kept = tuple(slice(min(was, now)) for was, now in zip(old.shape, shape, strict=True))
    new[kept] = old[kept]
    return new


def _steps(
    rows: np.ndarray,
    fresh: np.ndarray,
    recorded: np.ndarray,
    settled: np.ndarray,
    lengths: np.ndarray,
    device: torch.device,
) -> _Steps:
    """See `_Steps`; arrays are int64 `[batch]`, `fresh` is bool; counts start at a row's state."""
    drafts, row = recorded + lengths - settled, np.repeat(np.arange(len(rows)), lengths)
    step = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + recorded[row]
    behind = step - settled[row]
    place = np.where(behind < 0, step, settled.max() + behind)
    counts = (settled, drafts, recorded)
    lives = [np.arange(count.max())[None] < count[:, None] for count in counts]
    consecutive = bool((np.diff(rows) == 1).all())
    there = upload([row, step, place, fresh, settled, *lives, *([] if consecutive else [rows])], device)
    token_rows, token_steps, token_places, fresh_there, first_draft, *live = there[:8]
    return _Steps(
        rows=slice(int(rows[0]), int(rows[0]) + len(rows)) if consecutive else there[8],
        token_rows=token_rows,
        token_steps=token_steps,
        token_places=token_places,
        fresh=fresh_there,
        any_fresh=bool(fresh.any()),
        all_fresh=bool(fresh.all()),
        first_draft=first_draft,
        live_settled=live[0],
        live_drafts=live[1],
        live_recorded=live[2],
        steps=int((recorded + lengths).max()),
    )


def _only(values: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """`[batch, tokens, n]` with zeros where `live`, bool `[batch, tokens]`, is False: values there may be NaN."""
    return torch.where(live[:, :, None], values, 0)


def _from(values: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens of each row of `[batch, tokens, n]` from `first`, int64 `[batch]`; repeats the last at the end."""
    index = (first[:, None] + torch.arange(count, device=first.device)).clamp_(max=values.shape[1] - 1)
    return values[torch.arange(len(values), device=first.device)[:, None], index]
