"""Measures rollout throughput with and without speculation and of TRL's own transformers generation, in one run.

    python -m benchmarks.rollout                      # every cell; about 20 minutes on 2 cores
    python -m benchmarks.rollout --policies warm --batches 8 --repeats 5

Every repeat takes prompts that no arm has seen, the same for all three arms, which decode in turns, a step each, so that
they meet the same machine (`benchmarks/interleave.py`). The speculating engine has generated some batches of *other* prompts
before, a refresh after each, as it has after the first steps of a training run, and lives through all cells of a policy; no
prompt is repeated to it but by the group, so this is the first epoch, where history helps least.
Tokens/s count generated tokens of all requests over the seconds of one generation call that were its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.controller.base import Controller
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.common import environment, quantiles, write_result
from benchmarks.interleave import InTurns, Outcome, Turns, shell

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "grpo_demo"))

import policy as demo_policy  # noqa: E402
import tasks as demo_tasks  # noqa: E402

ARMS = ("trl_transformers", "atlas_off", "atlas_on")
GENERATIONS = 4
STEP_PER_ROLLOUTS = (
    3.3  # seconds of a training step divided by those of its rollouts: examples/grpo_demo on 2 cores, 90 steps
)
Arm = Callable[[list[list[int]], int], tuple[int, Any]]  # prompts and a seed in; generated tokens and the report out


def main() -> None:
    args = parse_args()
    cells = kept_cells(args)
    for name in args.policies:
        model, tokenizer = demo_policy.load_policy(warm=name == "warm")
        model = model.to(args.device, getattr(torch, args.dtype))
        turns = Turns()
        engines = warmed_engines(model, tokenizer, turns, args)
        for batch in progress.each(args.batches, f"batch sizes, {name}", "cell"):
            cells += measure_cell(name, batch, model, tokenizer, engines, turns, args)
            write_result(args.output, {**environment(), "cells": cells})
    print(f"written: {args.output}")


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["warm", "raw"], choices=["warm", "raw"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up-steps", type=int, default=16, help="batches of 16 before anything is measured")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--keep", action="store_true", help="keep the cells of the output file that are not measured")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    result = f"rollout_{'gpu' if on_gpu else 'cpu'}.json"
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / result)
    return parser.parse_args()


def kept_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """With `--keep`, cells of an earlier run that this one does not measure again."""
    if not args.keep or not args.output.exists():
        return []
    earlier = json.loads(args.output.read_text())
    return [
        {"commit": earlier["commit"], "settings": earlier.get("settings"), **cell}
        for cell in earlier["cells"]
        if not (cell["policy"] in args.policies and cell["batch"] in args.batches)
    ]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("repeats", "warm_up_steps", "max_new_tokens", "device", "dtype")
    return {"temperature": 1.0, "generations": GENERATIONS, **{key: getattr(args, key) for key in keys}}


def engine_in_turns(
    model: Any, tokenizer: Any, turns: Turns, speculators: list[Speculator], controller: Controller | None = None
) -> AtlasRolloutEngine:
    """An engine that lets others run before each of its steps; `controller` None is the default controller."""
    chosen = controller or GoodputController([speculator.name for speculator in speculators])
    return AtlasRolloutEngine(
        model=shell(model),
        tokenizer=tokenizer,
        speculators=speculators,
        controller=InTurns(chosen, turns),
        clock=turns.clock,
        console=False,
    )


def head_of_a_run() -> RecurrentSpeculator:
    """A recurrent head whose refreshes take as long as they may in training.

    They get a share of the time between refreshes, which is rollouts alone here and includes the update in a GRPO run.
    """
    return RecurrentSpeculator(budget_share=0.05 * STEP_PER_ROLLOUTS)


def warmed_engines(model: Any, tokenizer: Any, turns: Turns, args: argparse.Namespace) -> dict[str, AtlasRolloutEngine]:
    """One engine per arm for all batch sizes, as in a run; the speculating one has already run some steps."""
    engines = {
        "atlas_off": engine_in_turns(model, tokenizer, turns, []),
        "atlas_on": engine_in_turns(model, tokenizer, turns, [HistorySpeculator(), head_of_a_run()]),
    }
    for step, prompts in enumerate(unseen_prompts(tokenizer, 4, args.warm_up_steps, seed=10_000)):
        engines["atlas_on"].generate(prompts, num_generations=4, max_new_tokens=args.max_new_tokens, seed=10_000 + step)
        engines["atlas_on"].policy_updated()
    return engines


def measure_cell(
    name: str,
    batch: int,
    model: Any,
    tokenizer: Any,
    engines: dict[str, AtlasRolloutEngine],
    turns: Turns,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The three arms of one policy and batch size."""
    group = min(GENERATIONS, batch)
    prompts = unseen_prompts(tokenizer, batch // group, args.repeats, seed=batch)
    arms = {arm: engine_arm(engine, group, args.max_new_tokens) for arm, engine in engines.items()}
    arms["trl_transformers"] = trl_arm(shell(model), tokenizer, group, turns, args.max_new_tokens)
    # For compilation, allocation and caches. It uses its own prompts and seed: drafts would come from memory for
    # rollouts that the history has seen, or that share noise with them.
    other = unseen_prompts(tokenizer, batch // group, 1, seed=20_000 + batch)[0]
    runs = [run_in_turns(turns, arms, other, 20_000 + batch, dict.fromkeys(arms, 1.0))]
    for repeat, batch_prompts in enumerate(prompts):
        runs.append(run_in_turns(turns, arms, batch_prompts, 100 * batch + repeat, seconds_of(runs[-1])))
    speed = {arm: [run[arm].value[0] / run[arm].seconds for run in runs[1:]] for arm in ARMS}
    reports = {arm: [run[arm].value[1] for run in runs[1:]] for arm in ARMS}
    progress.say(
        f"{name:>4} batch {batch:>2} | "
        + " | ".join(f"{arm} {quantiles(speed[arm])['median']:7.1f} tok/s" for arm in ARMS)
        + f" | on/off {quantiles(ratios(speed['atlas_on'], speed['atlas_off']))['median']:.3f}"
        + f" | accepted length {mean(reports['atlas_on'], 'accepted_length'):.2f}"
    )
    return [
        {
            "policy": name,
            "batch": batch,
            "arm": arm,
            "tokens_per_s": quantiles(speed[arm]),
            "ratio_to_trl": quantiles(ratios(speed[arm], speed["trl_transformers"])),
            "ratio_to_off": quantiles(ratios(speed[arm], speed["atlas_off"])),
            "accepted_length": mean(reports[arm], "accepted_length") if arm in engines else 1.0,
            # TRL reports no entropy; it samples the same policy on the same prompts as `atlas_off`.
            "entropy": mean(reports[arm if arm in engines else "atlas_off"], "entropy"),
            "seconds": breakdown(reports[arm]) if arm in engines else None,
            "settings": settings(args),
        }
        for arm in ARMS
    ]


def run_in_turns(
    turns: Turns, arms: dict[str, Arm], prompts: list[list[int]], seed: int, expected_s: dict[str, float]
) -> dict[str, Outcome]:
    """Run all arms over the same prompts; returns generated tokens and the report, None for TRL."""
    return turns.run({name: partial(arm, prompts, seed) for name, arm in arms.items()}, expected_s)


def seconds_of(outcomes: dict[str, Outcome]) -> dict[str, float]:
    return {name: outcome.seconds for name, outcome in outcomes.items()}


def unseen_prompts(tokenizer: Any, num_prompts: int, repeats: int, seed: int) -> list[list[list[int]]]:
    """`repeats` batches of `num_prompts` different prompts as token ids."""
    rows = demo_tasks.build_dataset("train", num_prompts * repeats, seed=seed)["prompt"]
    ids = [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    return [ids[i * num_prompts : (i + 1) * num_prompts] for i in range(repeats)]


def engine_arm(engine: AtlasRolloutEngine, group: int, max_new_tokens: int, temperature: float = 1.0) -> Arm:
    def run(prompts: list[list[int]], seed: int) -> tuple[int, Any]:
        output = engine.generate(
            prompts, num_generations=group, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return output.report.num_tokens, output.report

    return run


def trl_arm(model: Any, tokenizer: Any, group: int, turns: Turns, max_new_tokens: int, temperature: float = 1.0) -> Arm:
    """TRL's own generation: the method that GRPOTrainer calls when nothing is attached."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir="runs/benchmark",
        max_completion_length=max_new_tokens,
        num_generations=max(group, 2),
        per_device_train_batch_size=max(group, 2),
        report_to="none",
        bf16=False,
        use_cpu=model.device.type == "cpu",
        temperature=temperature or 1.0,
        generation_kwargs={} if temperature else {"do_sample": False},
        beta=0.0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "unused"}] * 4),
        processing_class=tokenizer,
    )
    model.register_forward_pre_hook(lambda *_: turns.pass_on())

    def run(prompts: list[list[int]], seed: int) -> tuple[int, Any]:
        torch.manual_seed(seed)
        rows = [prompt for prompt in prompts for _ in range(group)]
        completion_ids, _ = trainer._generate_single_turn(rows, None, {}, group)
        return sum(len(row) for row in completion_ids), None

    return run


def ratios(values: list[float], base: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, base, strict=True)]


def mean(reports: list[Any], field: str) -> float:
    """Mean over tokens of a per-token figure."""
    total = sum(report.num_tokens for report in reports)
    return sum(getattr(report, field) * report.num_tokens for report in reports) / total


def breakdown(reports: list[Any]) -> dict[str, float]:
    """Seconds per phase, summed over the repeats."""
    names = ("prefill", "draft", "forward", "sample", "commit", "controller", "observe", "other")
    return {name: round(sum(getattr(report, f"{name}_s") for report in reports), 4) for name in names}


if __name__ == "__main__":
    main()
