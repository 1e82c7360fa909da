"""`atlas-rl report` as it is typed: what it refuses, and that it replaces a page in one go."""

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


def test_what_is_wrong_is_one_line(folder, tmp_path, capsys):
    pytest.importorskip("plotly")
    assert "there is no" in refused(capsys, tmp_path / "nothing")
    assert "is a folder: name a file in it" in refused(capsys, folder, "--output", tmp_path)
    assert "holds no rollouts.jsonl; did you mean" in refused(capsys, tmp_path)


def test_a_missing_plotly_is_named_with_its_cure(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install 'atlas-rl[report]'" in refused(capsys, folder)
