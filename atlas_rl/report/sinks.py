"""Shows reports: as a console line, in a JSONL file, in the trainer's own log."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from atlas_rl.report.lost_writes import check_folder
from atlas_rl.report.report import ORIGIN, PHASES, StepReport

CONSOLE_WIDTH = 140
REPORTS_FILE = "rollouts.jsonl"
_MAX_NAMED = 10  # most line numbers in one warning


def console_line(report: StepReport) -> str:
    """The report as one line of at most 140 columns; figures that do not fit are dropped from the end."""
    head = f"atlas {'step' if report.mode == 'train' else report.mode} {report.step}"
    parts = [head, f"{report.tokens_per_s:.0f} tok/s"]
    if not report.speculation:
        parts.append("speculation off")
    else:
        if report.speedup_measured is not None:
            parts.append(f"{report.speedup_measured:.2f}x of no speculation (measured)")
        elif report.speedup_estimate is not None:
            parts.append(f"{report.speedup_estimate:.2f}x of no speculation (est.)")
        parts.append(f"accepted length {report.accepted_length:.2f}")
        parts.append(" ".join(f"{name} {report.accepted[name]}/{n}" for name, n in report.drafted.items()))
    if report.entropy is not None:
        parts.append(f"H {report.entropy:.2f} nats")
    parts.append(f"{report.num_tokens} tok in {report.generate_s:.1f} s")
    if report.audit_z is not None:
        parts.append(f"audit z {report.audit_z:+.1f}")
    if report.warnings:
        parts.insert(1, f"{len(report.warnings)} warning{'s' if len(report.warnings) > 1 else ''}")
    while len(" | ".join(parts)) > CONSOLE_WIDTH and len(parts) > 2:
        parts.pop()
    return " | ".join(parts)[:CONSOLE_WIDTH]


def console_warnings(report: StepReport) -> list[str]:
    """One line per warning, never shortened, for printing below the console line."""
    return [f"atlas warning: {message}" for message in report.warnings]


METRICS = {
    "tokens_per_s": "tokens_per_s",
    "us_per_token": "us_per_token",
    "accepted_length": "accepted_length",
    "acceptance_rate": "acceptance_rate",
    "speedup_estimate": "speedup_estimate",
    "speedup_measured": "speedup_measured",
    "baseline_tokens_per_s": "baseline_tokens_per_s",
    "no_speculation_tokens_per_s": "no_speculation_tokens_per_s",
    "entropy": "entropy",
    "mean_max_prob": "mean_max_prob",
    "generation_share": "generation_share",
    "amdahl_bound": "amdahl_bound",
    "policy_version": "policy_version",
    "num_tokens": "num_tokens",
    "num_forwards": "num_forwards",
    "audit/num_tokens": "num_audited_tokens",
    "audit/z": "audit_z",
    "audit/evidence_nats": "audit_evidence_nats",
    "audit/logprob_error_nats": "audit_logprob_error_nats",
    "warnings": "warnings",
    **{f"time/{phase}_s": f"{phase}_s" for phase in ("generate", *PHASES, "other")},
}
"""Names in the trainer's log, without `atlas/`, and the figure of a report that each shows; of `warnings` the number."""

METRIC_FAMILIES = {
    "acceptance_at": "acceptance_by_position",
    "drafted": "drafted",
    "accepted": "accepted",
    "calibration_error": "calibration_error",
}
"""Names that a draft position or a drafter's name follows after a slash, likewise."""


def trainer_metrics(report: StepReport) -> dict[str, float]:
    """Scalar figures for the trainer's own log, named `atlas/...`; unknown figures are left out."""
    metrics = {name: getattr(report, figure) for name, figure in METRICS.items()}
    metrics["warnings"] = len(report.warnings)
    for family, figure in METRIC_FAMILIES.items():
        values = getattr(report, figure)
        members = values.items() if isinstance(values, Mapping) else enumerate(values)
        metrics |= {f"{family}/{member}": value for member, value in members}
    return {f"atlas/{name}": float(value) for name, value in metrics.items() if value is not None}


class JsonlSink:
    """Appends one JSON object per line to a file and flushes; the first write makes missing folders.

    If a run is killed while writing, or its disk is full, half a line may remain. The next object then starts on a new
    line, and `read_jsonl` skips the half line with a warning.

    Args:
        path: The file; its existing lines are kept.
        origin: Further values of every line, to distinguish the writers of one file.
    """

    def __init__(self, path: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._origin = dict(origin or {})

    def write(self, report: StepReport, **extra: Any) -> None:
        """Append `report` with further JSON values of the caller (`extra`), such as a reward.

        Raises:
            OSError: The write failed.
        """
        self._append(json.dumps({**self._origin, **report.to_dict(), **extra}, allow_nan=False) + "\n")

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append objects other than reports; `OSError` as in `write`."""
        self._append("".join(json.dumps({**self._origin, **row}) + "\n" for row in rows))

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    text = "\n" + text
            file.write(text.encode())


def sinks_in(folder: str | Path | None, *, trace: bool) -> tuple[JsonlSink | None, JsonlSink | None]:
    """The files for an engine's reports and, if wanted, its controller's trace; none without a folder.

    Every line names the engine and process that wrote it (`ORIGIN`), because engines may share a folder. Traces of
    several ranks (`RANK` and `WORLD_SIZE` of torchrun) have one file each: `controller.rank0.jsonl` and so on.

    Raises:
        ValueError: The folder cannot be written to.
    """
    if folder is None:
        return None, None
    folder = Path(folder)
    rank, several = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    trace_name = f"controller.rank{rank}.jsonl" if several else "controller.jsonl"
    check_folder(folder, "output_dir", REPORTS_FILE, trace_name)
    origin = dict(zip(ORIGIN, (uuid4().hex[:12], rank), strict=True))
    return JsonlSink(folder / REPORTS_FILE, origin), JsonlSink(folder / trace_name, origin) if trace else None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Lines without an object, half written or damaged, are skipped with one warning that counts them.
    """
    rows, skipped = parse_jsonl(Path(path).read_bytes())
    if skipped:
        where = ", ".join(map(str, skipped[:_MAX_NAMED])) + (", ..." if len(skipped) > _MAX_NAMED else "")
        warnings.warn(f"{path}: skipped {len(skipped)} half-written or damaged lines: {where}", stacklevel=2)
    return list(rows.values())


def parse_jsonl(content: bytes) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """The objects of a JSONL file by line number, counted from 1, and the numbers of invalid lines."""
    rows, skipped = {}, []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            row = None
        if isinstance(row, dict):
            rows[number] = row
        else:
            skipped.append(number)
    return rows, skipped


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of text; the first row is the header, the first column holds names."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])
