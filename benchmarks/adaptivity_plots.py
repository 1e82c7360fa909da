"""Plots a result of `benchmarks.adaptivity`: accepted length per training step, one picture per scenario.

python -m benchmarks.adaptivity_plots benchmarks/results/adaptivity_cpu.json docs/images
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import result_and_folder

WINDOW = 3
LABELS = {
    "all": "all drafters",
    "recurrent": "recurrent, from a saved state",
    "recurrent_cold": "recurrent, from nothing",
    "recurrent_frozen": "recurrent, frozen after step 5",
    "history": "history index",
    "eagle3": "EAGLE-3 (static)",
    "eagle3_adaptive": "EAGLE-3 (adaptive)",
}


def main() -> None:
    result, folder = result_and_folder(__doc__)
    runs = result["runs"]
    for scenario in sorted({run["scenario"] for run in runs}):
        draw(scenario, [run for run in runs if run["scenario"] == scenario], folder / f"adaptivity_{scenario}.png")


def draw(scenario: str, runs: list[dict[str, Any]], path: Path) -> None:
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1])
    for arm, label in LABELS.items():
        curves = [run["accepted_length_per_step"] for run in runs if run["arm"] == arm]
        if curves:
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            (line,) = upper.plot(smoothed(mean), label=label)
            upper.plot(mean, "o", markersize=2, alpha=0.4, color=line.get_color())
    for at in runs[0]["shifts"]:
        for axes in (upper, lower):
            axes.axvline(at - 0.5, color="gray", linestyle="--", linewidth=0.8)
    seeds = sorted({run["seed"] for run in runs})
    upper.set(ylabel=f"accepted length, {runs[0]['lookahead']} drafts", ylim=(1, None))
    upper.set_title(f"{scenario}: mean of {len(seeds)} seed(s), lines average {WINDOW} steps", fontsize=10)
    upper.legend(fontsize=8, ncol=2)
    upper.grid(alpha=0.3)
    one_arm = [run for run in runs if run["arm"] == runs[0]["arm"]]
    for name, label in (("reward_per_step", "reward"), ("entropy_per_step", "entropy, nats")):
        mean = [statistics.fmean(values) for values in zip(*(run[name] for run in one_arm), strict=True)]
        lower.plot(smoothed(mean), label=label)
    lower.set(xlabel="training step", ylim=(0, None))
    lower.legend(fontsize=8)
    lower.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def smoothed(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    main()
