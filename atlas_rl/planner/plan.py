"""Works out and prints the answer to `atlas-rl plan`: all figures of one setting."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from atlas_rl.planner.hardware import MAX_GPUS
from atlas_rl.planner.roofline import ForwardCost, Memory
from atlas_rl.planner.speculation import (
    MAX_BATCH,
    Setting,
    accepted_length,
    best_draft_tokens,
    first_loss,
    paying_batches,
)

_MAX_RANGES = 4  # most ranges of batches in the verdict
_MOST = {"--batch": 10**6, "--context": 10**9, "--max-draft-tokens": 256}  # far beyond any use, and soon computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """Figures of one draft length.

    Attributes:
        draft_tokens: Draft tokens per request and round.
        accepted_length: Tokens committed per request and round.
        tokens_per_s: Tokens per second of the whole batch.
        speedup: Speedup over no speculation.
    """

    draft_tokens: int
    accepted_length: float
    tokens_per_s: float
    speedup: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Predictions for one setting.

    Attributes:
        batch: Requests at once.
        context: Tokens cached per request.
        accept: Acceptance of a draft, given that those before it were accepted.
        params: Weights of the target.
        active_params: Weights of the target that one token uses.
        memory: Memory per GPU.
        max_batch: Largest batch that fits in memory.
        target: Forward of the target over one token per request.
        draft: One step of the drafter; None if drafting is assumed to cost nothing.
        verify: Forward of the target over the `chosen` drafts and one more token per request.
        host_s: Seconds that the device waits for the engine's host in a round that drafts.
        lengths: Figures of each draft length, from 0 on.
        chosen: Draft length to show in detail.
        best: Draft length with the most tokens per second; 0 if none pays.
        crossover_batch: Smallest batch at which no draft length pays; None if speculation pays up to `max_batch`.
        paying_batches: Batches at which some draft length pays: ranges, first and last batch.
    """

    batch: int
    context: int
    accept: float
    params: float
    active_params: float
    memory: Memory
    max_batch: int
    target: ForwardCost
    draft: ForwardCost | None
    verify: ForwardCost
    host_s: float
    lengths: list[Length]
    chosen: int
    best: int
    crossover_batch: int | None
    paying_batches: list[tuple[int, int]]

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values in SI units, as `--json` prints them."""
        forwards = {"target": self.target, "draft": self.draft, "verify": self.verify}
        totals = {name: asdict(one) | {"total_s": one.total_s} for name, one in forwards.items() if one}
        used = asdict(self.memory) | {"total_bytes": self.memory.total_bytes}
        return asdict(self) | {"draft": None} | totals | {"memory": used}


def make_plan(
    setting: Setting, *, batch: int, accept: float, draft_tokens: int | None = None, max_draft_tokens: int = 16
) -> Plan:
    """Predict speed and memory of one setting.

    Args:
        setting: Model, drafter and machine.
        batch: Requests at once.
        accept: Acceptance of a draft, given that those before it were accepted.
        draft_tokens: Draft length to show in detail; None for the best.
        max_draft_tokens: Longest draft length to try.

    Raises:
        ValueError: Counts are out of range, or weights and cache do not fit in memory.
    """
    counts = (("--batch", batch), ("--context", setting.context), ("--max-draft-tokens", max_draft_tokens))
    for option, value in counts:
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
        if value > _MOST[option]:
            raise ValueError(f"{option} must be at most {_MOST[option]:,}")
    if not 0 <= accept <= 1:
        hint = f": {accept:g} % is {accept / 100:g}" if 2 <= accept <= 100 else ""
        raise ValueError(f"--accept must be from 0 to 1, got {accept:g}{hint}")
    if draft_tokens is not None and not 0 <= draft_tokens <= max_draft_tokens:
        raise ValueError(f"--draft-tokens must be from 0 to {max_draft_tokens}, got {draft_tokens}")
    _check_memory(setting, batch)
    lengths = []
    for k in range(max_draft_tokens + 1):
        tau = accepted_length(accept, k)
        lengths.append(
            Length(
                draft_tokens=k,
                accepted_length=tau,
                tokens_per_s=setting.tokens_per_s(batch, k, tau),
                speedup=setting.speedup(batch, k, tau),
            )
        )
    best = best_draft_tokens(setting, batch, accept, max_draft_tokens)
    chosen = best if draft_tokens is None else draft_tokens
    max_batch = _max_batch(setting)
    paying = paying_batches(setting, accept, max_draft_tokens, max_batch, also=batch)
    return Plan(
        batch=batch,
        context=setting.context,
        accept=accept,
        params=setting.model.params,
        active_params=setting.model.active_params,
        memory=setting.memory(batch),
        max_batch=max_batch,
        target=setting.target_forward(batch),
        draft=setting.draft_step(batch),
        verify=setting.target_forward(batch, chosen + 1),
        host_s=setting.host.exposed_s(batch),
        lengths=lengths,
        chosen=chosen,
        best=best,
        crossover_batch=first_loss(paying, max_batch),
        paying_batches=paying,
    )


def render(plan: Plan, setting: Setting) -> str:
    """The plan as text for a terminal."""
    gpu, precision, used = setting.machine.gpu, setting.precision, plan.memory
    drafter = setting.drafter.name if setting.drafter else "ngram (free)"
    lines = [
        f"{setting.model.name}: {plan.params / 1e9:.1f}B parameters, {plan.active_params / 1e9:.1f}B active per token",
        f"{setting.machine.num_gpus}x {gpu.name.upper()}, weights {precision.mlp}, attention {precision.attention}, "
        f"cache {precision.cache} | batch {plan.batch}, context {plan.context}, drafter {drafter}, "
        f"acceptance {plan.accept:g}",
        f"memory per GPU: {used.total_bytes / 1e9:.1f} of {used.usable_bytes / 1e9:.1f} GB (weights "
        f"{used.weights_bytes / 1e9:.1f}, cache {used.cache_bytes / 1e9:.1f}, drafter {used.drafter_bytes / 1e9:.1f}); "
        f"up to batch {plan.max_batch}",
        "",
        f"{'one forward':<26}{'ms':>8}{'roofline':>10}{'all-reduce':>12}{'kernels':>9}{'GB/GPU':>9}{'TFLOP/GPU':>11}",
        _forward_line("target, 1 token", plan.target),
    ]
    if plan.draft and plan.chosen:
        lines.append(_forward_line("draft step", plan.draft))
    if plan.chosen:
        lines.append(_forward_line(f"target, {plan.chosen + 1} tokens", plan.verify))
        lines.append(f"{'host, per round that drafts':<27}{1e3 * plan.host_s:>7.3f}")
    lines += ["", f"{'drafts':>8}{'accepted length':>17}{'tokens/s':>11}{'speedup':>9}"]
    for one in plan.lengths:
        mark = "  best" if one.draft_tokens == plan.best else ""
        mark += "  chosen" if one.draft_tokens == plan.chosen != plan.best else ""
        lines.append(
            f"{one.draft_tokens:>8}{one.accepted_length:>17.2f}{one.tokens_per_s:>11.1f}{one.speedup:>9.2f}{mark}"
        )
    return "\n".join([*lines, "", _verdict(plan)])


def _verdict(plan: Plan) -> str:
    plain, best = plan.lengths[0], plan.lengths[plan.best]
    if not plan.best:
        text = f"No speculation: {plain.tokens_per_s:.0f} tokens/s; no draft length pays at batch {plan.batch}."
    else:
        text = (
            f"{plain.tokens_per_s:.0f} tokens/s without speculation, {best.tokens_per_s:.0f} with {plan.best} drafts "
            f"({best.speedup:.2f}x)."
        )
    return f"{text} {_where_it_pays(plan)}"


def _where_it_pays(plan: Plan) -> str:
    ranges, largest = plan.paying_batches, plan.max_batch
    end = "the most that is tried" if largest == MAX_BATCH else "the largest that fits"
    if not ranges:
        return f"It pays at no batch up to {largest}, {end}."
    if ranges == [(1, largest)]:
        return f"It pays up to batch {largest}, {end}."
    if len(ranges) == 1 and ranges[0][0] == 1:
        return f"From batch {ranges[0][1] + 1} on it does not pay."
    named = [
        f"at batch {first}" if first == last else f"from batch {first} to {last}"
        for first, last in ranges[:_MAX_RANGES]
    ]
    if len(ranges) > _MAX_RANGES:
        named.append(f"at some beyond, up to batch {ranges[-1][1]}")
    return f"It pays only {', '.join(named)}{f', {end}' if ranges[-1][1] == largest else ''}."


def _forward_line(name: str, one: ForwardCost) -> str:
    return (
        f"{name:<26}{1e3 * one.total_s:>8.3f}{1e3 * one.roofline_s:>10.3f}{1e3 * one.communication_s:>12.3f}"
        f"{1e3 * one.launch_s:>9.3f}{one.num_bytes / 1e9:>9.2f}{one.flops / 1e12:>11.3f}"
    )


def _check_memory(setting: Setting, batch: int) -> None:
    used = setting.memory(batch)
    if used.fits:
        return
    raise ValueError(
        f"does not fit: {used.total_bytes / 1e9:.1f} GB per GPU (weights {used.weights_bytes / 1e9:.1f}, cache "
        f"{used.cache_bytes / 1e9:.1f}, drafter {used.drafter_bytes / 1e9:.1f}) of {used.usable_bytes / 1e9:.1f} usable; "
        f"{_cure(setting, batch)}"
    )


def _cure(setting: Setting, batch: int) -> str:
    """What would fit. GPUs share the weights, but more of them than key-value heads keep copies of the cache."""
    largest, needed = _max_batch(setting), _fewest_gpus(setting, batch)
    smaller = f"a --batch of at most {largest}, " if largest >= 1 else ""  # else a single request does not fit either
    others = "a narrower --precision or a shorter --context"
    if needed is not None:
        return f"take {needed} GPUs, {smaller}{others}"
    if largest >= 1:
        return f"more GPUs do not help, since {_sharing(setting)}: take {smaller}{others}"
    one = _fewest_gpus(setting, 1)
    if one is None:
        return f"no number of GPUs holds a single request: take {others}"
    most = _max_batch(replace(setting, machine=replace(setting.machine, num_gpus=one)))
    return f"more GPUs alone do not help, since {_sharing(setting)}: take {one} GPUs and a --batch of at most {most}"


def _sharing(setting: Setting) -> str:
    """How many GPUs share the cache of a request, for a message."""
    parts = setting.model.kv_splits
    return "each keeps the same cache" if parts == 1 else f"at most {parts} of them share a cache"


def _fewest_gpus(setting: Setting, batch: int) -> int | None:
    """Smallest number of GPUs that holds `batch` requests, or None. Memory per GPU never grows with their number."""

    def fits(num_gpus: int) -> bool:
        return replace(setting, machine=replace(setting.machine, num_gpus=num_gpus)).memory(batch).fits

    if not fits(MAX_GPUS):
        return None
    low, high = 0, MAX_GPUS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _max_batch(setting: Setting) -> int:
    """Largest batch that fits, at most `MAX_BATCH`; the cache grows linearly with it."""
    one, two = setting.memory(1), setting.memory(2)
    per_request = two.total_bytes - one.total_bytes
    return min(MAX_BATCH, int(1 + (one.usable_bytes - one.total_bytes) // per_request))
