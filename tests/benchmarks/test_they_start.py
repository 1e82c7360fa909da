"""Every benchmark starts: its module is imported and its help is printed, in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELP = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (name, end.code)
        assert "usage:" in said.getvalue(), name
    else:
        raise AssertionError(f"{name} does something when it is asked for help")
"""


def commands() -> list[str]:
    """Modules of `benchmarks/` that are run by themselves."""
    paths = sorted((ROOT / "benchmarks").rglob("*.py"))
    mains = [path for path in paths if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in mains]


@pytest.mark.slow
def test_every_benchmark_has_a_help() -> None:
    assert len(commands()) > 20
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELP, *commands()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
