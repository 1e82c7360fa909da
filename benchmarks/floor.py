"""Breaks down a plain decode step's time, beside the least time that the machine allows.

    python -m benchmarks.floor                       # the warm policy at batch 1 to 32; two minutes on 2 cores
    python -m benchmarks.table benchmarks/results/floor_cpu.json

The floor of a step is what its bytes and operations take at the rates that the machine sustains, both measured beside every
batch size: reading all weights of the policy's linear layers once (bytes/s), and multiplying large square matrices
(operations/s). A step reads every weight once, writes and reads the logits, reads the cache; it multiplies every weight by
one row per request. The two overlap at best, so the floor is the larger one. Time comes from the engine's own report; the
forward is split by operator with torch's profiler, over a call of its own, less a call that runs the prompts alone. In these
calls no layer runs as one kernel, so the shares are those of a slower forward.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from atlas_kernels import layer
from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.policy import flat_layers, group_products, linear_routes, ragged_attention, short_rows, whole_layers
from atlas_rl.report.report import PHASES
from benchmarks.common import ROOT, environment, quantiles, write_result
from benchmarks.rollout import demo_policy, unseen_prompts

KINDS = {
    "linear": ("aten::mm", "aten::addmm", "aten::mv", "aten::bmm", "aten::linear", "mkldnn::_linear", "few_rows"),
    "attention": ("attend_rows", "aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "layout": ("aten::copy_", "aten::contiguous", "aten::clone", "aten::cat", "aten::index", "aten::index_put_"),
}
KERNELS = (
    (short_rows, "attend_rows"),
    (ragged_attention, "attend_rows"),
    (linear_routes, "few_rows_linear"),
    (group_products, "few_rows_linear"),
    (flat_layers, "rms_norm_cpu"),
    (flat_layers, "add_and_norm"),
    (flat_layers, "rotate_in_place"),
    (layer, "rms_norm_cpu"),
    (layer, "rotate_cpu"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "floor_cpu.json")
    args = parser.parse_args()
    model, tokenizer = demo_policy.load_policy(warm=True)
    engine = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculation=False, console=False)
    rows = []
    for batch in progress.each(args.batches, "batch sizes", "cell"):
        rows.append(measure(engine, model, tokenizer, batch, args))
        progress.say(rows[-1])
        write_result(args.output, {**environment(), "steps": rows})
    print(f"written: {args.output}")


def measure(
    engine: AtlasRolloutEngine, model: Any, tokenizer: Any, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Steps of one batch size: without ending tokens, every request runs to `max_new_tokens`."""
    prompts = unseen_prompts(tokenizer, max(1, batch // 4), args.repeats + 1, seed=batch)

    def generate(call: int, max_new_tokens: int = args.max_new_tokens) -> Any:
        return engine.generate(
            prompts[call],
            num_generations=min(4, batch),
            max_new_tokens=max_new_tokens,
            eos_token_ids=[0],
            seed=call,
        ).report

    generate(args.repeats)
    reports, bytes_per_s, flops_per_s = [], [], []
    for call in range(args.repeats):
        bytes_per_s.append(stream_rate(model))
        flops_per_s.append(multiply_rate())
        reports.append(generate(call))
    num_tokens = float(np.mean([report.num_decoded_tokens / report.num_forwards for report in reports]))
    context = float(np.mean([report.num_prompt_tokens / len(prompts[0]) / min(4, batch) for report in reports]))
    moved = step_bytes(model, num_tokens, num_tokens * (context + args.max_new_tokens / 2))
    multiplied = 2 * num_tokens * sum(p.numel() for p in linear_weights(model))
    floor_s = float(max(moved / max(bytes_per_s), multiplied / max(flops_per_s)))
    step_s = [(report.generate_s - report.prefill_s) / report.num_forwards for report in reports]
    return {
        "batch": batch,
        "step_ms": {name: 1e3 * value for name, value in quantiles(step_s).items()},
        "floor_ms": 1e3 * floor_s,
        "ratio_to_floor": float(np.median(step_s)) / floor_s,
        "moved_bytes": moved,
        "multiplied_flops": multiplied,
        "sustained_bytes_per_s": max(bytes_per_s),
        "sustained_flops_per_s": max(flops_per_s),
        "shares": phase_shares(reports),
        "forward_shares": operator_shares(lambda: generate(0), lambda: generate(0, 1)),
    }


def linear_weights(model: Any) -> list[torch.Tensor]:
    """Weights that every decoded token is multiplied by, including a tied LM head."""
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


def step_bytes(model: Any, num_tokens: float, context_tokens: float) -> float:
    """Least bytes of a step: weights and cache read, logits written and read once."""
    config, element = model.config, 4
    weights = sum(weight.numel() for weight in linear_weights(model)) * element
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * dim * element * context_tokens
    return weights + cache + 2 * num_tokens * config.vocab_size * element


def stream_rate(model: Any) -> float:
    """Bytes/s of reading the weights of a step once, in its order: the best of several tries."""
    weights = [weight.detach() for weight in linear_weights(model)]
    return sum(weight.nbytes for weight in weights) / best_s(lambda: [weight.sum() for weight in weights], 8)


def multiply_rate() -> float:
    """Floating-point operations/s of a large square product: the best of several tries."""
    size = 1536
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best_s(lambda: left @ right, 4)


def best_s(call: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def phase_shares(reports: list[Any]) -> dict[str, float]:
    """Shares of the time after the prefill, by verb of the loop."""
    names = [phase for phase in (*PHASES, "other") if phase not in ("prefill", "refresh", "sync")]
    seconds = {name: sum(getattr(report, f"{name}_s") for report in reports) for name in names}
    return {name: round(s / sum(seconds.values()), 4) for name, s in seconds.items() if s}


def operator_shares(call: Callable[[], Any], prefill: Callable[[], Any]) -> dict[str, float]:
    """Shares of the operators' time in the decode steps of a generation call, by kind."""
    own_us = operator_us(call)
    own_us.subtract(operator_us(prefill))
    total = sum(own_us.values())
    shares = {
        kind: sum(us for key, us in own_us.items() if key.startswith(keys)) / total for kind, keys in KINDS.items()
    }
    return {kind: round(share, 4) for kind, share in (shares | {"rest": 1 - sum(shares.values())}).items()}


def operator_us(call: Callable[[], Any]) -> Counter[str]:
    """Microseconds of each operator, without those that it calls."""
    with (
        by_parts(),
        named_kernels(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        call()
    return Counter({event.key: event.self_cpu_time_total for event in profile.key_averages()})


@contextmanager
def by_parts() -> Iterator[None]:
    """Context in which layers run operation by operation."""
    with mock.patch.object(whole_layers.WholeLayer, "run", lambda layer, x, cos, sin, parts: parts()):
        yield


@contextmanager
def named_kernels() -> Iterator[None]:
    """Context in which torch's profiler sees compiled kernels, which are no operators of torch."""

    def recorded(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with torch.profiler.record_function(name):
                return own(*args, **options)

        return run

    with ExitStack() as stack:
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, recorded(name, getattr(module, name))))
        yield


if __name__ == "__main__":
    main()
