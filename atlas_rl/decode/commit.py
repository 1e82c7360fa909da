"""The verb commit: what a forward settled becomes part of the sequences, and is counted. One copy for every engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atlas_rl.controller.base import Controller, Step
from atlas_rl.core import Hidden, Sequences, Verified
from atlas_rl.decode.plain_run import PlainCosts
from atlas_rl.report.recorder import StepRecorder


@dataclass(frozen=True, slots=True)
class Settled:
    """Tokens that one forward settled, before they are committed.

    Attributes:
        requests: int64 `[batch]`.
        token_ids: int64 `[batch, width]`: accepted drafts, then the recovered or bonus token.
        num_tokens: int64 `[batch]`, how many of them a row has, at least 1.
        num_drafted: int64 `[batch]`, draft tokens that the forward verified.
        entropies: float32 `[batch, at least max(num_tokens)]`, nats, of the distribution each token was drawn from.
        max_probs: float32, same shape, probability of its likeliest token.
        hidden: States that the tokens were drawn from.
    """

    requests: np.ndarray
    token_ids: np.ndarray
    num_tokens: np.ndarray
    num_drafted: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray
    hidden: Hidden


def commit(
    settled: Settled,
    sequences: Sequences,
    max_lengths: np.ndarray,
    recorder: StepRecorder,
    ends: np.ndarray | None = None,
) -> Verified:
    """Append tokens to their sequences, up to an ending token, and say which requests end.

    Args:
        settled: The tokens.
        sequences: Appended to.
        max_lengths: int64 `[num_requests]`, prompt plus completion tokens at which a request ends.
        recorder: Gets the entropies.
        ends: bool like `settled.token_ids`, tokens that end their request; None asks the sampling parameters of the call.
    """
    requests, tokens = settled.requests, settled.token_ids
    if ends is None:
        ends = sequences.sampling.ends(tokens)
    ends = ends & (np.arange(ends.shape[1])[None] < settled.num_tokens[:, None])
    stopped = ends.any(axis=1)
    num_committed = np.where(stopped, ends.argmax(axis=1) + 1, settled.num_tokens)
    num_committed = np.minimum(num_committed, max_lengths[requests] - sequences.lengths[requests])
    sequences.reserve(int((sequences.lengths[requests] + num_committed).max(initial=0)))
    row, place = np.nonzero(np.arange(tokens.shape[1])[None] < num_committed[:, None])
    sequences.token_ids[requests[row], sequences.lengths[requests[row]] + place] = tokens[row, place]
    sequences.lengths[requests] += num_committed
    finished = stopped | (sequences.lengths[requests] >= max_lengths[requests])
    counted = np.arange(settled.entropies.shape[1])[None] < num_committed[:, None]
    recorder.distribution(
        entropy_sum=float(settled.entropies[counted].sum()),
        max_prob_sum=float(settled.max_probs[counted].sum()),
        num_tokens=int(num_committed.sum()),
    )
    num_accepted = np.minimum(np.minimum(settled.num_tokens - 1, settled.num_drafted), num_committed)
    # Drafts behind an accepted ending token were neither accepted nor rejected.
    cut = settled.num_tokens > num_committed
    num_drafted = np.where(cut, num_accepted, settled.num_drafted)
    return Verified(requests, tokens, num_committed, num_accepted, num_drafted, finished, settled.hidden)


def account(
    recorder: StepRecorder,
    controller: Controller,
    step: Step,
    verified: Verified,
    drafters: np.ndarray,
    forward_s: float,
    plain: PlainCosts,
) -> None:
    """Count one decoding forward.

    Args:
        recorder: Gets the counts.
        controller: Knows what a plain forward costs.
        step: What was planned for the forward; it covers the first `step.batch` requests of `verified`, or fewer.
        verified: What came of it.
        drafters: int64 `[n]`, whose draft each of the first `n` requests of `verified` used; the others had no plan.
        forward_s: Seconds of the forward.
        plain: Gets what a plain forward in its place costs.
    """
    count = len(drafters)
    num_committed, num_drafted = verified.num_committed[:count], verified.num_drafted[:count]
    if recorder.speculates:
        recorder.forward(
            num_committed=num_committed,
            num_drafted=num_drafted,
            num_accepted=verified.num_accepted[:count],
            drafters=drafters,
        )
    else:
        recorder.forward(num_committed=num_committed)
    if recorder.speculates:
        drafted = num_drafted.any()
        plain.note(count, controller.plain_forward_s(count, step.context_tokens) if drafted else forward_s)
