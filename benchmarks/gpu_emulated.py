"""Counts the host's work in a decode step on a GPU without a GPU: waits, uploads, launches, compilations.

    python -m benchmarks.gpu_emulated               # three minutes on one core; benchmarks/results/gpu_emulated.json

A tiny policy in bfloat16 decodes on a pretended CUDA device (tests/pretend_cuda): six requests, three draft tokens each in
every step. Nothing is timed. Counts are of the whole step of a policy of two layers. Waits and uploads do not grow with
layers; launches of a forward do, so `launches_beside_target_per_step` is what the library adds to the target's own forward.
The policy's probe and the FP4 copy of new weights, once per policy and once per update, are left out. Budgets are held by
`tests/gpu/test_budgets.py`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any import of triton

from atlas_rl import progress
from benchmarks.common import ROOT, environment, write_result
from tests.gpu.counts import counts_of
from tests.gpu.engines import ARMS, DEPTH, PROMPTS, SAMPLINGS

PATHS: dict[str, dict[str, Any]] = {
    **{sampling: {"verification": "invariant", **options} for sampling, options in SAMPLINGS.items()},
    "rejection": {"verification": "rejection", **SAMPLINGS["sampled"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_emulated.json")
    args = parser.parse_args()
    origin = environment()  # as of the first counted step
    rows = []
    for arm in args.arms:
        for path, options in progress.each(PATHS.items(), arm, "path"):
            rows.append(row(arm, path, options))
            progress.say(rows[-1])
    settings = {"policy": "2 layers, bfloat16", "prompts": len(PROMPTS), "num_generations": 2, "draft_tokens": DEPTH}
    print(f"written: {write_result(args.output, origin | {'settings': settings, 'rows': rows})}")


def row(arm: str, path: str, options: dict[str, Any]) -> dict[str, Any]:
    counts = counts_of(arm, **options)
    return {
        "path": f"{arm}, {path}",
        "waits_per_step": round(counts.waits, 2),
        "uploads_per_step": round(counts.uploads, 2),
        "launches_per_step": round(counts.launches, 1),
        "launches_beside_target_per_step": round(counts.beside, 1),
        "builds_per_step": round(counts.builds, 2),
    }


if __name__ == "__main__":
    main()
