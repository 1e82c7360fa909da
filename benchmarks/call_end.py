"""Simulates when calls end with the controller's drafts: host time is zero, texts and costs are made up.

    python -m benchmarks.call_end            # every cell, a few minutes on one core
    python -m benchmarks.call_end --quick    # batch 32 and 128, one cost

A cell is a kind of text, a batch and a cost. In each, one controller decodes calls in a row, with texts of their own. Which
tokens the drafter guesses, and how sure it is, belongs to the text: it is the same in every arm. Arms: plain decoding, the
controller that maximises every step's goodput (`goodput`), and the one that also forecasts the end of the call (`call_end`).

    ratio_to_off    seconds of plain decoding over seconds of the arm, over the calls that count; 1 is as fast
    first_call      the same of the first call, in which the controller knows nothing

The rule that it was judged by was written down before: at least 0.98 of off in every cell, and nowhere more than 2% slower
than `goodput`.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas_rl import progress
from atlas_rl.controller.base import Controller, Rest, Step
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Draft, Verified
from benchmarks.common import ROOT, environment, write_result

RESULT = ROOT / "benchmarks" / "results" / "call_end.json"
BATCHES = (8, 32, 64, 128, 256)
CALLS, LEARNING = 7, 4  # calls of a cell, and how many of them do not count
LENGTH, LONGEST = 96, 400  # tokens of a completion if all are equally long, and most tokens of any
CONTEXT = 100  # tokens of a prompt


@dataclass(frozen=True, slots=True)
class Texts:
    """The completions of one call.

    Attributes:
        lengths: int64 `[batch]`, tokens.
        chances: float64 `[batch, LONGEST]`, the drafter's calibrated confidence in its guess of each token.
        right: bool `[batch, LONGEST]`, whether the guess is correct.
        longest: Most tokens of a completion.
    """

    lengths: np.ndarray
    chances: np.ndarray
    right: np.ndarray
    longest: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Simulated seconds on the device.

    Attributes:
        forward_s: Seconds of a forward, by its number of tokens.
        draft_s: Seconds of drafts, by the number of requests and the depth.
    """

    forward_s: Callable[[int], float]
    draft_s: Callable[[int, int], float]


COSTS = {
    # A forward that drafts hardly slow down, and a drafter that reads its weights once: the toy that found the loss.
    "flat": Cost(lambda tokens: 9e-3 + 1.1e-5 * tokens, lambda rows, depth: 1.2e-3 + 2e-5 * rows),
    # Free up to the ridge, where the device's operations begin to count; a small head runs for every position.
    "ridge": Cost(
        lambda tokens: 4.2e-3 + 4e-6 * tokens + 1.5e-5 * max(0, tokens - 280),
        lambda rows, depth: depth * (1.5e-4 + 1e-6 * rows),
    ),
    # Every token costs, as on a CPU.
    "steep": Cost(lambda tokens: 50e-3 + 6e-4 * tokens, lambda rows, depth: depth * (1e-3 + 1e-5 * rows)),
}
KINDS = (
    "alike", "30% repeat", "60% repeat", "90% repeat", "spread", "hardly guessed", "geometric", "long tail",
    "long ones repeat", "long ones are hard", "rising", "falling", "late", "half late",
    "late somewhere",
)  # fmt: skip


def texts_of(kind: str, batch: int, rng: np.random.Generator) -> Texts:
    """Texts of a call. If a kind sets no lengths, all completions run to the same limit."""
    lengths, ranks = np.full(batch, LENGTH), np.arange(batch) / batch
    mean, place = np.full(batch, 0.7), np.arange(LONGEST) / LENGTH
    if kind in ("geometric", "long tail", "long ones repeat", "long ones are hard"):
        drawn = rng.geometric(1 / LENGTH, batch) if kind == "geometric" else np.exp(rng.normal(4.5, 0.6, batch))
        lengths = np.minimum(drawn.astype(np.int64) + 5, LONGEST)
        ranks = np.argsort(np.argsort(lengths)) / batch
        mean = np.clip(rng.normal(0.7, 0.2, batch), 0.05, 0.95)
    if kind.endswith("% repeat"):
        mean = np.where(np.arange(batch) < float(kind.split("%")[0]) / 100 * batch, 0.93, 0.08)
    mean = {
        "spread": np.clip(rng.normal(0.6, 0.25, batch), 0.03, 0.96), "hardly guessed": np.full(batch, 0.12),
        "long ones repeat": np.clip(0.3 + 0.6 * ranks, 0.05, 0.95),
        "long ones are hard": np.clip(0.9 - 0.7 * ranks, 0.05, 0.95),
    }.get(kind, mean)  # fmt: skip
    means = np.repeat(mean[:, None], LONGEST, axis=1)
    if kind in ("rising", "falling"):
        slope = place if kind == "rising" else 1 - place
        means = np.tile(np.clip(0.1 + 0.8 * slope, 0.1, 0.9), (batch, 1))
    if kind in ("late", "half late", "late somewhere"):
        onset = {  # the share of a text after which it repeats itself
            "late": np.full(batch, 0.5), "half late": np.where(ranks < 0.5, 0.5, 2.0),
            "late somewhere": rng.uniform(0.2, 0.8, batch),
        }[kind]  # fmt: skip
        means = np.where(place < onset[:, None], 0.1, 0.93)
    chances = 1 / (1 + (1 - means) / means * np.exp(-rng.normal(0, 1, means.shape)))
    longest = LENGTH if (lengths == LENGTH).all() else LONGEST
    return Texts(lengths, chances, rng.random(means.shape) < chances, longest)


def call_s(controller: Controller, texts: Texts, cost: Cost, *, tells_rest: bool = True) -> float:
    """Seconds of a call with one drafter, `a`. The first token of each completion comes from its prompt."""
    done, active, seconds = np.ones(len(texts.lengths), np.int64), np.arange(len(texts.lengths)), 0.0
    while len(active):
        step_s, tokens = _step(controller, texts, cost, active, done, tells_rest)
        seconds += step_s
        done[active] += tokens
        active = active[done[active] < texts.lengths[active]]
    return seconds


def _step(
    controller: Controller, texts: Texts, cost: Cost, active: np.ndarray, done: np.ndarray, tells_rest: bool
) -> tuple[float, np.ndarray]:
    """One decode step: returns its seconds, and the tokens of each active request."""
    batch, places = len(active), done[active]
    rest = Rest(active, places, texts.longest - places) if tells_rest else None
    step = Step(texts.longest - places - 1, batch * CONTEXT + int(places.sum()), ["a"], backlog={"a": 0}, rest=rest)
    right = np.zeros((batch, 0), bool)
    while plan := controller.plan(step):
        asked = step.asked["a"] = plan["a"]
        columns = np.minimum(places[:, None] + np.arange(asked.max()), LONGEST - 1)
        right = texts.right[active[:, None], columns]
        confidence = texts.chances[active[:, None], columns].astype(np.float32)
        step.drafts["a"] = Draft(right.astype(np.int64), asked.copy(), confidence)
        step.draft_s["a"] = cost.draft_s(int((asked > 0).sum()), int(asked.max()))
    admission = controller.admit(step)
    verified = np.arange(right.shape[1]) < admission.lengths[:, None]
    accepted = np.cumprod(right & verified, axis=1).sum(axis=1)
    committed = np.minimum(accepted + 1, texts.lengths[active] - places)
    forward_s = cost.forward_s(batch + int(admission.lengths.sum()))
    step_s = forward_s + sum(step.draft_s.values())
    outcome = Verified(
        active, np.ones((batch, int(committed.max())), np.int64), committed, np.minimum(accepted, committed),
        admission.lengths.copy(), places + committed >= texts.lengths[active],
    )  # fmt: skip
    controller.observe(step, admission, outcome, forward_s, step_s)
    return step_s, committed


def off_s(texts: Texts, cost: Cost) -> float:
    """Seconds of the call in plain decoding."""
    return sum(cost.forward_s(int((texts.lengths > place).sum())) for place in range(1, int(texts.lengths.max())))


def ratios(kind: str, batch: int, cost: Cost, calls: int = CALLS, seed: int = 0) -> dict[str, np.ndarray]:
    """Seconds of `calls` calls in a row, float64 `[calls]`, by arm."""
    arms = {arm: (GoodputController(("a",)), np.zeros(calls)) for arm in ("goodput", "call_end")}
    off = np.zeros(calls)
    for call in range(calls):
        texts = texts_of(kind, batch, np.random.default_rng([seed, call, batch, zlib.crc32(kind.encode())]))
        off[call] = off_s(texts, cost)
        for arm, (controller, seconds) in arms.items():
            seconds[call] = call_s(controller, texts, cost, tells_rest=arm == "call_end")
    return {"off": off} | {arm: seconds for arm, (_, seconds) in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--costs", nargs="+", choices=list(COSTS), default=list(COSTS))
    parser.add_argument("--seed", type=int, default=1000, help="of the texts; the controller was made with 0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.quick:
        args.batches, args.costs = [32, 128], ["flat"]
    origin, cells = environment(), []
    for name in args.costs:
        for batch in args.batches:
            for kind in progress.each(KINDS, f"kinds of text, {name}, batch {batch}", "kind"):
                rows = cell(name, kind, batch, args.seed)
                cells += rows
                write_result(args.output, {**origin, "seed": args.seed, "cells": cells, "worst": worst(cells)})
                progress.say(
                    "  ".join(f"{row['arm']} {row['ratio_to_off']:.3f}" for row in rows) + f"  {kind}, {batch}"
                )
    print(f"written: {args.output}")


def cell(name: str, kind: str, batch: int, seed: int) -> list[dict[str, Any]]:
    """Both arms of one cell."""
    seconds = ratios(kind, batch, COSTS[name], seed=seed)
    return [
        {
            "cost": name, "kind": kind, "batch": batch, "arm": arm,
            "ratio_to_off": float(seconds["off"][LEARNING:].sum() / seconds[arm][LEARNING:].sum()),
            "first_call": float(seconds["off"][0] / seconds[arm][0]),
        }
        for arm in ("goodput", "call_end")
    ]  # fmt: skip


def worst(cells: list[dict[str, Any]]) -> dict[str, float]:
    """The lowest ratios over all cells, which decide the verdict."""
    by_arm = {
        arm: np.array([row["ratio_to_off"] for row in cells if row["arm"] == arm]) for arm in ("goodput", "call_end")
    }
    return {f"{arm}_of_off": float(ratio.min()) for arm, ratio in by_arm.items()} | {
        "call_end_of_goodput": float((by_arm["call_end"] / by_arm["goodput"]).min())
    }


if __name__ == "__main__":
    main()
