"""Appends settled tokens to the sequences and counts them. Both engines use its compiled part (`settling.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from atlas_rl.controller.base import Controller, Step
from atlas_rl.core import Hidden, Sequences, Verified
from atlas_rl.decode.plain_run import PlainCosts
from atlas_rl.decode.settling import settle
from atlas_rl.report.recorder import StepRecorder

NOBODY_WANTS = np.zeros((0, 0), np.float32)
_NOBODY_SAYS = np.zeros((0, 0), np.bool_)  # the call's sampling parameters decide which tokens end a request


@dataclass(slots=True)
class Settled:
    """Tokens that one forward settled, before they are committed.

    Attributes:
        requests: int64 `[batch]`.
        token_ids: int64 `[batch, width]`: accepted drafts, then the recovered or bonus token.
        num_tokens: int64 `[batch]`, number of valid tokens per row, at least 1.
        num_drafted: int64 `[batch]`, draft tokens that the forward verified.
        entropies: float32 `[batch, at least max(num_tokens)]`, nats, of the distribution each token was drawn from.
        max_probs: float32, same shape, probability of its likeliest token.
        hidden: States that the tokens were drawn from.
        logprobs: float32, same shape as the entropies; no rows if the engine keeps its own.
    """

    requests: np.ndarray
    token_ids: np.ndarray
    num_tokens: np.ndarray
    num_drafted: np.ndarray
    entropies: np.ndarray
    max_probs: np.ndarray
    hidden: Hidden
    logprobs: np.ndarray = field(default_factory=lambda: NOBODY_WANTS)


def commit(
    settled: Settled,
    sequences: Sequences,
    max_lengths: np.ndarray,
    recorder: StepRecorder,
    logprobs: np.ndarray = NOBODY_WANTS,
) -> Verified:
    """Append tokens to their sequences, up to an ending token, and return which requests end.

    There must be room for the tokens, as `reached` tells: compiled code does not check bounds.

    Args:
        settled: Tokens to append.
        sequences: Sequences to append to.
        max_lengths: int64 `[num_requests]`, prompt plus completion tokens at which a request ends.
        recorder: Receives the entropies.
        logprobs: float32 `[num_requests, n]`, receives the tokens' logprobs by place in the completion.
    """
    requests, tokens = settled.requests, settled.token_ids
    batch = len(requests)
    committed, accepted, drafted = np.empty((3, batch), np.int64)
    finished = np.empty(batch, np.bool_)
    # The arrays of `Drawn`, `Texts` and `Fates`; making those would take longer than all of this.
    entropy_sum, max_prob_sum, num_committed = settle(
        requests, np.ascontiguousarray(tokens, np.int64), np.ascontiguousarray(settled.num_tokens, np.int64),
        np.ascontiguousarray(settled.num_drafted, np.int64), np.ascontiguousarray(settled.entropies),
        np.ascontiguousarray(settled.max_probs), settled.logprobs if len(logprobs) else NOBODY_WANTS, _NOBODY_SAYS,
        sequences.sampling.stops, sequences.token_ids, sequences.lengths, max_lengths, sequences.prompt_lengths,
        logprobs, committed, accepted, drafted, finished,
    )  # fmt: skip
    recorder.distribution(entropy_sum=entropy_sum, max_prob_sum=max_prob_sum, num_tokens=num_committed)
    return Verified(requests, tokens, committed, accepted, drafted, finished, settled.hidden)


def account(
    recorder: StepRecorder,
    controller: Controller,
    step: Step,
    verified: Verified,
    drafters: np.ndarray,
    forward_s: float,
    plain: PlainCosts,
    *,
    alone: bool = True,
) -> None:
    """Count one decoding forward.

    Args:
        recorder: Receives the counts.
        controller: Estimates the cost of a plain forward.
        step: Plan of the forward; it covers the first `step.batch` requests of `verified`, or fewer.
        verified: Outcome of the forward.
        drafters: int64 `[n]`, index of the speculator whose draft each of the first `n` requests of `verified` used;
            the others had no plan.
        forward_s: Seconds of the forward.
        plain: Receives the cost of a plain forward in its place.
        alone: Whether it ran nothing else; a serving engine also runs prompts in it.
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
        measured = alone and not num_drafted.any()
        plain.note(count, forward_s if measured else controller.plain_forward_s(count, step.context_tokens))
        if not alone:
            plain.note_mixed(count + int(num_drafted.sum()), step.context_tokens, forward_s)
