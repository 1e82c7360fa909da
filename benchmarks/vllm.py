"""Measures rollouts in vLLM on the same prompts: plain, its own speculative methods, and ours, in one process.

    python -m benchmarks.vllm                             # every batch size; about an hour on 2 cores
    python -m benchmarks.vllm --batches 1 8 --repeats 1 --max-new-tokens 32 --eager --output runs/vllm_smoke.json

Every repeat takes prompts that no arm has seen, the same for all arms. The arms run in turns, an engine step each
(`benchmarks/interleave.py`), so that all meet the same machine. Ours has generated a few batches before, as in
`benchmarks.rollout`. vLLM's own methods run with its CPU sampler repaired: a wrong engine is not compared. `vllm_suffix`
needs the package arctic-inference and is left out where that cannot be built. Tokens/s count generated tokens over the
seconds of one `generate` call that were its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB per engine
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.vllm import internals
from atlas_rl.vllm.backend import in_this_process, llm_arguments
from benchmarks.common import ROOT, environment, quantiles, saved, write_result
from benchmarks.interleave import Outcome, Turns
from benchmarks.rollout import demo_policy, head_of_a_run, ratios, seconds_of, unseen_prompts

HEAD = ROOT / "examples" / "grpo_demo" / "eagle3"
GENERATIONS = 4
Arm = Callable[[list[list[int]], int, int], tuple[int, float]]  # prompts, group, seed: tokens, accepted length


def main() -> None:
    args = parse_args()
    model, tokenizer = demo_policy.load_policy(warm=args.policy == "warm")
    turns = Turns()
    arms = build_arms(saved(args.policy, model, tokenizer), tokenizer, turns, args)
    cells: list[dict[str, Any]] = []
    for batch in progress.each(args.batches, "batch sizes", "cell"):
        cells += measure_cell(batch, arms, tokenizer, turns, args)
        payload = {"settings": settings(args), "left_out": left_out(), "cells": cells}
        write_result(args.output, {**environment(), "vllm": internals.check_version(), **payload})
    print(f"written: {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="warm", choices=["warm", "raw"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up-steps", type=int, default=16, help="batches of 16 before anything is measured")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--lookahead", type=int, default=5, help="draft tokens of vLLM's own methods")
    parser.add_argument("--eager", action="store_true", help="compile nothing: minutes less, for a look")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_cpu.json")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("policy", "repeats", "warm_up_steps", "max_new_tokens", "lookahead", "eager")
    return {"temperature": 1.0, "generations": GENERATIONS, **{key: getattr(args, key) for key in keys}}


def left_out() -> dict[str, str]:
    """Arms that cannot run on this machine, and why."""
    if importlib.util.find_spec("arctic_inference") is None:
        return {"vllm_suffix": "arctic-inference is not installed: it has no wheel, and does not build everywhere"}
    return {}


def build_arms(folder: str, tokenizer: Any, turns: Turns, args: argparse.Namespace) -> dict[str, Arm]:
    internals.repair_cpu_sampler()
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": args.lookahead,
        "prompt_lookup_max": 5,
        "prompt_lookup_min": 2,
    }
    methods: dict[str, dict[str, Any] | None] = {"vllm": None, "vllm_ngram": ngram}
    if "vllm_suffix" not in left_out():
        methods["vllm_suffix"] = {"method": "suffix", "num_speculative_tokens": args.lookahead}
    methods["vllm_eagle3"] = {"method": "eagle3", "model": str(HEAD), "num_speculative_tokens": 3}
    arms = {arm: vllm_arm(new_llm(folder, turns, args, **of_method(method)), args) for arm, method in methods.items()}
    llm = new_llm(folder, turns, args, logprobs_mode="processed_logprobs", **llm_arguments(HEAD))
    speculators = [HistorySpeculator(), head_of_a_run(), Eagle3Speculator(HEAD)]
    engine = AtlasRolloutEngine(
        model=llm, tokenizer=tokenizer, speculators=speculators, clock=turns.clock, console=False
    )
    for step, prompts in enumerate(unseen_prompts(tokenizer, 4, args.warm_up_steps, seed=10_000)):
        engine.generate(prompts, num_generations=4, max_new_tokens=args.max_new_tokens, seed=10_000 + step)
        engine.policy_updated()
    return arms | {"atlas_vllm": atlas_arm(engine, args)}


def of_method(method: dict[str, Any] | None) -> dict[str, Any]:
    return {"speculative_config": method, "per_request_spec_decode_metrics": "summary"} if method else {}


def new_llm(folder: str, turns: Turns, args: argparse.Namespace, **arguments: Any) -> Any:
    """A vLLM engine that lets others run before each of its steps."""
    with in_this_process():
        from vllm import LLM

        sizes = {"max_model_len": 1024, "max_num_seqs": 64}
        llm = LLM(model=folder, dtype="float32", enforce_eager=args.eager, **sizes, **arguments)
    own_step = llm.llm_engine.step

    def step() -> Any:
        turns.pass_on()
        return own_step()

    llm.llm_engine.step = step
    return llm


def vllm_arm(llm: Any, args: argparse.Namespace) -> Arm:
    from vllm import SamplingParams

    def run(prompts: list[list[int]], group: int, seed: int) -> tuple[int, float]:
        # No seed per request: vLLM would then draw row by row.
        sampling = SamplingParams(
            n=group, temperature=1.0, max_tokens=args.max_new_tokens, logprobs=0, detokenize=False
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        samples = [sample for output in outputs for sample in output.outputs]
        num_tokens = sum(len(sample.token_ids) for sample in samples)
        # `get_metrics()` is unsuitable: the counters of a process are those of its newest engine.
        counts = [sample.spec_decode_metrics.histogram for sample in samples if sample.spec_decode_metrics is not None]
        accepted = sum(length * count for histogram in counts for length, count in enumerate(histogram))
        # Every forward of a request commits one token plus the accepted ones; the first token comes from the prompt.
        decoded = num_tokens - len(prompts) * group
        return num_tokens, decoded / max(1, decoded - accepted)

    return run


def atlas_arm(engine: AtlasRolloutEngine, args: argparse.Namespace) -> Arm:
    def run(prompts: list[list[int]], group: int, seed: int) -> tuple[int, float]:
        report = engine.generate(prompts, num_generations=group, max_new_tokens=args.max_new_tokens, seed=seed).report
        return report.num_tokens, report.accepted_length

    return run


def measure_cell(
    batch: int, arms: dict[str, Arm], tokenizer: Any, turns: Turns, args: argparse.Namespace
) -> list[dict[str, Any]]:
    group = min(GENERATIONS, batch)

    def run_all(prompts: list[list[int]], seed: int, expected_s: dict[str, float]) -> dict[str, Outcome]:
        return turns.run({name: partial(arm, prompts, group, seed) for name, arm in arms.items()}, expected_s)

    # For compilation, caches, what the controller needs to learn about a new batch size, and how long each arm takes.
    other = unseen_prompts(tokenizer, batch // group, 1, seed=20_000 + batch)[0]
    runs = [run_all(other, 20_000 + batch, dict.fromkeys(arms, 1.0))]
    for repeat, prompts in enumerate(unseen_prompts(tokenizer, batch // group, args.repeats, seed=batch)):
        runs.append(run_all(prompts, 100 * batch + repeat, seconds_of(runs[-1])))
    speed = {name: [run[name].value[0] / run[name].seconds for run in runs[1:]] for name in arms}
    lengths = {name: [run[name].value[1] for run in runs[1:]] for name in arms}
    own = [name for name in arms if name != "atlas_vllm"]
    best = max(own, key=lambda name: quantiles(speed[name])["median"])
    progress.say(f"batch {batch:>2} | " + " | ".join(f"{a} {quantiles(s)['median']:.1f}" for a, s in speed.items()))
    return [
        {
            "batch": batch,
            "arm": name,
            "tokens_per_s": quantiles(speed[name]),
            "ratio_to_vllm": quantiles(ratios(speed[name], speed["vllm"])),
            "ratio_to_best_of_vllm": quantiles(ratios(speed[name], speed[best])),
            "accepted_length": quantiles(lengths[name]),
        }
        for name in arms
    ]


if __name__ == "__main__":
    main()
