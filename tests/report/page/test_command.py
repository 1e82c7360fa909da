"""`atlas-rl report` as it is typed: what it refuses, and that it replaces a page in one go."""

import subprocess
import sys

import pytest

from atlas_rl.cli import main
from tests.report.page.runs import steps, write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "demo", [("a", 0, report) for report in steps(range(3))])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_default_is_report_html_here(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    main(["report", str(folder)])
    assert capsys.readouterr().out.startswith("report.html: 1 run, 3 steps\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "report.html"]


def test_a_page_replaces_a_page(folder, tmp_path):
    pytest.importorskip("plotly")
    for _ in range(2):
        main(["report", str(folder), "--output", str(tmp_path / "new" / "page.html")])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_mistyped_flag_gets_the_usage_of_its_command_and_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "run", "--outputt", "page.html"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "usage: atlas-rl report" in said
    assert "(did you mean --output?)" in said


def test_a_reader_that_has_enough_is_no_error(folder):
    other = write(folder.parent / "other", [("a", 0, report) for report in steps(range(3))])
    code = (
        "import os, sys; from atlas_rl.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"  # nobody reads
        f"main(['compare', {str(folder)!r}, {str(other)!r}])"
    )
    result = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")


def test_what_is_wrong_is_one_line(folder, tmp_path, capsys):
    pytest.importorskip("plotly")
    assert "there is no" in refused(capsys, tmp_path / "nothing")
    assert "is a folder: name a file in it" in refused(capsys, folder, "--output", tmp_path)
    assert "exists and is no page" in refused(capsys, folder, "--output", folder / "rollouts.jsonl")
    assert "holds no rollouts.jsonl; did you mean" in refused(capsys, tmp_path)


def test_a_missing_plotly_is_named_with_its_cure(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install 'atlas-rl[report]'" in refused(capsys, folder)
