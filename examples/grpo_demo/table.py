"""The demo's closing tables: rollouts on and off by epoch and active batch, TRL's, and predictions for GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.drafters import drafter_model
from atlas_rl.planner.hardware import Machine, gpu_named
from atlas_rl.planner.host import TYPICAL
from atlas_rl.planner.model import parse_model
from atlas_rl.planner.speculation import Setting
from atlas_rl.report.sinks import read_jsonl

BATCHES = ((1, 1), (2, 3), (4, 5), (6, 8), (9, 16), (17, 1 << 30))  # active requests that share a row of the table
PREDICTED = (("Qwen3-8B", "h100"), ("Qwen3-8B", "b200"), ("Llama-3.3-70B", "b200"))
CONTEXT = 4096  # tokens per request in the predictions


def summarize_rollouts(reports: Sequence[Any], trace: Path, steps_per_epoch: int) -> dict[str, Any]:
    """Sum up training reports over the run, by epoch and by active batch; speeds are in tokens per second."""
    reports = [report for report in reports if report.mode == "train"]
    num_epochs = math.ceil((max(report.step for report in reports) + 1) / steps_per_epoch)
    epochs = [[report for report in reports if report.step // steps_per_epoch == e] for e in range(num_epochs)]
    figures = compared(reports) | {
        "generations": len(reports),
        "num_tokens": sum(report.num_tokens for report in reports),
        "generate_s": sum(report.generate_s for report in reports),
        "accepted_length": ratio(reports, "num_decoded_tokens", "num_request_forwards"),
        "draft_tokens": sum(sum(report.drafted.values()) for report in reports)
        / max(1, sum(report.num_request_forwards for report in reports)),
        "entropy": _weighted_mean(reports, "entropy"),
        "epochs": [compared(epoch) for epoch in epochs if epoch],
        "batches": by_batch(read_jsonl(trace) if trace.exists() else []),
    }
    return figures | {"predictions": predictions(figures["accepted_length"], figures["draft_tokens"])}


def compared(reports: Sequence[Any]) -> dict[str, Any]:
    """Speeds on and off over generations that were repeated without speculation, with equal tokens on both sides.

    `estimate_error` compares the estimate with those reruns, over the generations that have one.
    """
    paired = [report for report in reports if report.baseline_tokens_per_s]
    both = [report for report in paired if report.no_speculation_s]
    tokens = sum(report.num_tokens for report in paired)
    on_s, off_s = sum(report.generate_s for report in paired), sum(map(_measured_s, paired))
    return {
        "paired_generations": len(paired),
        "paired_tokens": tokens,
        "on_tokens_per_s": tokens / on_s if paired else None,
        "off_tokens_per_s": tokens / off_s if paired else None,
        "speedup": off_s / on_s if paired else None,
        "accepted_length": ratio(reports, "num_decoded_tokens", "num_request_forwards"),
        "estimated_generations": len(both),
        "estimate_error": sum(r.no_speculation_s for r in both) / sum(map(_measured_s, both)) - 1 if both else None,
    }


def by_batch(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speeds of decode steps on and off, from the controller's trace, by the number of requests that were active."""
    found, most = [], max((row["batch"] for row in rows), default=0)
    for low, high in BATCHES:
        last = min(high, most)
        row: dict[str, Any] = {"batch": f"{low}" if low == last else f"{low} to {last}"}
        for name, speculation in (("on", True), ("off", False)):
            steps = [r for r in rows if r["speculation"] is speculation and low <= r["batch"] <= high]
            row[f"{name}_steps"] = len(steps)
            seconds = sum(r["step_s"] for r in steps)
            row[f"{name}_tokens_per_s"] = sum(r["tokens"] for r in steps) / seconds if steps else None
        if row["on_steps"] and row["off_steps"]:
            found.append(row | {"speedup": row["on_tokens_per_s"] / row["off_tokens_per_s"]})
    return found


def predictions(accepted_length: float, draft_tokens: float) -> list[dict[str, Any]]:
    """Predictions of `atlas-rl plan` for GPUs, with this run's committed and drafted tokens per forward."""
    k = max(1, math.ceil(draft_tokens))
    found = []
    for name, gpu in PREDICTED:
        model = parse_model(CONFIGS[name])
        num_gpus = 1 if "8B" in name else 2
        machine = Machine(gpu=gpu_named(gpu), num_gpus=num_gpus)
        drafter = drafter_model("recurrent", model)
        setting = Setting(model=model, machine=machine, drafter=drafter, context=CONTEXT, host=TYPICAL)
        speedups = {batch: setting.speedup(batch, k, accepted_length) for batch in (8, 64)}
        found.append({"model": name, "gpu": gpu, "num_gpus": num_gpus, "draft_tokens": k, "speedup_by_batch": speedups})
    return found


def print_table(summary: dict[str, Any]) -> None:
    """Print the closing tables."""
    rollouts = summary.get("rollouts")
    print()
    if rollouts:
        _print_rollouts(rollouts)
        _print_batches(rollouts["batches"])
        _print_peer(summary["trl"])
        _print_predictions(rollouts["predictions"])
    window = summary["reward_window_steps"]
    print(f"{f'mean reward, first {window} steps':<46}{summary['reward_first']:>10.3f}")
    print(f"{f'mean reward, last {window} steps':<46}{summary['reward_last']:>10.3f}")
    before, after = summary["held_out_reward_before_after"]
    if before is not None and after is not None:
        print(f"{'held-out reward, before':<46}{before:>10.3f}")
        print(f"{'held-out reward, after':<46}{after:>10.3f}")
    print(f"{'training seconds':<46}{summary['train_s']:>10.1f}")


def _print_rollouts(rollouts: dict[str, Any]) -> None:
    print(
        f"{'rollouts, measured (tokens/s)':<38}{'on':>8}{'off':>8}{'on/off':>8}{'accepted':>10}{'estimate of off':>17}"
    )
    rows = [(f"epoch {number}", epoch) for number, epoch in enumerate(rollouts["epochs"], start=1)]
    for label, row in [*rows, (f"whole run, {rollouts['paired_generations']} generations", rollouts)]:
        error = row["estimate_error"]
        print(
            f"{label:<38}{_number(row['on_tokens_per_s'], '.1f'):>8}{_number(row['off_tokens_per_s'], '.1f'):>8}"
            f"{_number(row['speedup'], '.2f'):>8}{row['accepted_length']:>10.2f}"
            f"{'not shown' if error is None else f'{error:+.1%} off':>17}"
        )
    print(f"{'entropy of the policy, nats per token':<46}{_number(rollouts['entropy'], '.3f'):>10}")
    print(f"{'tokens generated, seconds':<46}{rollouts['num_tokens']:>10}{rollouts['generate_s']:>8.1f}\n")


def _print_batches(batches: Sequence[dict[str, Any]]) -> None:
    if batches:
        print(f"{'decode steps by active requests':<38}{'on':>8}{'off':>8}{'on/off':>8}{'steps on':>10}{'off':>8}")
    for row in batches:
        print(
            f"{row['batch']:<38}{row['on_tokens_per_s']:>8.1f}{row['off_tokens_per_s']:>8.1f}{row['speedup']:>8.2f}"
            f"{row['on_steps']:>10}{row['off_steps']:>8}"
        )
    print()


def _print_peer(rows: Sequence[dict[str, Any]]) -> None:
    """Print TRL's own generation over the prompts and tokens of some steps, beside ours."""
    if not rows:
        return
    tokens = sum(row["num_tokens"] for row in rows)
    speeds = {name: tokens / sum(row[f"{name}_s"] for row in rows) for name in ("on", "off", "trl")}
    print(f"{'same prompts and tokens (tokens/s)':<38}{'on':>8}{'off':>8}{'TRL':>8}{'on/TRL':>10}{'off/TRL':>8}")
    print(
        f"{f'{len(rows)} generations, {tokens} tokens':<38}{speeds['on']:>8.1f}{speeds['off']:>8.1f}{speeds['trl']:>8.1f}"
        f"{speeds['on'] / speeds['trl']:>10.2f}{speeds['off'] / speeds['trl']:>8.2f}\n"
    )


def _print_predictions(rows: Sequence[dict[str, Any]]) -> None:
    """Print the predictions and their settings."""
    print(
        f"PREDICTED by atlas-rl plan, not measured: this accepted length with {rows[0]['draft_tokens']} drafts per request"
    )
    print(
        f"and forward by a recurrent head, context {CONTEXT}, BF16, and the host of a typical engine (docs/planner.md)."
    )
    for row in rows:
        speedups = ", ".join(f"{speedup:.2f}x at batch {batch}" for batch, speedup in row["speedup_by_batch"].items())
        print(f"  {row['model']} on {row['num_gpus']} {row['gpu'].upper()}: {speedups}")
    print()


def ratio(reports: Sequence[Any], above: str, below: str) -> float:
    """Sum of a figure divided by the sum of another."""
    return sum(getattr(r, above) for r in reports) / max(1, sum(getattr(r, below) for r in reports))


def _measured_s(report: Any) -> float:
    return report.num_tokens / report.baseline_tokens_per_s


def _weighted_mean(reports: Sequence[Any], name: str) -> float | None:
    """Mean of a report's figure weighted by tokens; None if no report has it."""
    rows = [(getattr(r, name), r.num_tokens) for r in reports if getattr(r, name) is not None]
    weight = sum(tokens for _, tokens in rows)
    return sum(value * tokens for value, tokens in rows) / weight if weight else None


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
