"""Plots a result of `benchmarks.controller`: speed against the batch, and the choices while a batch drained.

python -m benchmarks.controller_plots benchmarks/results/controller_cpu.json docs/images
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import result_and_folder

LABELS = {
    "controller": "controller",
    "hindsight": "best fixed arm, in hindsight",
    "oracle": "oracle",
    "ngram": "prompt lookup",
    "trl_transformers": "TRL, transformers generation",
    "vllm": "vLLM",
    "vllm_ngram": "vLLM, ngram",
    "vllm_suffix": "vLLM, suffix",
}


def main() -> None:
    result, folder = result_and_folder(__doc__)
    cells = result["cells"]
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        here = [c for c in cells if c["policy"] == policy and c["temperature"] == 1.0]
        if len({c["batch"] for c in here if c["kind"] == "even"}) > 1:
            speed(here, policy, folder / f"controller_{policy}.png")
    drained = [c for c in cells if c.get("drain") and c["temperature"] == 1.0 and c["policy"] == "warm"]
    if drained:
        mixed = [c for c in drained if c["kind"] == "mixed"]
        drain((mixed or sorted(drained, key=lambda c: c["batch"]))[-1], folder / "controller_drain.png")


def speed(cells: list[dict[str, Any]], policy: str, path: Path) -> None:
    """Ratio to no speculation against the batch, a line per arm."""
    figure, axes = plt.subplots(figsize=(8.5, 4))
    even = sorted((c for c in cells if c["kind"] == "even"), key=lambda c: c["batch"])
    batches = sorted({c["batch"] for c in even})
    for arm, label in LABELS.items():
        found = {c["batch"]: c["ratio_to_off"]["median"] for c in even if c["arm"] == arm}
        if found:
            heavy = 2.5 if arm == "controller" else 1.2
            axes.plot(list(found), list(found.values()), "o-", markersize=4, linewidth=heavy, label=label)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="requests decoded together", ylabel="tokens/s over no speculation", title=f"{policy} policy")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    finish(figure, path)


def drain(cell: dict[str, Any], path: Path) -> None:
    """Active requests, draft length and committed tokens per request, step by step."""
    batch, drafted, committed = zip(*cell["drain"], strict=True)
    steps = range(len(batch))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot(steps, drafted, "-", linewidth=0.8, alpha=0.7, label="draft tokens verified per request")
    axes.plot(steps, committed, "-", linewidth=0.8, alpha=0.7, label="tokens committed per request")
    axes.set(xlabel="decode step", ylabel="tokens per request and step")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.fill_between(steps, batch, step="post", alpha=0.15, color="gray", label="active requests")
    right.set_ylabel("active requests")
    right.set_ylim(bottom=0)
    left, shade = axes.get_legend_handles_labels(), right.get_legend_handles_labels()
    axes.legend(
        left[0] + shade[0], left[1] + shade[1], fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3
    )
    axes.grid(alpha=0.3)
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
