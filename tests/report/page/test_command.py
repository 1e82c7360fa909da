"""`atlas-rl report` as it is typed: what it refuses, and that it replaces a page in one go."""

import os
import shutil
import subprocess
import sys

import pytest

from atlas_rl.cli import main
from tests import ROOT
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


def test_a_page_is_written_where_a_link_leads(folder, tmp_path):
    pytest.importorskip("plotly")
    (tmp_path / "link.html").symlink_to(tmp_path / "new" / "page.html")
    main(["report", str(folder), "--output", str(tmp_path / "link.html")])
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "new" / "page.html").stat().st_size > 1e6


@pytest.mark.parametrize("arguments", [["compare"], ["report", "--output", "page.html"]])
def test_names_that_are_no_text_and_a_terminal_of_few_letters_end_nothing(arguments, folder, tmp_path):
    pytest.importorskip("plotly")
    runs = [tmp_path / name for name in ("µ–漢", os.fsdecode(b"odd\xff"))]
    for run in runs:
        shutil.copytree(folder, run)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "atlas_rl", *arguments[:1], *map(str, runs), *arguments[1:]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    if "report" in arguments:
        assert "odd?" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["device", "pipe", "foreign page"])
def test_what_is_no_page_of_ours_is_not_replaced(kind, folder, tmp_path, capsys):
    pytest.importorskip("plotly")
    output = tmp_path / "output"
    if kind == "device":
        output.symlink_to("/dev/null")
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        output.write_text("<!DOCTYPE html><p>a page of somebody else")
    before = output.stat()
    assert "exists and is no page" in refused(capsys, folder, "--output", output)
    assert (output.stat().st_ino, output.stat().st_mode) == (before.st_ino, before.st_mode)


def test_what_is_wrong_is_one_line(folder, tmp_path, capsys):
    pytest.importorskip("plotly")
    assert "there is no" in refused(capsys, tmp_path / "nothing")
    assert "is a folder: name a file in it" in refused(capsys, folder, "--output", tmp_path)
    assert "exists and is no page" in refused(capsys, folder, "--output", folder / "rollouts.jsonl")
    assert "rollouts.jsonl' is no folder" in refused(
        capsys, folder, "--output", folder / "rollouts.jsonl" / "page.html"
    )
    assert "--output is a file" in refused(capsys, folder, "--output", "-")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe' is no file that can be read twice" in refused(capsys, tmp_path / "pipe")
    assert "holds no rollouts.jsonl; did you mean" in refused(capsys, tmp_path)


def test_a_missing_plotly_is_named_with_its_cure(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "In the checkout: pip install -e '.[report]'" in refused(capsys, folder)
