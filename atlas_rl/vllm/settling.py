"""Commits what a forward settled, for any rows and any plan, in one compiled pass over the forward's rows.

A device is idle between two forwards. An array passed to compiled code costs little; an array that it returns costs a
microsecond, and so does every numpy call. So one pass follows, sorts, commits and finds room for the next drafts.
The rules are those of `row_passes.py` and of the verb commit (`decode/settling.py`), which it calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from atlas_kernels.jit_cache import cached_njit
from atlas_rl.core import Hidden, Verified
from atlas_rl.decode.commit import NOBODY_WANTS
from atlas_rl.decode.settling import Texts, reached, settle
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.vllm.internals import Forward
from atlas_rl.vllm.request_table import RequestTable
from atlas_rl.vllm.row_passes import NO_PLAN, PlannedRows, RowOutcomes, followed, going_on, in_order

_ROWS, _REQUESTS, _PLACES, _STARTS, _COMMITTED, _ACCEPTED, _DRAFTED, _OWN, _OWN_ROWS, _ROOM = range(10)
_COLUMNS = 10
_DONE, _NEWCOMERS, _SKIPPED, _TOO_LONG = range(4)


@dataclass(frozen=True, slots=True)
class Committed:
    """RowOutcomes of a forward for the followed requests: requests with a plan first, in the plan's order.

    Attributes:
        rows: int64 `[n]`, rows of the forward.
        planned: int64 `[n]` or fewer, places in the plan of the requests that had one.
        verified: RowOutcomes for the speculators.
        as_planned: Whether the forward ran the planned batch and nothing else.
        going: int64 `[m]`, requests that continue.
        going_rows: int64 `[m]`, their rows.
        room: int64 `[m]`, draft tokens that each can still use.
    """

    rows: np.ndarray
    planned: np.ndarray
    verified: Verified
    as_planned: bool
    going: np.ndarray
    going_rows: np.ndarray
    room: np.ndarray


@cached_njit(nogil=True)
def _ends(tokens: np.ndarray, num_tokens: np.ndarray, stops: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """Which tokens end their request, by its way of sampling: bool, like `tokens`."""
    ends = np.zeros(tokens.shape, np.bool_)
    for i in range(len(tokens)):
        for j in range(num_tokens[i]):
            for stop in stops[ways[i]]:
                ends[i, j] = ends[i, j] or tokens[i, j] == stop
    return ends


def settle_rows(
    known: np.ndarray,
    lengths: np.ndarray,
    num_prompt_tokens: np.ndarray,
    outcome: RowOutcomes,
    plan: PlannedRows,
    only_planned: bool,
    stops: np.ndarray,
    way_of: np.ndarray,
    texts: Texts,
    most: int,
    waits_for_newcomers: bool,
) -> tuple[tuple[int, int, int, int, int], tuple[float, float, int], np.ndarray, np.ndarray, np.ndarray]:
    """Follow, order and commit the rows of a forward, and return which requests continue.

    Args:
        known: int64 `[rows]`, row of `Sequences`; -1 where drafters do not know the request.
        lengths: int64 `[rows]`, number of committed tokens.
        num_prompt_tokens: int64 `[rows]`.
        outcome: RowOutcomes of the forward.
        plan: The plan for it.
        only_planned: Whether drafts of requests without a plan count as none.
        stops: int64 `[ways, n]`, tokens that end a request of each way of sampling, -1 where there are fewer.
        way_of: int64 `[num_requests]`, way of every request.
        texts: Texts that tokens are appended to.
        most: Most draft tokens of a request.
        waits_for_newcomers: Do nothing if a prompt is complete now and its request is not known yet.

    Returns:
        A status (nothing has changed unless it is `_DONE`); the longest text there would be; the numbers of rows, of
        rows with a plan and of rows that continue; sums as in `settle`; int64 `[_COLUMNS, rows]`, of which the first
        entries count; tokens int64 `[rows, width]`; and bool `[rows]`, whether each has ended.
    """
    # Passed one by one: numba takes some microseconds to unpack a named tuple, and a tenth of one for an array.
    return _settle_rows(
        known,
        lengths,
        num_prompt_tokens,
        *outcome,
        *plan,
        only_planned,
        stops,
        way_of,
        *texts,
        most,
        waits_for_newcomers,
    )


@cached_njit(nogil=True)
def _settle_rows(
    known, lengths, num_prompt_tokens,
    num_new, num_drafted, first_states, token_ids, all_entropies, all_max_probs,
    planned, planned_lengths, only_planned, stops, way_of,
    texts, text_lengths, max_lengths, prompt_lengths, logprobs,
    most, waits_for_newcomers,
):  # fmt: skip
    """`settle_rows` with its arguments passed one by one."""
    columns = np.empty((_COLUMNS, len(known)), np.int64)
    no_sums, no_tokens, nobody = (0.0, 0.0, 0), np.empty((0, 0), np.int64), np.empty(0, np.bool_)
    rows, requests, newcomers, whole = followed(known, num_new, lengths, num_prompt_tokens, text_lengths)
    if not whole or (newcomers > 0 and waits_for_newcomers):
        return (_NEWCOMERS if whole else _SKIPPED, 0, 0, 0, 0), no_sums, columns, no_tokens, nobody
    plan = PlannedRows(planned, planned_lengths)
    outcome = RowOutcomes(num_new, num_drafted, first_states, token_ids, all_entropies, all_max_probs)
    rows, requests, places, found = in_order(rows, requests, plan, len(max_lengths), only_planned, outcome)
    new, drafted, starts, tokens, entropies, max_probs = found
    longest, _ = reached(requests, new, text_lengths, max_lengths, prompt_lengths)
    if longest > texts.shape[1]:
        return (_TOO_LONG, longest, 0, 0, 0), no_sums, columns, no_tokens, nobody
    number = len(rows)
    own_columns, finished = columns[:, :number], np.empty(number, np.bool_)
    ends = _ends(tokens, new, stops, way_of[requests])
    sums = settle(
        requests, tokens, new, drafted, entropies, max_probs, logprobs[:0], ends, planned[:0],
        texts, text_lengths, max_lengths, prompt_lengths, logprobs[:0],
        own_columns[_COMMITTED], own_columns[_ACCEPTED], own_columns[_DRAFTED], finished,
    )  # fmt: skip
    own, own_rows, room = going_on(requests, rows, finished, text_lengths, max_lengths, most)
    own_columns[_ROWS], own_columns[_REQUESTS], own_columns[_STARTS] = rows, requests, starts
    columns[_PLACES, : len(places)] = places
    columns[_OWN, : len(own)], columns[_OWN_ROWS, : len(own)], columns[_ROOM, : len(own)] = own, own_rows, room
    return (_DONE, longest, number, len(places), len(own)), sums, columns, tokens, finished


def commit_rows(
    forward: Forward,
    known: np.ndarray,
    table: RequestTable,
    plan: PlannedRows,
    most: int,
    recorder: StepRecorder,
    *,
    has_plan: bool,
    waits_for_newcomers: bool,
) -> Committed | None:
    """Append what a forward settled to the requests that are known, up to an ending token.

    Args:
        forward: Result of the forward.
        known: int64 `[rows]`, requests of its rows; -1 where drafters do not know them.
        table: Holds the requests.
        plan: The plan for the forward.
        most: Most draft tokens of a request.
        recorder: Gets the entropies.
        has_plan: Whether anything was planned.
        waits_for_newcomers: Commit nothing if a prompt is complete now and its request is not known.

    Returns:
        The committed tokens; None if newcomers must be entered first.
    """
    batch, drawn = forward.batch, forward.drawn
    outcome = RowOutcomes(
        forward.num_new, forward.num_drafted, forward.starts, drawn.token_ids, drawn.entropies, drawn.max_probs
    )
    only_planned = has_plan and forward.uniform > 0  # other drafts only made the step uniform
    for _ in range(2):
        texts, stops, way_of = table.texts()
        (state, longest, count, num_planned, num_going), sums, columns, tokens, finished = settle_rows(
            known, batch.lengths, batch.num_prompt_tokens, outcome, plan, only_planned, stops, way_of, texts, most,
            waits_for_newcomers,
        )  # fmt: skip
        if state != _TOO_LONG:
            break
        table.current.reserve(longest)
    assert state in (_DONE, _NEWCOMERS), "every committed token passes here"
    if state == _NEWCOMERS:
        return None
    recorder.distribution(entropy_sum=sums[0], max_prob_sum=sums[1], num_tokens=sums[2])
    full = columns if count == len(known) else columns[:, :count]
    rows, requests, _, starts, committed, accepted, drafted, _, _, _ = full
    hidden = Hidden(starts, forward.head_inputs, layers_drawn_from(forward))
    verified = Verified(requests, tokens, committed, accepted, drafted, finished, hidden)
    as_planned = count == num_planned == len(plan.requests) == len(known)
    going, going_rows, room = columns[_OWN:, :num_going]
    return Committed(rows, columns[_PLACES, :num_planned], verified, as_planned, going, going_rows, room)


def layers_drawn_from(forward: Forward) -> dict[int, torch.Tensor]:
    """Hidden states of layers at the positions that tokens were drawn from; the forward returns them for every token."""
    if not forward.layers:
        return {}
    counts = forward.num_drafted + 1
    first = forward.spans[:, 0] + forward.spans[:, 1] - counts
    at = torch.from_numpy(np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()))
    return {n: states[at.to(states.device)] for n, states in forward.layers.items()}


def compile_settling() -> None:
    """Compile the pass, or read it from the cache, before the first step."""
    one, figures = np.zeros(1, np.int64), np.zeros((1, 1), np.float32)
    outcome = RowOutcomes(one + 1, one, one, one[None], figures, figures)
    texts = Texts(np.zeros((1, 2), np.int32), one + 1, one + 2, one + 1, NOBODY_WANTS)
    settle_rows(one, one + 2, one + 1, outcome, NO_PLAN, False, one[None], one, texts, 1, True)
