"""Compares the controller with every fixed choice, the best of them in hindsight, an oracle, and other engines.

    python -m benchmarks.controller                                          # every cell: more than an hour on 2 cores
    python -m benchmarks.controller --policies warm --batches 8 --keep       # some of them, the rest of the file kept
    python -m benchmarks.controller --vllm ...                               # vLLM's own methods as well

A cell is a policy, a temperature and a batch: of like requests (1 to 32), or `mixed`, twelve short ones and four that run
three times as long. Every arm generates the same prompts with the same seeds, hence the same texts, in turns, a decode step
each (`benchmarks/interleave.py`), so that all meet the same machine. Arms: TRL's transformers generation; ours without
speculation; prompt lookup; every speculator alone at k = 1, 3, 5, 7; the controller with all of them. All start from one
state, that of an engine some steps into a run over other prompts, and keep their own from there; the controller then has
one call, the others a short one, to get used to the batch size. Two more are computed:

- `hindsight`: the fixed arm of the highest median ratio to no speculation, which is among them.
- `oracle`: replays the cell's rollouts with every draft's fate known beforehand (`benchmarks/oracle.py`).

Tokens/s count generated tokens over the seconds of one generation call that were its own. Every ratio is the median of the
repeats' ratios.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.replay.costs import Costs
from atlas_rl.replay.record import RecordingSpeculator
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.cells import Cell, cell_prompts, group_of, kept_rows, print_cell, row, seed_of, tokenized
from benchmarks.common import ROOT, environment, write_result
from benchmarks.interleave import InTurns, Turns, shell
from benchmarks.ngram import NgramSpeculator
from benchmarks.oracle import oracle_rows
from benchmarks.rollout import (
    Arm,
    demo_policy,
    demo_tasks,
    engine_arm,
    engine_in_turns,
    head_of_a_run,
    ratios,
    run_in_turns,
    seconds_of,
    trl_arm,
)
from benchmarks.vllm_peers import vllm_rows

EAGLE3 = ROOT / "examples" / "grpo_demo" / "eagle3"
LAYERS = (2, 15, 27)  # layers that the shipped EAGLE-3 head reads


def main() -> None:
    args = parse_args()
    cells = planned(args)
    rows = kept_rows(args.output, cells) if args.keep else []
    for policy in dict.fromkeys(cell.policy for cell in cells):
        model, tokenizer = demo_policy.load_policy(warm=policy == "warm")
        start = warm_start(model, tokenizer, policy, args)
        own = [cell for cell in cells if cell.policy == policy]
        for cell in progress.each(own, f"cells, {policy}", "cell"):
            rows += measure(cell, model, tokenizer, start, args)
            write_result(args.output, {**environment(), "cells": rows})
        if args.vllm:
            rows += vllm_rows(own, model, tokenizer, args.repeats)
            write_result(args.output, {**environment(), "cells": rows})
    print(f"written: {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["warm", "raw"], choices=["warm", "raw"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.6, 0.0])
    parser.add_argument("--no-mixed", action="store_true", help="leave the mixed batches out")
    parser.add_argument("--lookaheads", nargs="+", type=int, default=[1, 3, 5, 7])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--warm-up-steps", type=int, default=16, help="calls of 16 requests before anything is measured"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="three times as many in mixed batches")
    parser.add_argument("--vllm", action="store_true", help="vLLM's own methods too (`make setup-vllm`)")
    parser.add_argument("--keep", action="store_true", help="keep the cells of the output file that are not measured")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "controller_cpu.json")
    return parser.parse_args()


def planned(args: argparse.Namespace) -> list[Cell]:
    shapes = [(batch, "even") for batch in args.batches] + ([] if args.no_mixed else [(16, "mixed")])
    return [
        Cell(policy, batch, temperature, kind, args.max_new_tokens * (3 if kind == "mixed" else 1))
        for policy, temperature, (batch, kind) in itertools.product(args.policies, args.temperatures, shapes)
    ]


# ------------------------------------------------------------------------------------------------------------------ arms


def speculator(name: str) -> Speculator:
    made: dict[str, Callable[[], Speculator]] = {
        "ngram": NgramSpeculator,
        "history": HistorySpeculator,
        "recurrent": RecurrentSpeculator,
        "eagle3": lambda: Eagle3Speculator(EAGLE3),
    }
    return made[name]()


@dataclass(frozen=True, slots=True)
class Start:
    """Initial state of every arm of every cell: after some calls over other prompts, with a refresh after each.

    Attributes:
        speculators: States of the speculators, by name.
        controller: The controller that learned in these calls; copy it, do not use it.
    """

    speculators: dict[str, Any]
    controller: GoodputController


def warm_start(model: Any, tokenizer: Any, policy: str, args: argparse.Namespace) -> Start:
    """The first steps of a run of this policy."""
    # The shipped head was trained for the warm policy; with the raw policy it would be an unrealistic arm.
    names = ("history", "recurrent", "eagle3") if policy == "warm" else ("history", "recurrent")
    controller = GoodputController(names)
    engine = AtlasRolloutEngine(
        model=model,
        tokenizer=tokenizer,
        speculators=[head_of_a_run() if name == "recurrent" else speculator(name) for name in names],
        controller=controller,
        console=False,
    )
    for step in range(args.warm_up_steps):
        prompts = tokenized(tokenizer, demo_tasks.build_dataset("train", 4, seed=10_000 + step)["prompt"])
        engine.generate(prompts, num_generations=4, max_new_tokens=args.max_new_tokens, seed=10_000 + step)
        engine.policy_updated()
    return Start(engine.state_dict(), controller)


def engines_of(
    model: Any, tokenizer: Any, turns: Turns, start: Start, lookaheads: list[int]
) -> dict[str, AtlasRolloutEngine]:
    """One engine per arm, `controller` last, with every speculator in its state after the warm-up."""
    state = start.speculators
    arms = {"off": engine_in_turns(model, tokenizer, turns, [])}
    for name in ("ngram", *state):
        for lookahead in lookaheads if name in state else [5]:
            controller = FixedController([name], name, lookahead)
            engine = engine_in_turns(model, tokenizer, turns, [speculator(name)], controller)
            engine.load_state_dict({name: state[name]} if name in state else {})
            arms[f"{name}_k{lookahead}" if name in state else name] = engine
    own = copy.deepcopy(start.controller)
    arms["controller"] = engine_in_turns(model, tokenizer, turns, [speculator(name) for name in state], own)
    arms["controller"].load_state_dict(state)
    return arms


# --------------------------------------------------------------------------------------------------------------- measure


def measure(cell: Cell, model: Any, tokenizer: Any, start: Start, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every arm of one cell."""
    turns = Turns()
    engines = engines_of(model, tokenizer, turns, start, args.lookaheads)
    arms = arms_of(cell, cell.max_new_tokens, engines, model, tokenizer, turns)
    prompts = [cell_prompts(cell, tokenizer, seed=repeat) for repeat in range(args.repeats)]
    # A first call that is not counted, shorter and over its own prompts: for compilation, allocation, caches, what the
    # controller needs to learn about a new batch size, and how long each arm takes.
    # In a run the batch size is the same for hundreds of calls, so the controller first gets a whole call.
    alone = {"controller": arms["controller"]}
    run_in_turns(turns, alone, cell_prompts(cell, tokenizer, seed=21_000), 21_000, {"controller": 1.0})
    short = arms_of(cell, cell.max_new_tokens // 4, engines, model, tokenizer, turns)
    runs = [run_in_turns(turns, short, cell_prompts(cell, tokenizer, seed=20_000), 20_000, dict.fromkeys(arms, 1.0))]
    traces: dict[str, InTurns] = {name: engine.config.controller for name, engine in engines.items()}  # type: ignore[misc]
    for trace in traces.values():
        trace.trace.clear()
    for repeat, batch in enumerate(prompts):
        runs.append(run_in_turns(turns, arms, batch, seed_of(cell, repeat), seconds_of(runs[-1])))
    speed = {name: [run[name].value[0] / run[name].seconds for run in runs[1:]] for name in arms}
    reports = {name: [run[name].value[1] for run in runs[1:]] for name in arms}
    settings = {key: getattr(args, key) for key in ("repeats", "warm_up_steps", "max_new_tokens")}
    rows = [row(cell, name, speed, reports[name], settings) for name in arms]
    first = runs[1]["controller"].value[1].num_forwards
    next(entry for entry in rows if entry["arm"] == "controller")["drain"] = drain(traces["controller"].trace[:first])
    fixed = [name for name in engines if name != "controller"]
    best = max(fixed, key=lambda name: float(np.median(ratios(speed[name], speed["off"]))))
    rows.append(
        row(cell, "hindsight", speed | {"hindsight": speed[best]}, reports[best], settings) | {"fixed_arm": best}
    )
    with tempfile.TemporaryDirectory(prefix="atlas_rl_controller_") as folder:
        record(cell, model, tokenizer, prompts, Path(folder))
        costs = Costs.of(itertools.chain.from_iterable(trace.trace for trace in traces.values()))
        ready = {name: partial(speculator, name) for name in start.speculators}
        rows.append(
            oracle_rows(cell, Path(folder), ready, start.speculators, costs, max(args.lookaheads), speed, reports)
        )
    print_cell(cell, rows)
    return rows


def arms_of(
    cell: Cell, max_new_tokens: int, engines: dict[str, AtlasRolloutEngine], model: Any, tokenizer: Any, turns: Turns
) -> dict[str, Arm]:
    """Every arm's generation call, TRL's last."""
    group, temperature = group_of(cell), cell.temperature
    arms = {name: engine_arm(engine, group, max_new_tokens, temperature) for name, engine in engines.items()}
    return arms | {"trl_transformers": trl_arm(shell(model), tokenizer, group, turns, max_new_tokens, temperature)}


def record(cell: Cell, model: Any, tokenizer: Any, prompts: list[Any], folder: Path) -> None:
    """The cell's rollouts with their hidden states, for the oracle."""
    recorder = RecordingSpeculator(folder, LAYERS)
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculators=[recorder], console=False)
    for repeat, batch in enumerate(prompts):
        engine_arm(engine, group_of(cell), cell.max_new_tokens, cell.temperature)(batch, seed_of(cell, repeat))
        engine.policy_updated()


def drain(steps: list[dict[str, Any]]) -> list[list[float]]:
    """One call, step by step: active requests, and verified draft tokens and committed tokens per request."""
    return [
        [
            step["batch"],
            round(sum(step["admitted"].values()) / step["batch"], 3),
            round(step["tokens"] / step["batch"], 3),
        ]
        for step in steps
    ]


if __name__ == "__main__":
    main()
