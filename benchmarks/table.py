"""Prints a result as a Markdown table, for the README or the docs page of its benchmark.

python -m benchmarks.table benchmarks/results/rollout_cpu.json
"""

from __future__ import annotations

import argparse
import json
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a file of benchmarks/results/")
    result = json.loads(parser.parse_args().result.read_text())
    tables = {
        "runs": adaptivity,
        "steps": floor,
        "operations": cpu_kernels,
        "cells": controller if "kind" in result.get("cells", [{}])[0] else vllm if "vllm" in result else rollout,
    }
    for line in next(make(result[key]) for key, make in tables.items() if key in result):
        print(line)


def rollout(cells: list[dict[str, Any]]) -> list[str]:
    """A row per policy and batch."""
    lines = [
        "| policy | entropy | batch | TRL tokens/s | off tokens/s | on tokens/s | off / TRL | on / off | accepted length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for policy in ("warm", "raw"):
        for batch in sorted({cell["batch"] for cell in cells if cell["policy"] == policy}):
            arm = {c["arm"]: c for c in cells if (c["policy"], c["batch"]) == (policy, batch)}
            speeds = " | ".join(
                f"{arm[name]['tokens_per_s']['median']:.0f}" for name in ("trl_transformers", "atlas_off", "atlas_on")
            )
            lines.append(
                f"| {policy} | {arm['atlas_on']['entropy']:.2f} | {batch} | {speeds} "
                f"| {arm['atlas_off']['ratio_to_trl']['median']:.2f} | {arm['atlas_on']['ratio_to_off']['median']:.2f} "
                f"| {arm['atlas_on']['accepted_length']:.2f} |"
            )
    return lines


def cpu_kernels(operations: list[dict[str, Any]]) -> list[str]:
    """A row per operation and number of rows: median milliseconds of 30 layers."""
    lines = ["| operation | rows | tokens | median ms of each form |", "|---|---|---|---|"]
    for each in operations:
        tokens = each.get("tokens", [])
        ragged = "ragged, " if len(set(tokens)) > 1 else ""
        forms = ", ".join(f"{name} {took['median']:.1f}" for name, took in each["ms"].items())
        name = each.get("layers", each["operation"])
        lines.append(f"| {name} | {each['batch']} | {ragged}{sum(tokens) or each['batch']} | {forms} |")
    return lines


def vllm(cells: list[dict[str, Any]]) -> list[str]:
    """A row per batch: tokens/s, and ours as a ratio to vLLM."""
    arms = dict.fromkeys(cell["arm"] for cell in cells)
    lines = [
        f"| batch | {' | '.join(arms)} | ours / plain | ours / best of vLLM | accepted length |",
        "|" + "---|" * (4 + len(arms)),
    ]
    for batch in sorted({cell["batch"] for cell in cells}):
        arm = {cell["arm"]: cell for cell in cells if cell["batch"] == batch}
        speeds = " | ".join(f"{arm[name]['tokens_per_s']['median']:.0f}" for name in arms)
        ours = arm["atlas_vllm"]
        lines.append(
            f"| {batch} | {speeds} | {ours['ratio_to_vllm']['median']:.2f} "
            f"| {ours['ratio_to_best_of_vllm']['median']:.2f} | {ours['accepted_length']['median']:.2f} |"
        )
    return lines


def controller(cells: list[dict[str, Any]]) -> list[str]:
    """A row per cell; everything but the first speed as a ratio to no speculation."""
    peers = {"TRL": "trl_transformers", "vLLM": "vllm", "vLLM ngram": "vllm_ngram", "prompt lookup": "ngram"}
    lines = [
        f"| policy | T | batch | off, tokens/s | {' | '.join(peers)} | best fixed arm | controller | of best fixed | oracle "
        "| accepted length | calibration error |",
        "|" + "---|" * (10 + len(peers)),
    ]
    keys = {(c["policy"], c["temperature"], c["kind"], c["batch"]) for c in cells}
    for key in sorted(keys, key=lambda key: (key[0] == "raw", -key[1], key[2], key[3])):
        arm = {c["arm"]: c for c in cells if (c["policy"], c["temperature"], c["kind"], c["batch"]) == key}
        ratio = {name: f"{cell['ratio_to_off']['median']:.2f}" for name, cell in arm.items()}
        chosen, best = arm["controller"], arm["hindsight"]
        share = median(map(truediv, chosen["repeats_tokens_per_s"], best["repeats_tokens_per_s"]))
        errors = ", ".join(f"{name} {error:.2f}" for name, error in (chosen["calibration_error"] or {}).items())
        policy, temperature, kind, batch = key
        lines.append(
            f"| {policy} | {temperature:g} | {batch}{' mixed' if kind == 'mixed' else ''} "
            f"| {arm['off']['tokens_per_s']['median']:.0f} | {' | '.join(ratio.get(name, '-') for name in peers.values())} "
            f"| {ratio['hindsight']} ({best['fixed_arm']}) | {ratio['controller']} | {share:.2f} | {ratio['oracle']} "
            f"| {chosen['accepted_length']:.2f} | {errors or '-'} |"
        )
    return lines


def floor(steps: list[dict[str, Any]]) -> list[str]:
    """A row per batch size."""
    kinds = ("linear", "attention", "layout", "rest")
    lines = [
        "| batch | step, ms | floor, ms | ratio | GB/s | GFLOP/s | outside of the forward | of the operators: "
        + " | ".join(kinds)
        + " |",
        "|" + "---|" * (7 + len(kinds)),
    ]
    for step in steps:
        shares = " | ".join(f"{step['forward_shares'][kind]:.0%}" for kind in kinds)
        # Recordings made before December 2026 call the phase `verify`.
        forward = step["shares"].get("forward", step["shares"].get("verify"))
        lines.append(
            f"| {step['batch']} | {step['step_ms']['median']:.0f} | {step['floor_ms']:.0f} | {step['ratio_to_floor']:.2f} "
            f"| {step['sustained_bytes_per_s'] / 1e9:.1f} | {step['sustained_flops_per_s'] / 1e9:.0f} "
            f"| {1 - forward:.1%} | {shares} |"
        )
    return lines


def adaptivity(runs: list[dict[str, Any]]) -> list[str]:
    """A row per scenario and arm, means over the seeds; for `shift` also the remaining level after each change."""
    lines = []
    for scenario in dict.fromkeys(run["scenario"] for run in runs):
        shifts = [run["shifts"] for run in runs if run["scenario"] == scenario and run["shifts"]]
        after = "".join(f" steps {at + 1}-{at + 3} over the three before |" for at in (shifts[0] if shifts else []))
        lines += [f"| {scenario} | seeds | steps 1-5 | last 5 steps | mean |{after} refreshes, share of step time |"]
        lines += ["|" + "---|" * (6 + after.count("|"))]
        for arm in dict.fromkeys(run["arm"] for run in runs if run["scenario"] == scenario):
            own = [run for run in runs if (run["scenario"], run["arm"]) == (scenario, arm)]
            steps = [fmean(column) for column in zip(*(run["accepted_length_per_step"] for run in own), strict=True)]
            spread = [fmean(run["accepted_length_per_step"][-5:]) for run in own]
            ends = f" ({min(spread):.2f} to {max(spread):.2f})" if len(own) > 1 else ""
            back = "".join(
                f" {' '.join(f'{steps[at + i] / fmean(steps[at - 3 : at]):.2f}' for i in range(3))} |"
                for at in (shifts[0] if shifts else [])
            )
            share = fmean(run["refresh_share"] for run in own)
            levels = f"{fmean(steps[:5]):.2f} | {fmean(steps[-5:]):.2f}{ends} | {fmean(steps):.2f}"
            lines.append(f"| {arm} | {len(own)} | {levels} |{back} {share:.1%} |")
        lines.append("")
    return lines


if __name__ == "__main__":
    main()
