"""What recurrent layers keep of each request, and how a rejected draft leaves no trace in it.

A layer with a running state (a gated delta rule, Mamba-2) has no cells that could be overwritten: what went into its state
cannot be taken out. So the state of a row stands at its last *settled* token, one that no later forward goes back behind. Of
the tokens after it the layer's inputs are recorded: they are small, where a copy of the state per token would be large. The
next forward first advances the state by as many of them as were accepted, and then runs what is new:

    state at settled --(recorded, accepted)--> --(new, settled)--> state from now on --(drafts)--> dropped

This is two passes of the recurrence, up to what is settled and over the drafts, each over a rectangle of tokens. Tokens that
a row does not have are *not live*: they are zeros, and the recurrence leaves the state exactly as it is. The first new token
of a verification is committed already, so that a forward without drafts has the first pass alone.

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
    """What a recurrent layer does with its inputs."""

    @property
    def lead(self) -> int:
        """Tokens before a token that its convolution looks at."""

    @property
    def has_state(self) -> bool:
        """Whether there is more than a convolution."""

    def convolved(self, window: torch.Tensor) -> torch.Tensor:
        """`[rows, lead + tokens, inputs]` to `[rows, tokens, mixed]`."""

    def scan(
        self, mixed: torch.Tensor, live: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs `[rows, tokens, outputs]` and the state after the last token.

        Args:
            mixed: `[rows, tokens, mixed]`, zeros where a row has no token.
            live: bool `[rows, tokens]`; where it is False the state stays exactly as it is.
            state: At the first token; None for that of an empty text.
        """


@dataclass(slots=True)
class _Steps:
    """The tokens of one forward: of each row those that are recorded and accepted, then the new ones.

    Attributes:
        rows: Of the cache, a slice where they are consecutive, else int64 `[batch]`.
        token_rows, token_steps: int64 `[num_tokens]`, where each new token is in the rectangle `[batch, steps]`.
        token_places: int64 `[num_tokens]`, where its output is behind `settled` settled steps and the drafts.
        fresh: bool `[batch]`, rows that begin with this forward; `all_fresh`: every one of them.
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
    all_fresh: bool
    first_draft: torch.Tensor
    live_settled: torch.Tensor
    live_drafts: torch.Tensor
    live_recorded: torch.Tensor
    steps: int


class RecurrentRows:
    """The recurrent layers' part of a cache.

    Args:
        num_rows: Most rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._at = np.zeros(num_rows, np.int64)  # tokens that a row's state has seen
        self._recorded = np.zeros(num_rows, np.int64)  # tokens recorded behind those
        self._records: dict[int, torch.Tensor] = {}  # per layer `[held_rows, lead + recorded, inputs]`
        self._leads: dict[int, int] = {}
        self._states: dict[int, torch.Tensor] = {}  # per layer `[held_rows, ...]`
        self._steps: _Steps | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for store in (self._records, self._states) for tensor in store.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all layers; 0 before the first forward."""
        return sum(tensor[:1].nbytes for store in (self._records, self._states) for tensor in store.values())

    def clear(self) -> None:
        """Let go of everything: no row has a token."""
        self._at[:], self._recorded[:] = 0, 0
        self._records, self._states = {}, {}

    def resize(self, held_rows: int) -> None:
        """Hold so many rows; what the first of them have stays."""
        for store in (self._records, self._states):
            for layer, old in store.items():
                if len(old) != held_rows:
                    store[layer] = self._resized(old, held_rows, *old.shape[1:])

    def place(self, segments: Segments, device: torch.device) -> None:
        """Get ready for the next forward.

        Raises:
            RuntimeError: A row is to go on from before its state, or from behind what it has.
        """
        starts, lengths = segments.starts, segments.lengths
        rows = segments.rows
        if rows is None:
            rows = np.arange(segments.first_row, segments.first_row + len(lengths))
        fresh = starts == 0
        at = np.where(fresh, 0, self._at[rows])
        recorded = starts - at
        self._refuse_gaps(rows, recorded, fresh)
        settled = segments.settled_tokens - at
        if (settled < 0).any():
            raise RuntimeError(
                "a row of the recurrent layers' cache is to be rolled back behind its last settled token"
            )
        totals = recorded + lengths
        drafts = totals - settled
        self._widen(int(drafts.max()))
        self._steps = _steps(rows, fresh, recorded, settled, lengths, device)
        self._at[rows], self._recorded[rows] = at + settled, drafts

    def run(self, layer: int, new: torch.Tensor, held_rows: int, recurrence: Recurrence) -> torch.Tensor:
        """Run a layer's recurrence over the placed tokens: `[num_tokens, inputs]` to `[num_tokens, outputs]`."""
        steps = self._steps
        assert steps is not None, "run() before place()"
        if layer not in self._records:
            self._leads[layer] = recurrence.lead
            drafts = steps.live_drafts.shape[1]
            self._records[layer] = allocated(new, held_rows, recurrence.lead + drafts, new.shape[1]).zero_()
        window = self._window(layer, new)
        self._record(layer, window)
        mixed = recurrence.convolved(window)
        if not recurrence.has_state:
            return mixed[steps.token_rows, steps.token_steps]
        # Autocast would round the state at every step, where the policy's own forward rounds it once a chunk.
        with torch.autocast(new.device.type, enabled=False):
            return self._scanned(layer, mixed, held_rows, recurrence)

    def _scanned(self, layer: int, mixed: torch.Tensor, held_rows: int, recurrence: Recurrence) -> torch.Tensor:
        """Both passes over `[batch, steps, mixed]`, and outputs of the new tokens."""
        steps, outputs, state = self._placed, [], self._state(layer)
        if count := steps.live_settled.shape[1]:
            live = steps.live_settled
            output, state = recurrence.scan(_only(mixed[:, :count], live), live, state)
            outputs.append(output)
            self._keep(layer, state, held_rows)
        if count := steps.live_drafts.shape[1]:
            live = steps.live_drafts
            output, _ = recurrence.scan(_only(_from(mixed, steps.first_draft, count), live), live, state)
            outputs.append(output)
        return torch.cat(outputs, 1)[steps.token_rows, steps.token_places]

    def copy_rows(self, source: int, targets: np.ndarray, length: int) -> None:
        """Give rows `targets` (int64 `[n]`) what row `source` has of its first `length` tokens.

        Raises:
            RuntimeError: It has more or fewer, and cannot go back that far.
        """
        at = self._at[source] if length else 0
        self._refuse_gaps(np.array([source]), np.array([length - at]), np.array([length == 0]))
        self._at[targets], self._recorded[targets] = at, length - at
        for store in (self._records, self._states):
            for tensor in store.values():
                for target in targets.tolist():
                    tensor[target].copy_(tensor[source])

    def _refuse_gaps(self, rows: np.ndarray, wanted: np.ndarray, fresh: np.ndarray) -> None:
        """Raise `RuntimeError` where rows are wanted with so many recorded tokens and have no such."""
        wrong = ~fresh & ((wanted < 0) | (wanted > self._recorded[rows]))
        if wrong.any():
            row = int(rows[wrong][0])
            raise RuntimeError(
                f"row {row} of the recurrent layers' cache can be continued behind {self._at[row]} to "
                f"{self._at[row] + self._recorded[row]} tokens, not behind {self._at[row] + int(wanted[wrong][0])}"
            )

    def _window(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Inputs of what is recorded and of the new tokens, `[batch, lead + steps, inputs]`; zeros where there are none."""
        steps, records, lead = self._placed, self._records[layer], self._leads[layer]
        window = records.new_zeros(len(steps.fresh), lead + steps.steps, new.shape[1])
        if not steps.all_fresh:
            live = torch.cat([~steps.fresh[:, None].expand(-1, lead), steps.live_recorded], 1)
            window[:, : live.shape[1]] = _only(records[steps.rows, : live.shape[1]], live)
        window[steps.token_rows, steps.token_steps + lead] = new.to(window.dtype)
        return window

    def _record(self, layer: int, window: torch.Tensor) -> None:
        """Keep the inputs from `lead` tokens before the state on."""
        steps = self._placed
        width = self._leads[layer] + steps.live_drafts.shape[1]
        self._records[layer][steps.rows, :width] = _from(window, steps.first_draft, width)

    def _state(self, layer: int) -> torch.Tensor | None:
        steps = self._placed
        if steps.all_fresh or layer not in self._states:
            return None
        state = self._states[layer][steps.rows]
        return torch.where(steps.fresh.view(-1, *[1] * (state.ndim - 1)), 0, state)

    def _keep(self, layer: int, state: torch.Tensor, held_rows: int) -> None:
        if layer not in self._states:
            self._states[layer] = allocated(state, held_rows, *state.shape[1:]).zero_()
        self._states[layer][self._placed.rows] = state

    def _widen(self, drafts: int) -> None:
        """Let records have room for so many tokens behind the state."""
        for layer, old in self._records.items():
            if (width := self._leads[layer] + drafts) > old.shape[1]:
                self._records[layer] = self._resized(old, len(old), width, old.shape[2])

    def _resized(self, old: torch.Tensor, *shape: int) -> torch.Tensor:
        new = allocated(old, *shape).zero_()
        kept = tuple(slice(min(was, now)) for was, now in zip(old.shape, shape, strict=True))
        new[kept] = old[kept]
        return new

    @property
    def _placed(self) -> _Steps:
        assert self._steps is not None, "run() before place()"
        return self._steps


def _steps(
    rows: np.ndarray,
    fresh: np.ndarray,
    recorded: np.ndarray,
    settled: np.ndarray,
    lengths: np.ndarray,
    device: torch.device,
) -> _Steps:
    """See `_Steps`; arrays are int64 `[batch]`, `fresh` is bool, and counts are from where a row's state stands."""
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
        all_fresh=bool(fresh.all()),
        first_draft=first_draft,
        live_settled=live[0],
        live_drafts=live[1],
        live_recorded=live[2],
        steps=int((recorded + lengths).max()),
    )


def _only(values: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """`[batch, tokens, n]` with zeros where `live`, bool `[batch, tokens]`, is False: what is there may be no number."""
    return torch.where(live[:, :, None], values, 0)


def _from(values: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens of each row of `[batch, tokens, n]` from `first`, int64 `[batch]`, on; past the end the last again."""
    index = (first[:, None] + torch.arange(count, device=first.device)).clamp_(max=values.shape[1] - 1)
    return values[torch.arange(len(values), device=first.device)[:, None], index]
