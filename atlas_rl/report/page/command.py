"""The command `atlas-rl report`: reads runs and writes one HTML page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from atlas_rl.report.page.html import BEGINNING, page
from atlas_rl.report.page.reading import read_runs
from atlas_rl.report.page.words import counted


def write_report(args: argparse.Namespace) -> None:
    """Call `write_page` with the command line's arguments."""
    write_page(args.run, args.output, earlier=args.all)


def write_page(paths: Sequence[Path], output: Path, *, earlier: bool = False) -> None:
    """Write the page of one or more runs, and print a summary.

    Args:
        paths: Folders of runs, or their `rollouts.jsonl`.
        output: File of the page; an existing file is replaced only if it is a page of this command.
        earlier: Whether to show earlier runs in the same files, too.

    Raises:
        ValueError: Plotly is missing, a path holds no run, or `output` is something else or lies in a file.
        OSError: A file cannot be read or written.
    """
    file = _checked(output)
    source = plotly_js()
    runs = read_runs(paths, earlier=earlier)
    made_at = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    _write(file, page(runs, source, made_at))
    print(f"{output}: {counted(len(runs), 'run')}, {counted(sum(len(run.steps) for run in runs), 'step')}")
    for run in runs:
        for note in run.notes:
            print(f"  {run.name}: {note}")


def plotly_js() -> str:
    """Source of plotly.js, from the Python package; `ValueError` if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError("the page's charts need plotly. In the checkout: pip install -e '.[report]'") from error
    return get_plotlyjs()


def _checked(output: Path) -> Path:
    """The file to write, with links resolved. Only our own pages are replaced, never a run, another page or a device.

    Raises:
        ValueError: It exists and is something else, or cannot be written.
    """
    if str(output) == "-":
        raise ValueError("--output is a file: the page has some 5 MB and does not go to a terminal")
    file = Path(os.path.realpath(output))
    if file.is_dir():
        raise ValueError(f"--output '{output}' is a folder: name a file in it, such as {output / 'report.html'}")
    if file.exists() and not (file.is_file() and _replaceable(file)):
        raise ValueError(f"--output '{output}' exists and is no page of a run: name another file")
    folder = next(each for each in file.parents if each.exists())
    if not folder.is_dir():
        raise ValueError(f"--output '{output}' cannot be written: '{folder}' is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output '{output}' cannot be written: you may not write to '{folder}'")
    return file


def _replaceable(file: Path) -> bool:
    """Whether a file is one of our pages, or empty."""
    with file.open("rb") as content:
        return content.read(len(BEGINNING)) in (b"", BEGINNING.encode())


def _write(output: Path, text: str) -> None:
    """Replace a file atomically, so that a browser that reloads never sees half a page."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # Names of folders and texts of errors may hold invalid UTF-8, which is replaced by a mark.
        draft.write_text(text, encoding="utf-8", errors="replace")
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
