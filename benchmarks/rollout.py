"""Rollout throughput: ours with and without speculation, and TRL's own transformers generation, in one run.

    python -m benchmarks.rollout                      # every cell; about 20 minutes on 2 cores
    python -m benchmarks.rollout --policies warm --batches 8 --repeats 5

Every repeat takes prompts that no arm has seen, the same for all three arms, which run one after the other in changing
order. The speculating engine has generated a few batches of *other* prompts before, as it has after the first steps of a
training run, and lives through all cells of a policy; no prompt is ever repeated to it but by the group, so this is the
first epoch, where history helps least.
Tokens/s count generated tokens of all requests over the wall-clock of one generation call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atlas_rl import AtlasRolloutEngine
from benchmarks.common import environment, quantiles, write_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "grpo_demo"))

import policy as demo_policy  # noqa: E402
import tasks as demo_tasks  # noqa: E402

ARMS = ("trl_transformers", "atlas_off", "atlas_on")
GENERATIONS = 4


def main() -> None:
    args = parse_args()
    cells = kept_cells(args)
    for name in args.policies:
        model, tokenizer = demo_policy.load_policy(warm=name == "warm")
        model = model.to(args.device, getattr(torch, args.dtype))
        engines = warmed_engines(model, tokenizer, args)
        for batch in args.batches:
            cells += measure_cell(name, batch, model, tokenizer, engines, args)
            write_result(args.output, {**environment(), "cells": cells})
    print(f"written: {args.output}")


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["warm", "raw"], choices=["warm", "raw"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up-steps", type=int, default=4, help="batches of 16 before anything is measured")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--keep", action="store_true", help="keep the cells of the output file that are not measured")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    result = f"rollout_{'gpu' if on_gpu else 'cpu'}.json"
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / result)
    return parser.parse_args()


def kept_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """With `--keep`, the cells of an earlier run that this one does not measure anew."""
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


def warmed_engines(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, AtlasRolloutEngine]:
    """One engine per arm for all batch sizes, as a run has one; the speculating one has seen its first steps."""
    engines = {
        "atlas_off": AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculation=False, console=False),
        "atlas_on": AtlasRolloutEngine(model=model, tokenizer=tokenizer, console=False),
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
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The three arms of one policy and batch size."""
    group = min(GENERATIONS, batch)
    prompts = unseen_prompts(tokenizer, batch // group, args.repeats, seed=batch)
    arms = {arm: engine_arm(engine, group, args) for arm, engine in engines.items()}
    arms["trl_transformers"] = trl_arm(model, tokenizer, group, args)
    # Compilation, allocation, caches. With prompts and a seed of its own: rollouts that the history has seen, or that share
    # their noise with some it has seen, would be drafted from memory.
    other = unseen_prompts(tokenizer, 1, 1, seed=20_000 + batch)[0]
    for arm in arms.values():
        arm(other, 20_000 + batch)
    speed: dict[str, list[float]] = {arm: [] for arm in ARMS}
    reports: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for repeat, batch_prompts in enumerate(prompts):
        for arm in rotated(ARMS, repeat):
            num_tokens, seconds, report = arms[arm](batch_prompts, 100 * batch + repeat)
            speed[arm].append(num_tokens / seconds)
            reports[arm].append(report)
    print(
        f"{name:>4} batch {batch:>2} | "
        + " | ".join(f"{arm} {quantiles(speed[arm])['median']:7.1f} tok/s" for arm in ARMS)
        + f" | accepted length {mean(reports['atlas_on'], 'accepted_length'):.2f}",
        flush=True,
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


def unseen_prompts(tokenizer: Any, num_prompts: int, repeats: int, seed: int) -> list[list[list[int]]]:
    """`repeats` batches of `num_prompts` different prompts as token ids."""
    rows = demo_tasks.build_dataset("train", num_prompts * repeats, seed=seed)["prompt"]
    ids = [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    return [ids[i * num_prompts : (i + 1) * num_prompts] for i in range(repeats)]


def engine_arm(engine: AtlasRolloutEngine, group: int, args: argparse.Namespace) -> Callable[..., Any]:
    def run(prompts: list[list[int]], seed: int) -> tuple[int, float, Any]:
        began = time.perf_counter()
        output = engine.generate(prompts, num_generations=group, max_new_tokens=args.max_new_tokens, seed=seed)
        return output.report.num_tokens, time.perf_counter() - began, output.report

    return run


def trl_arm(
    model: Any, tokenizer: Any, group: int, args: argparse.Namespace, temperature: float = 1.0
) -> Callable[..., Any]:
    """TRL's own generation: the method that GRPOTrainer calls when nothing is attached."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir="runs/benchmark",
        max_completion_length=args.max_new_tokens,
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

    def run(prompts: list[list[int]], seed: int) -> tuple[int, float, Any]:
        torch.manual_seed(seed)
        rows = [prompt for prompt in prompts for _ in range(group)]
        began = time.perf_counter()
        completion_ids, _ = trainer._generate_single_turn(rows, None, {}, group)
        return sum(len(row) for row in completion_ids), time.perf_counter() - began, None

    return run


def rotated(items: tuple[str, ...], by: int) -> tuple[str, ...]:
    """Another order for every repeat, forwards and backwards in turn: no arm always follows the same other one."""
    ordered = items if by % 2 == 0 else items[::-1]
    shift = by // 2 % len(items)
    return ordered[shift:] + ordered[:shift]


def ratios(values: list[float], base: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, base, strict=True)]


def mean(reports: list[Any], field: str) -> float:
    """Mean over tokens for what is per token."""
    total = sum(report.num_tokens for report in reports)
    return sum(getattr(report, field) * report.num_tokens for report in reports) / total


def breakdown(reports: list[Any]) -> dict[str, float]:
    """Seconds per phase, summed over the repeats."""
    names = ("prefill", "draft", "verify", "sample", "commit", "controller", "observe", "other")
    return {name: round(sum(getattr(report, f"{name}_s") for report in reports), 4) for name in names}


if __name__ == "__main__":
    main()
