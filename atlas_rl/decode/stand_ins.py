"""Keeps draft tokens that the policy cannot run from changing anything but speed.

A policy does not sample them, but a drafter may propose them. Their keys and values are NaN, and a masked cell of the
attention cache still enters as 0 * NaN, at every position of its row. There are two kinds:

- Tokens whose embeddings are not finite, such as unused rows of padded tables, are known before the forward. Another
  token is run in their place (`stand_in`).
- Tokens that overflow inside the policy are known when the forward's logits are not finite. The requests that drafted
  are then run again, their drafts one by one up to the first such token (`run_one_by_one`).

The draft itself is verified like any other, by the logits before it. The logits after it are not known. They become
NaN, so that a call that reaches them fails as it does without drafts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from atlas_rl.core import Draft, Hidden, Sequences
from atlas_rl.policy.base import PolicyRunner, Segments, Taps


def stand_in(tokens: np.ndarray, lengths: np.ndarray, unrunnable: np.ndarray) -> np.ndarray:
    """Replace drafts that cannot be run by the last committed token of their request, in place.

    Args:
        tokens: int64 `[sum(lengths)]`, request by request the last committed token and its drafts.
        lengths: int64 `[batch]`.
        unrunnable: bool `[vocab]`, see `PolicyRunner.unrunnable`.

    Returns:
        int64 `[n]`, the places in `tokens` whose logits are not known.
    """
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    replaced = unrunnable[tokens] & (np.arange(len(tokens)) > first)
    so_far = np.cumsum(replaced)
    tokens[replaced] = tokens[first[replaced]]
    return np.flatnonzero(so_far > so_far[first])


def run_one_by_one(
    runner: PolicyRunner,
    sequences: Sequences,
    requests: np.ndarray,
    draft: Draft,
    logits: torch.Tensor,
    hidden: Hidden,
    new_taps: Callable[[], Taps],
    *,
    everyone: bool = False,
) -> tuple[torch.Tensor, Hidden] | None:
    """Repeat a forward for the requests whose drafts may have made it overflow, and overwrite what it left in their rows.

    Costs a forward over each of their texts, and one per draft token. Their own text is run again, too: its last token
    has seen the drafts, and a recurrent layer's state cannot go back before it.

    Args:
        runner: Its session is open.
        sequences: All requests, as before the forward.
        requests: int64 `[batch]`, by cache row.
        draft: Drafts of the batch.
        logits: float32 `[sum(draft.lengths + 1), vocab]`, of that forward.
        hidden: States at the same positions.
        new_taps: Makes the taps of another forward.
        everyone: Whether to repeat it for the other requests as well, because their logits have been changed.

    Returns:
        Both anew; None if no request with drafts has logits that are not finite.
    """
    lost = ~logits.amax(dim=-1).isfinite().cpu().numpy()
    first = np.cumsum(draft.lengths + 1) - (draft.lengths + 1)
    rows = np.flatnonzero(np.logical_or.reduceat(lost, first) & (draft.lengths > 0))
    if not len(rows):
        return None
    if everyone:
        rows = np.arange(len(requests))
    layers = {layer: states.clone() for layer, states in hidden.layers.items()}
    logits, hidden = logits.clone(), Hidden(hidden.starts, hidden.head_inputs.clone(), layers)
    for row in rows.tolist():
        text = sequences.token_ids[requests[row], : sequences.lengths[requests[row]]].astype(np.int64)
        drafts = draft.token_ids[row, : draft.lengths[row]]
        logits[first[row] : first[row] + len(drafts) + 1] = float("nan")
        _run_row(runner, row, text, drafts, int(first[row]), logits, hidden, new_taps)
    return logits, hidden


def _run_row(
    runner: PolicyRunner,
    row: int,
    text: np.ndarray,
    drafts: np.ndarray,
    first: int,
    logits: torch.Tensor,
    hidden: Hidden,
    new_taps: Callable[[], Taps],
) -> None:
    """Run a text and then its drafts, up to the first whose logits are not finite; fills the places from `first` on."""
    settled = np.array([len(text)])

    def run(tokens: np.ndarray, start: int) -> tuple[torch.Tensor, Taps]:
        taps, last = new_taps(), np.array([len(tokens) - 1])
        segments = Segments(tokens, row, np.array([start]), np.array([len(tokens)]), settled=settled)
        return runner.forward(segments, last, taps), taps

    for place in range(len(drafts) + 1):
        tokens, start = (drafts[place - 1 : place], len(text) + place - 1) if place else (text, 0)
        own, taps = run(tokens, start)
        logits[first + place] = own[0]
        if taps.wants_head_inputs:
            hidden.head_inputs[first + place] = taps.head_inputs[-1]
        for layer, states in taps.layers.items():
            hidden.layers[layer][first + place] = states[-1]
        if not own.amax().isfinite():
            if place:  # its cell and those behind it get finite keys and values
                run(np.full(len(drafts) - place + 1, text[-1]), start)
            return
