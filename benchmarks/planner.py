"""Compares the planner's predictions with published measurements and with our own on a CPU.

python -m benchmarks.planner
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.hardware import MEASURED, Efficiency, Gpu, Machine
from atlas_rl.planner.host import ENGINES, NO_HOST, Host
from atlas_rl.planner.model import ModelShape, parse_model
from atlas_rl.planner.published import TRTLLM, published_rows
from atlas_rl.planner.roofline import Precision, forward
from atlas_rl.planner.speculation import Setting
from benchmarks.common import ROOT, environment, write_result

RESULTS = ROOT / "benchmarks" / "results"
CONTEXT = 128  # about half of prompt and completion in `benchmarks.rollout`
POLICY = "SmolLM2-135M"
FP32 = Precision(mlp="fp32", attention="fp32", cache="fp32")
# A CPU core has no kernels to launch; the two calibrated rates include the efficiency of its caches and cores.
NO_OVERHEAD = Efficiency(bandwidth_share=1.0, flops_share=1.0, kernel_s=0.0, all_reduce_s=0.0)
# Grid of the host terms: up to 10 ms per round and 1 ms per request.
GRID_ROUND_S, GRID_REQUEST_S = 1e-4 * np.arange(101), 5e-6 * np.arange(201)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "planner.json")
    args = parser.parse_args()
    rows = table()
    payload = environment() | {
        "efficiency": asdict(MEASURED),
        "hosts": {engine: asdict(host) for engine, host in ENGINES.items()},
        "hosts_fitted": {engine: asdict(host) for engine, host in fitted_hosts().items()},
        "rows": rows,
        "error": {
            "held_out": errors([row for row in rows if row["held_out"]]),
            "held_out, MTP as speedups": errors([row for row in mtp_as_speedups(rows) if row["held_out"]]),
            "calibrating": errors([row for row in rows if not row["held_out"]]),
        },
        "own_cpu": own_cpu(json.loads((RESULTS / "rollout_cpu.json").read_text(encoding="utf-8"))),
    }
    print(markdown(rows))
    print(markdown(payload["own_cpu"]["rows"]))
    for part, error in payload["error"].items():
        print(f"{part}: " + ", ".join(f"{name} {value:.3g}" for name, value in error.items()))
    print(f"written: {write_result(args.output, payload)}")


def table() -> list[dict[str, Any]]:
    """Every published row with its prediction; `ratio` is predicted / published."""
    rows = []
    for row in published_rows():
        predicted, device = row.predicted(), row.predicted(NO_HOST)
        rows.append(
            {
                "source": row.source,
                "setting": row.describe(),
                "engine": row.engine,
                "held_out": row.is_held_out,
                "quantity": row.quantity,
                "published": row.published,
                "predicted": predicted,
                "ratio": predicted / row.published,
                "ratio_without_host": device / row.published,
                "assumed": row.assumed,
            }
        )
    return rows


def errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median |log(predicted / published)|, with and without the engines' host terms."""
    median, alone = (
        float(np.median([abs(math.log(row[key])) for row in rows])) for key in ("ratio", "ratio_without_host")
    )
    return {"num_rows": len(rows), "median": median, "median_without_host": alone}


def mtp_as_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with MTP relative to their publication's row without, so that a uniformly slow device cancels out."""
    plain = next(row for row in rows if row["source"] == TRTLLM and "no speculation" in row["setting"])
    keys = ("ratio", "ratio_without_host")
    return [row | {key: row[key] / plain[key] for key in keys} if "mtp" in row["setting"] else row for row in rows]


def fitted_hosts() -> dict[str, Host]:
    """By engine, the host term on a grid with the least mean |log(predicted / published)| over its calibration rows."""
    rows = [row for row in published_rows() if not row.is_held_out and row.drafter is not None]
    fitted = {}
    for engine in dict.fromkeys(row.engine for row in rows):
        off = np.zeros((len(GRID_ROUND_S), len(GRID_REQUEST_S)))
        own = [row for row in rows if row.engine == engine]
        for row in own:
            setting = replace(row.setting, host=NO_HOST)
            host_s = GRID_ROUND_S[:, None] + GRID_REQUEST_S * row.batch
            round_s, plain_s = setting.round_s(row.batch, row.draft_tokens), setting.round_s(row.batch, 0)
            off += np.abs(np.log(row.accepted * plain_s / (round_s + host_s) / row.published)) / len(own)
        of_round, of_request = np.unravel_index(off.argmin(), off.shape)
        fitted[engine] = Host(round_s=float(GRID_ROUND_S[of_round]), request_s=float(GRID_REQUEST_S[of_request]))
    return fitted


def own_cpu(measured: dict[str, Any]) -> dict[str, Any]:
    """Predicts `benchmarks.rollout` on a CPU: two rates are fitted to two plain cells, every other cell is predicted.

    The rates are bytes per second at the smallest batch and operations per second at the largest, for the warm policy
    without speculation. These two rows are nearly exact by construction, and marked.
    """
    model = parse_model(CONFIGS[POLICY])
    cells = {(c["policy"], c["batch"], c["arm"]): c for c in measured["cells"]}
    batches = sorted({batch for _, batch, _ in cells})
    step_s = {b: b / cells["warm", b, "atlas_off"]["tokens_per_s"]["median"] for b in batches}
    unit = forward(model, FP32, _cpu(1.0, 1.0), batch=batches[0], context=CONTEXT)
    bandwidth = unit.num_bytes / step_s[batches[0]]
    flops = forward(model, FP32, _cpu(1.0, 1.0), batch=batches[-1], context=CONTEXT).flops / step_s[batches[-1]]
    machine = _cpu(bandwidth, flops)
    rows = []
    for (policy, batch, arm), cell in sorted(cells.items()):
        if arm == "trl_transformers":
            continue
        rows.append(_cpu_row(model, machine, policy, batch, cell, calibrated=(policy, arm) == ("warm", "atlas_off")
                             and batch in (batches[0], batches[-1])))  # fmt: skip
    return {
        "measured": "benchmarks/results/rollout_cpu.json",
        "bandwidth_bytes_per_s": bandwidth,
        "flops_per_s": flops,
        "rows": rows,
    }


def _cpu(bandwidth_bytes_per_s: float, flops_per_s: float) -> Machine:
    gpu = Gpu(
        name="cpu",
        memory_bytes=1.0,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        flops_per_s={"fp32": flops_per_s},
        link_bytes_per_s=1.0,
        source="calibrated on benchmarks/results/rollout_cpu.json",
    )
    return Machine(gpu=gpu, efficiency=NO_OVERHEAD)


def _cpu_row(
    model: ModelShape, machine: Machine, policy: str, batch: int, cell: dict[str, Any], calibrated: bool
) -> dict[str, Any]:
    # The controller's draft lengths vary and are not in the file. They are replaced by the shortest uniform draft that
    # could give the measured accepted length: the least that can have been verified.
    setting = Setting(model=model, machine=machine, precision=FP32, context=CONTEXT)
    accepted = cell["accepted_length"]
    draft_tokens = math.ceil(round(accepted - 1, 3))
    on = cell["arm"] == "atlas_on"
    if on:
        published, predicted = cell["ratio_to_off"]["median"], setting.speedup(batch, draft_tokens, accepted)
    else:
        published, predicted = cell["tokens_per_s"]["median"], setting.tokens_per_s(batch, 0, 1.0)
    return {
        "source": "calibrated" if calibrated else "predicted",
        "setting": f"{policy}, batch {batch}, {'speculation' if on else 'no speculation'}",
        "quantity": "speedup" if on else "tokens/s",
        "batch": batch,
        "draft_tokens": draft_tokens,
        "accepted_length": accepted,
        "published": published,
        "predicted": predicted,
        "ratio": predicted / published,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the docs."""
    lines = ["| setting | quantity | published | predicted | ratio | source |", "|---|---|---|---|---|---|"]
    for row in rows:
        source = row["source"]
        if source.startswith("https://"):
            url, _, rest = source.partition(" ")
            url, rest = url.rstrip(":"), rest or ""
            source = f"[{url.split('/')[2]}]({url})" + (f" {rest}" if rest else "")
        decimals = 2 if row["published"] < 10 else 0
        lines.append(
            f"| {row['setting']} | {row['quantity']} | {row['published']:.{decimals}f} "
            f"| {row['predicted']:.{decimals}f} | {row['ratio']:.2f} | {source} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
