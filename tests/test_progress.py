"""Bars are drawn where somebody looks: on a terminal, not in a log, not in continuous integration."""

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from tqdm.auto import tqdm
from transformers.utils import logging

from atlas_rl import AtlasRolloutEngine, progress
from tests import ROOT
from tests.engines import policy
from tests.reports import make_report

END = b"<end>"
WORK = """
from atlas_rl import progress
for item in progress.each("abc", "letters", "letter"):
    progress.say("line", item)
"""


def run_work(terminal: bool, **variables: str) -> tuple[str, str]:
    """What `WORK` writes on stdout, and on a stderr that is a terminal or a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(theirs, (24, 80))  # a new one has no columns, in which nothing can be drawn
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | variables
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    try:
        result = subprocess.run(
            [sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60, check=True
        )
        os.write(theirs, END)
        said = b""
        while not said.endswith(END):  # a terminal gives what was written in pieces
            said += os.read(ours, 65536)
        return result.stdout.decode(), said.removesuffix(END).decode()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("terminal", "variables", "drawn"),
    [(True, {}, True), (True, {"CI": "true"}, False), (True, {"CI": "false"}, True), (False, {}, False)],
)
def test_a_bar_is_drawn_on_a_terminal_alone(terminal, variables, drawn):
    lines, said = run_work(terminal, **variables)
    assert lines == "line a\nline b\nline c\n"
    assert ("letters" in said) == drawn
    assert drawn or said == ""


def test_a_bar_is_closed_where_the_work_fails(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "shown", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(ZeroDivisionError), progress.bar("work", 2, "part") as bar:
        raise ZeroDivisionError
    assert bar.disable  # as tqdm leaves a bar that is closed
    assert screen.getvalue().endswith("\r")


def test_a_line_stands_above_the_bar_of_somebody_else(monkeypatch):
    """Such as a trainer's, beside which the engine prints a line per step."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=2, desc="training"):
        AtlasRolloutEngine(model=policy()).publish(make_report())
    assert re.search(r"training: [^\r]*\r *\ratlas step 12 \| [^\r]*\n", screen.getvalue())


def test_a_process_without_stdout_says_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    progress.say("line")


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_transformers_follow_ours(shown, monkeypatch):
    monkeypatch.setattr(progress, "shown", lambda: shown)
    assert logging.is_progress_bar_enabled()
    with progress.loading():
        assert logging.is_progress_bar_enabled() == shown
    assert logging.is_progress_bar_enabled()
