"""Print a result as a Markdown table: of `benchmarks.rollout` for the README, of `benchmarks.controller` for its page.

python -m benchmarks.table benchmarks/results/rollout_cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    cells = json.loads(Path(sys.argv[1]).read_text())["cells"]
    for line in controller(cells) if "kind" in cells[0] else rollout(cells):
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


def controller(cells: list[dict[str, Any]]) -> list[str]:
    """A row per cell; everything but the first speed as a ratio to no speculation."""
    peers = {"TRL": "trl_transformers", "vLLM": "vllm", "vLLM ngram": "vllm_ngram", "prompt lookup": "ngram"}
    lines = [
        f"| policy | T | batch | off, tokens/s | {' | '.join(peers)} | best fixed arm | controller | of best fixed | oracle "
        "| accepted length | calibration error |",
        "|" + "---|" * (9 + len(peers)),
    ]
    keys = dict.fromkeys((c["policy"], c["temperature"], c["kind"], c["batch"]) for c in cells)
    for key in keys:
        arm = {c["arm"]: c for c in cells if (c["policy"], c["temperature"], c["kind"], c["batch"]) == key}
        ratio = {name: f"{cell['ratio_to_off']['median']:.2f}" for name, cell in arm.items()}
        chosen, best = arm["controller"], arm["hindsight"]
        share = chosen["tokens_per_s"]["median"] / best["tokens_per_s"]["median"]
        errors = ", ".join(f"{name} {error:.2f}" for name, error in (chosen["calibration_error"] or {}).items())
        policy, temperature, kind, batch = key
        lines.append(
            f"| {policy} | {temperature:g} | {batch}{' mixed' if kind == 'mixed' else ''} "
            f"| {arm['off']['tokens_per_s']['median']:.0f} | {' | '.join(ratio.get(name, '-') for name in peers.values())} "
            f"| {ratio['hindsight']} ({best['fixed_arm']}) | {ratio['controller']} | {share:.2f} | {ratio['oracle']} "
            f"| {chosen['accepted_length']:.2f} | {errors or '-'} |"
        )
    return lines


if __name__ == "__main__":
    main()
