"""Predicts tokens per second with and without speculation, the best draft length, and the batch at which it stops paying.

A round drafts k tokens, one draft step after the other, and verifies k+1 positions in one forward of the target. If each
draft is accepted with probability a, given that those before it were, a round commits

    tau(k) = 1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a)

tokens per request on average (Leviathan et al., arXiv 2211.17192), bonus token included. Hence

    tokens/s = batch * tau(k) / (t_verify(k+1) + k t_draft + t_host(batch)),        without speculation batch / t_verify(1),

where `t_host` is the time that the device waits for the engine's host in a round that drafts (`host.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas_rl.planner.hardware import Machine
from atlas_rl.planner.host import NO_HOST, Host
from atlas_rl.planner.model import ModelShape
from atlas_rl.planner.roofline import ForwardCost, Memory, Precision, forward, memory

MAX_BATCH = 4096
BF16 = Precision()


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A target, its drafter, and the machine that they run on.

    Attributes:
        model: The target.
        machine: GPUs that target and drafter share.
        drafter: The drafter, kept in FP32 if the target is, else in BF16; None if drafts cost nothing.
        precision: Precision of the target.
        context: Tokens cached per request.
        host: Time that the engine's host adds to every round that drafts; none by default (a device alone).
    """

    model: ModelShape
    machine: Machine
    drafter: ModelShape | None = None
    precision: Precision = BF16
    context: int
    host: Host = NO_HOST

    @property
    def drafter_precision(self) -> Precision:
        name = self.precision.head
        return Precision(mlp=name, attention=name, cache=name)

    def target_forward(self, batch: int, tokens: int = 1) -> ForwardCost:
        """One forward of the target over `tokens` tokens of each of `batch` requests."""
        return forward(self.model, self.precision, self.machine, batch=batch, tokens=tokens, context=self.context)

    def draft_step(self, batch: int) -> ForwardCost | None:
        """One step of the drafter, a token for each of `batch` requests; None if drafting costs nothing."""
        if self.drafter is None:
            return None
        return forward(self.drafter, self.drafter_precision, self.machine, batch=batch, context=self.context)

    def memory(self, batch: int) -> Memory:
        """Memory per GPU at `batch` requests."""
        return memory(
            self.model,
            self.precision,
            self.machine,
            batch=batch,
            context=self.context,
            drafter=self.drafter,
            drafter_precision=self.drafter_precision,
        )

    def round_s(self, batch: int, draft_tokens: int) -> float:
        """Seconds of one round: `draft_tokens` drafts per request and their verification."""
        verify_s = self.target_forward(batch, draft_tokens + 1).total_s
        if not draft_tokens:
            return verify_s
        step = self.draft_step(batch)
        return verify_s + (draft_tokens * step.total_s if step else 0.0) + self.host.exposed_s(batch)

    def tokens_per_s(self, batch: int, draft_tokens: int, accepted_length: float) -> float:
        """Tokens per second of the whole batch, if a round commits `accepted_length` tokens per request."""
        return batch * accepted_length / self.round_s(batch, draft_tokens)

    def speedup(self, batch: int, draft_tokens: int, accepted_length: float) -> float:
        """Speedup over no speculation at the same batch."""
        return self.tokens_per_s(batch, draft_tokens, accepted_length) / self.tokens_per_s(batch, 0, 1.0)


def accepted_length(accept: float, draft_tokens: int) -> float:
    """`tau(k)`: tokens committed per request and round.

    Raises:
        ValueError: `accept` is not in [0, 1], or `draft_tokens` is below 0.
    """
    if not 0.0 <= accept <= 1.0 or draft_tokens < 0:
        raise ValueError(f"acceptance must be in [0, 1] and drafts at least 0, got {accept} and {draft_tokens}")
    return sum(accept**position for position in range(draft_tokens + 1))


def best_draft_tokens(setting: Setting, batch: int, accept: float, max_draft_tokens: int) -> int:
    """The draft length with the most tokens per second: 0 if none pays, the shortest among equals."""
    return max(
        range(max_draft_tokens + 1),
        key=lambda k: (setting.tokens_per_s(batch, k, accepted_length(accept, k)), -k),
    )


def paying_batches(
    setting: Setting, accept: float, max_draft_tokens: int, largest: int = MAX_BATCH, *, also: int = 1
) -> list[tuple[int, int]]:
    """The batches at which some draft length pays: ranges, first and last batch, in order.

    With experts, speculation can lose at a small or medium batch and win at a larger one. Every batch up to 16 is tried,
    and those beyond in steps of an eighth; where the answer changes, the exact batch is searched.

    Args:
        setting: Model, drafter and machine.
        accept: Acceptance of a draft.
        max_draft_tokens: Longest draft length to try.
        largest: Largest batch to try.
        also: A batch to try besides.
    """

    def pays(batch: int) -> bool:
        return best_draft_tokens(setting, batch, accept, max_draft_tokens) > 0

    ranges: list[tuple[int, int]] = []
    before, paid = 0, False
    for batch in _tried_batches(largest, also):
        paying = pays(batch)
        if paying != paid:
            low, high = before, batch
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if pays(middle) == paid else (low, middle)
            if paying:
                ranges.append((high, batch))
            else:
                ranges[-1] = (ranges[-1][0], low)
        if paying:
            ranges[-1] = (ranges[-1][0], batch)
        before, paid = batch, paying
    return ranges


def crossover_batch(setting: Setting, accept: float, max_draft_tokens: int, largest: int = MAX_BATCH) -> int | None:
    """The smallest batch at which no draft length pays; None if speculation pays at every batch up to `largest`."""
    return first_loss(paying_batches(setting, accept, max_draft_tokens, largest), largest)


def first_loss(ranges: list[tuple[int, int]], largest: int) -> int | None:
    """The smallest batch outside of `paying_batches`, or None."""
    if not ranges or ranges[0][0] > 1:
        return 1
    return None if ranges[0][1] == largest else ranges[0][1] + 1


def _tried_batches(largest: int, also: int) -> list[int]:
    tried, batch = {largest, min(also, largest)}, 1
    while batch < largest:
        tried.add(batch)
        batch += max(1, batch // 8)
    return sorted(tried)
