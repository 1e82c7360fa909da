"""What `atlas-rl report` does: reads runs, writes one HTML page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from atlas_rl.report.page.html import BEGINNING, page
from atlas_rl.report.page.reading import read_runs


def write_report(args: argparse.Namespace) -> None:
    """`write_page` as the command line asks for it."""
    write_page(args.run, args.output, earlier=args.all)


def write_page(paths: Sequence[Path], output: Path, *, earlier: bool = False) -> None:
    """Write the page of one run or several, and print what it holds.

    Args:
        paths: Folders of runs, or their `rollouts.jsonl`.
        output: The page; a file that is no page is not replaced.
        earlier: Whether to show earlier runs in the same files, too.

    Raises:
        ValueError: Plotly is missing, or a path holds no run.
        OSError: A file cannot be read or written.
    """
    _check_output(output)
    source = plotly_js()
    runs = read_runs(paths, earlier=earlier)
    made_at = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    _write(output, page(runs, source, made_at))
    print(f"{output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {sum(len(r.steps) for r in runs):,} steps")
    for run in runs:
        for note in run.notes:
            print(f"  {run.name}: {note}")


def plotly_js() -> str:
    """Source of plotly.js, from the Python package; `ValueError` where it is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(
            "the page's charts need plotly: pip install 'atlas-rl[report]', or in a checkout pip install -e '.[report]'"
        ) from error
    return get_plotlyjs()


def _check_output(output: Path) -> None:
    """Refuse to replace what is no page: a mistyped name must not cost a run its figures."""
    if output.is_dir():
        raise ValueError(f"--output '{output}' is a folder: name a file in it, such as {output / 'report.html'}")
    if output.exists() and output.stat().st_size:
        with output.open("rb") as file:
            if not file.read(len(BEGINNING)) == BEGINNING.encode():
                raise ValueError(f"--output '{output}' exists and is no page: name another file")


def _write(output: Path, text: str) -> None:
    """Replace a file in one go: a browser that reloads it never sees half a page."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
