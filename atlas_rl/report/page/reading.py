"""Reads runs from report files: groups lines into runs, and notes what was left out.

Several engines may have written one file: the ranks of a launch, a resumed run, or several runs in succession.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from atlas_rl.report.page.checking import report_of, unknown_keys
from atlas_rl.report.page.thinning import points
from atlas_rl.report.page.words import were
from atlas_rl.report.report import ORIGIN, Mode, StepReport
from atlas_rl.report.sinks import REPORTS_FILE, parse_jsonl
from atlas_rl.report.sums import concatenate, merge

_MODES: tuple[Mode, ...] = ("train", "standalone", "eval")
_GOING_STEPS = 3  # a file may still be growing if its last write is less than this many steps old


@dataclass(frozen=True)
class Run:
    """The steps of one run.

    Attributes:
        name: Distinguishes it from the other runs on the page.
        mode: Mode of its steps: `train` if it has any, else `standalone`, else `eval`.
        steps: One report per step, ranks merged, in order.
        notes: What was skipped, merged or left out, one sentence each.
    """

    name: str
    mode: Mode
    steps: tuple[StepReport, ...]
    notes: tuple[str, ...]

    @cached_property
    def total(self) -> StepReport:
        """The sum of all steps."""
        return concatenate(self.steps)

    @cached_property
    def points(self) -> tuple[StepReport, ...]:
        """The steps, or sums over neighbouring steps if there are many."""
        return points(self.steps)


@dataclass(frozen=True)
class _Line:
    number: int
    engine: str
    rank: int
    report: StepReport


@dataclass(frozen=True)
class _Launch:
    """Lines of processes that were started together: one engine per rank."""

    lines: tuple[_Line, ...]

    @property
    def first_step(self) -> int:
        return self.lines[0].report.step


def read_runs(paths: Sequence[Path], *, earlier: bool = False, now_s: float | None = None) -> list[Run]:
    """The runs in report files, named by the differing parts of their paths.

    Args:
        paths: `rollouts.jsonl` files, or folders that hold one.
        earlier: Include runs that had ended when the newest one of the same file began.
        now_s: Seconds since the epoch; None reads the clock.

    Raises:
        ValueError: A path holds no report, or is given twice.
        OSError: A file cannot be read.
    """
    files = [report_file(path) for path in paths]
    if len(set(files)) < len(files):
        raise ValueError("a run is given twice: name each once")
    runs = []
    for file, name in zip(files, _names(files), strict=True):
        runs += _read(file, name, earlier, time.time() if now_s is None else now_s)
    return runs


def report_file(path: Path) -> Path:
    """The report file that a path refers to.

    Raises:
        ValueError: There is none; the message names those in subfolders.
    """
    if path.is_dir():
        if (path / REPORTS_FILE).is_file():
            return (path / REPORTS_FILE).resolve()
        below = sorted(path.glob(f"*/{REPORTS_FILE}")) + sorted(path.glob(f"*/*/{REPORTS_FILE}"))
        hint = f"; did you mean {' or '.join(str(file.parent) for file in below[:4])}?" if below else ""
        raise ValueError(
            f"'{path}' holds no {REPORTS_FILE}{hint or ': AtlasRolloutEngine(output_dir=...) writes it there'}"
        )
    if not path.exists():
        raise ValueError(f"there is no '{path}': name the folder of a run, or its {REPORTS_FILE}")
    if not path.is_file():
        raise ValueError(f"'{path}' is no file that can be read twice: name the folder of a run, or its {REPORTS_FILE}")
    return path.resolve()


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest endings of the folders' paths that differ."""
    folders = [file.parent.parts if file.name == REPORTS_FILE else file.parts for file in files]
    for length in range(1, max(map(len, folders)) + 1):
        names = ["/".join(folder[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read(file: Path, name: str, earlier: bool, now_s: float) -> list[Run]:
    rows, skipped = parse_jsonl(file.read_bytes())
    lines, refused = _lines(rows)
    if not lines:
        unread = "its lines are half-written or damaged" if skipped else "no step has ended yet"
        raise ValueError(f"'{file}' holds {next(iter(refused.values()), f'no step report: {unread}')}")
    notes = _notes_on_lines(rows, skipped, refused)
    groups = _groups(_launches(lines))
    began = groups[-1][0].lines[0].number
    kept = [group for group in groups if earlier or _last_line(group) >= began]
    if len(kept) < len(groups):
        notes.append(f"{were(len(groups) - len(kept), 'earlier run')} left out: --all shows all of the file.")
    runs = [_run(name if len(kept) == 1 else f"{name} #{i}", group) for i, group in enumerate(kept, start=1)]
    notes += _going(runs[-1], now_s - file.stat().st_mtime)
    return [replace(run, notes=(*run.notes, *notes)) for run in runs]


def _lines(rows: Mapping[int, Mapping[str, Any]]) -> tuple[list[_Line], dict[int, str]]:
    lines, refused = [], {}
    for number, row in rows.items():
        try:
            report = report_of(row)
        except ValueError as error:
            refused[number] = str(error)
        else:
            rank = row.get("rank", 0)
            lines.append(_Line(number, str(row.get("engine", "")), rank if isinstance(rank, int) else 0, report))
    return lines, refused


def _notes_on_lines(
    rows: Mapping[int, Mapping[str, Any]], skipped: Sequence[int], refused: Mapping[int, str]
) -> list[str]:
    notes = []
    if skipped:
        notes.append(f"{len(skipped)} half-written or damaged {_lines_named(skipped)} skipped.")
    if refused:
        notes.append(f"{len(refused)} {_lines_named(refused)} skipped ({next(iter(refused.values()))}).")
    unknown = sorted(set().union(*(unknown_keys(row, ORIGIN) for n, row in rows.items() if n not in refused)))
    if unknown:
        notes.append(f"Figures that this version does not know are left out: {', '.join(unknown[:10])}.")
    return notes


def _lines_named(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{'line' if len(numbers) == 1 else 'lines'} ({first}) {'was' if len(numbers) == 1 else 'were'}"


def _launches(lines: Sequence[_Line]) -> list[_Launch]:
    """Pair the engines of ranks that ran together: they report the same steps, in turns.

    A process gives its engine a random name at its start, and no launcher gives all of its processes a name that its next
    launch lacks. An engine that shares no step with any other rank stays by itself.
    """
    engines: dict[tuple[int, str], list[_Line]] = {}
    for line in lines:
        engines.setdefault((line.rank, line.engine), []).append(line)
    launches: list[list[_Line]] = []
    for (rank, _), own in sorted(engines.items(), key=lambda item: item[0][0]):
        fits = [
            (fit, index)
            for index, launch in enumerate(launches)
            if all(line.rank != rank for line in launch) and (fit := _fit(own, launch)) is not None
        ]
        if fits:  # among equals the first: engines of one process are made in the same order on every rank
            index = min(fits)[1]
            launches[index] = sorted(launches[index] + own, key=lambda line: line.number)
        else:
            launches.append(own)
    return sorted((_Launch(tuple(launch)) for launch in launches), key=lambda launch: launch.lines[0].number)


def _fit(own: Sequence[_Line], launch: Sequence[_Line]) -> tuple[bool, int, int] | None:
    """How badly an engine fits a launch: no turns taken, few shared steps, far away in the file; None if none is shared."""
    shared = {_step_of(line) for line in own} & {_step_of(line) for line in launch}
    if not shared:
        return None
    distance = max(own[0].number - launch[-1].number, launch[0].number - own[-1].number, 0)
    return distance > 0, -len(shared), distance


def _step_of(line: _Line) -> tuple[Mode, int, int]:
    return line.report.mode, line.report.step, line.report.policy_version


def _groups(launches: Sequence[_Launch]) -> list[list[_Launch]]:
    """Group launches into runs: one that begins later in the file and at a later step continues the previous one."""
    groups: list[list[_Launch]] = []
    for launch in launches:
        before = groups[-1] if groups else None
        resumed = before and launch.lines[0].number > _last_line(before) and launch.first_step > before[0].first_step
        if before and resumed:
            before.append(launch)
        else:
            groups.append([launch])
    return groups


def _last_line(group: Sequence[_Launch]) -> int:
    return max(line.number for launch in group for line in launch.lines)


def _run(name: str, group: Sequence[_Launch]) -> Run:
    notes: list[str] = []
    reports: list[StepReport] = []
    for launch in group:
        merged, more = _merged(launch)
        kept = [report for report in reports if report.step < launch.first_step]
        if launch is not group[0]:
            again = len(reports) - len(kept)
            notes.append(f"The run was resumed at step {launch.first_step}; {were(again, 'step')} done again.")
        reports, notes = kept + merged, notes + more
    mode = next(mode for mode in _MODES if any(report.mode == mode for report in reports))
    steps = [report for report in reports if report.mode == mode]
    if len(steps) < len(reports):
        notes.append(f"{were(len(reports) - len(steps), 'line')} left out, of other modes than {mode}.")
    return Run(name, mode, tuple(sorted(steps, key=lambda report: report.step)), tuple(notes))


def _merged(launch: _Launch) -> tuple[list[StepReport], list[str]]:
    """One report per step. Steps that some rank has not reported are left out, if any complete step exists."""
    ranks = {line.rank for line in launch.lines}
    found: dict[tuple[Any, ...], dict[int, StepReport]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for line in launch.lines:
        report = line.report
        key = _step_of(line)
        turn = seen.get((line.rank, *key), 0)  # keeps several generations of one step apart
        seen[(line.rank, *key)] = turn + 1
        found.setdefault((*key, turn), {})[line.rank] = report
    whole = [list(by_rank.values()) for by_rank in found.values() if len(by_rank) == len(ranks)]
    notes = []
    if len(ranks) > 1:
        notes.append(f"{len(ranks)} ranks are merged: counts add up, seconds are those of the slowest.")
    elif rank := min(ranks):  # rank 0 alone is an ordinary run
        notes.append(f"Rank {rank} is shown by itself: its lines share no step with another rank's.")
    if whole and len(whole) < len(found):
        notes.append(f"{were(len(found) - len(whole), 'step')} left out that not every rank has reported.")
    if not whole:
        notes.append("No step was reported by every rank: each one sums those that did.")
    steps = whole or [list(of.values()) for of in found.values()]
    return [merge(reports) if len(reports) > 1 else reports[0] for reports in steps], notes


def _going(run: Run, age_s: float) -> list[str]:
    usual_s = median(report.step_s or report.generate_s for report in run.steps)
    if age_s > _GOING_STEPS * usual_s + 1:
        return []
    return [f"The last line was written {max(0.0, age_s):.0f} s before this page was made: the run may be going on."]
