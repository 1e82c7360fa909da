"""Rollouts on a device: speculation on, off and by arm, beside transformers' own generation, and steps as graphs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.report.report import PHASES
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.common import quantiles
from benchmarks.gpu.timing import host_ms, traced

GROUP = 8
FIXED = {
    "history": (HistorySpeculator, 6),
    "recurrent": (RecurrentSpeculator, 4),
    "fp4": (Fp4SelfSpeculator, 3),
}


class Prompts:
    """Batches of prompts that have not been used before."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = itertools.cycle(rows)

    def next(self, batch: int) -> tuple[list[list[int]], int]:
        """Prompts and completions per prompt for `batch` requests."""
        group = min(GROUP, batch)
        return [next(self._rows) for _ in range(batch // group)], group


def engines(model: Any) -> dict[str, AtlasRolloutEngine]:
    """Engines: on, off, and each single speculator at a fixed lookahead."""
    made = {
        "off": AtlasRolloutEngine(model=model, speculation=False, console=False, audit_share=0.0),
        "on": AtlasRolloutEngine(model=model, console=False, audit_share=0.0),
    }
    for name, (speculator, lookahead) in FIXED.items():
        one = speculator()
        made[name] = AtlasRolloutEngine(
            model=model,
            speculators=[one],
            controller=FixedController([one.name], one.name, lookahead),
            console=False,
            audit_share=0.0,
        )
    return made


def warm(engine: AtlasRolloutEngine, prompts: Prompts, eos: int, calls: int, max_new_tokens: int, batch: int) -> None:
    """Some steps of a run: rollouts, then a refresh."""
    for call in range(calls):
        rows, group = prompts.next(batch)
        engine.generate(
            rows, num_generations=group, max_new_tokens=max_new_tokens, eos_token_ids=[eos], seed=900 + call
        )
        engine.policy_updated()


def transformers_arm(model: Any, eos: int, max_new_tokens: int) -> Callable[[list[list[int]], int, int], int]:
    """TRL's generation without vLLM: `model.generate` over left-padded prompts."""

    def run(rows: list[list[int]], group: int, seed: int) -> int:
        torch.manual_seed(seed)
        texts = [row for row in rows for _ in range(group)]
        width = max(map(len, texts))
        ids = torch.tensor([[eos] * (width - len(t)) + t for t in texts], device=model.device)
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts], device=model.device)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        completions = out[:, width:]
        ended = (completions == eos).int().cumsum(1)
        return int(((ended == 0) | ((ended == 1) & (completions == eos))).sum())

    return run


def cell(
    model: Any,
    own: dict[str, AtlasRolloutEngine],
    prompts: Prompts,
    eos: int,
    batch: int,
    arms: list[str],
    repeats: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Tokens/s of every arm over the same prompts and seeds, the arms in turns."""
    plain = transformers_arm(model, eos, max_new_tokens)
    speed: dict[str, list[float]] = {arm: [] for arm in arms}
    reports: dict[str, list[Any]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):  # the first repeat warms up
        rows, group = prompts.next(batch)
        for arm in arms:
            torch.cuda.synchronize()
            began = time.perf_counter()
            if arm == "transformers":
                tokens = plain(rows, group, repeat)
            else:
                report = (
                    own[arm]
                    .generate(
                        rows,
                        num_generations=group,
                        max_new_tokens=max_new_tokens,
                        eos_token_ids=[eos],
                        seed=1000 * batch + repeat,
                    )
                    .report
                )
                tokens = report.num_tokens
                if repeat:
                    reports[arm].append(report)
            torch.cuda.synchronize()
            if repeat:
                speed[arm].append(tokens / (time.perf_counter() - began))
    return [_row(batch, arm, speed, reports[arm]) for arm in arms]


def _row(batch: int, arm: str, speed: dict[str, list[float]], reports: list[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": batch, "arm": arm, "tokens_per_s": quantiles(speed[arm])}
    if "off" in speed:
        row["ratio_to_off"] = quantiles([a / b for a, b in zip(speed[arm], speed["off"], strict=True)])
    if reports:
        forwards = sum(report.num_forwards for report in reports)
        row["step_ms"] = 1e3 * sum(report.generate_s - report.prefill_s for report in reports) / forwards
        row["accepted_length"] = float(np.mean([report.accepted_length for report in reports]))
        row["entropy"] = float(np.mean([report.entropy for report in reports]))
        row["phases_ms_per_step"] = {
            phase: round(1e3 * sum(getattr(report, f"{phase}_s") for report in reports) / forwards, 3)
            for phase in (*PHASES, "other")
        }
    return row


def asked_of_the_device(engine: AtlasRolloutEngine, prompts: Prompts) -> dict[str, Any]:
    """Launches, waits and copies per step of one short call of 8 requests, with the prompt's forward subtracted."""
    (rows, group), tokens = prompts.next(8), 12

    def call(count: int) -> Any:
        return engine.generate(rows, num_generations=group, max_new_tokens=count, eos_token_ids=[1], seed=7)

    call(tokens)
    found = {count: (traced(lambda count=count: call(count)), call(count).report.num_forwards) for count in (1, tokens)}
    (before, none), (after, steps) = found[1], found[tokens]
    counted = ("launches", "graph_launches", "waits", "copies", "device_busy_ms")
    return {f"{name}_per_step": (after[name] - before[name]) / max(1, steps - none) for name in counted} | {
        "steps": steps - none,
        "kernels_ms": after["kernels_ms"],
    }


def step_and_graph(model: Any, batch: int, queries: int, context: int) -> dict[str, Any]:
    """Milliseconds of a decode forward, kernel by kernel and as a captured graph."""
    segments = Segments(
        np.ones(batch * queries, np.int64), 0, np.full(batch, context, np.int64), np.full(batch, queries, np.int64)
    )
    prompts = Segments(
        np.ones(batch * context, np.int64), 0, np.zeros(batch, np.int64), np.full(batch, context, np.int64)
    )
    found: dict[str, Any] = {"batch": batch, "queries": queries, "context": context}
    for name, refused in (("eager", "measured kernel by kernel"), ("captured", None)):
        runner = InProcessRunner(model)
        runner._uncaptured = refused
        cache = runner.new_cache(batch, context + 64)
        with runner.session(cache):
            runner.forward(prompts, np.arange(batch))
            found[f"{name}_ms"] = host_ms(lambda runner=runner: runner.forward(segments, np.arange(batch * queries)))
        if cache.steps is not None:
            found["capture_s"] = cache.steps.capture_s
            found["captured"] = cache.steps.captured
    return found


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda").eval()
