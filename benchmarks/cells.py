"""The cells of `benchmarks.controller`: settings to measure, and the result row of an arm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_rl import progress
from benchmarks.common import quantiles
from benchmarks.rollout import GENERATIONS, breakdown, demo_tasks, mean, ratios

SHORT, LONG = "products", "leg_counting"  # task families of the mixed batch


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting; `kind` is `even` or `mixed`."""

    policy: str
    batch: int
    temperature: float
    kind: str
    max_new_tokens: int

    def __str__(self) -> str:
        return f"{self.policy} T={self.temperature:g} batch {self.batch}{' mixed' if self.kind == 'mixed' else ''}"

    @property
    def names(self) -> dict[str, Any]:
        """Fields that identify its rows."""
        return {"policy": self.policy, "batch": self.batch, "temperature": self.temperature, "kind": self.kind}


def kept_rows(output: Path, cells: list[Cell]) -> list[dict[str, Any]]:
    """Rows of an earlier run for other cells."""
    if not output.exists():
        return []
    earlier = json.loads(output.read_text())
    anew = [cell.names for cell in cells]
    rows = [row for row in earlier["cells"] if {key: row[key] for key in anew[0]} not in anew]
    return [{"commit": earlier["commit"], "dirty": earlier["dirty"], **row} for row in rows]


def group_of(cell: Cell) -> int:
    return min(GENERATIONS, cell.batch)


def seed_of(cell: Cell, repeat: int) -> int:
    return 1000 * cell.batch + 100 * (cell.kind == "mixed") + repeat


def tokenized(tokenizer: Any, rows: list[Any]) -> list[list[int]]:
    template = tokenizer.apply_chat_template
    return [template(row, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"] for row in rows]


def cell_prompts(cell: Cell, tokenizer: Any, seed: int) -> list[list[int]]:
    """The unique prompts of one repeat; no two cells or repeats share any."""
    seed = 100 * cell.batch + seed
    if cell.kind == "mixed":
        short = demo_tasks.build_dataset("train", 3, seed + 50, [SHORT])["prompt"]
        return tokenized(tokenizer, [*short, *demo_tasks.build_dataset("train", 1, seed + 50, [LONG])["prompt"]])
    return tokenized(tokenizer, demo_tasks.build_dataset("train", cell.batch // group_of(cell), seed)["prompt"])


def row(
    cell: Cell, arm: str, speed: dict[str, list[float]], reports: list[Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """One arm's figures; an arm without reports (TRL) has speeds only."""
    ours = reports and reports[0] is not None
    return {
        **cell.names,
        "arm": arm,
        "tokens_per_s": quantiles(speed[arm]),
        "repeats_tokens_per_s": [round(value, 2) for value in speed[arm]],  # one per repeat: same prompts, same minutes
        "ratio_to_off": quantiles(ratios(speed[arm], speed["off"])),
        "accepted_length": mean(reports, "accepted_length") if ours else 1.0,
        "entropy": mean(reports, "entropy") if ours else None,
        "drafted": added(reports, "drafted") if ours else None,
        "accepted": added(reports, "accepted") if ours else None,
        "calibration_error": last(reports, "calibration_error") if ours else None,
        "seconds": breakdown(reports) if ours else None,
        "settings": settings,
    }


def added(reports: list[Any], field: str) -> dict[str, int]:
    names = dict.fromkeys(name for report in reports for name in getattr(report, field))
    return {name: sum(getattr(report, field).get(name, 0) for report in reports) for name in names}


def last(reports: list[Any], field: str) -> dict[str, float]:
    return {name: round(value, 4) for name, value in getattr(reports[-1], field).items()}


def print_cell(cell: Cell, rows: list[dict[str, Any]]) -> None:
    progress.say(f"\n{cell}")
    for entry in sorted(rows, key=lambda r: -r["tokens_per_s"]["median"]):
        note = f"  ({entry['fixed_arm']})" if "fixed_arm" in entry else ""
        speed, ratio = entry["tokens_per_s"]["median"], entry["ratio_to_off"]["median"]
        progress.say(
            f"  {entry['arm']:>16} {speed:7.1f} tok/s  {ratio:.2f}x of off  {entry['accepted_length']:.2f} accepted{note}"
        )
