"""Pages that repeat the code are up to date, and lack nothing that the code has."""

from __future__ import annotations

from dataclasses import fields

import pytest

from atlas_rl.config import EngineConfig
from atlas_rl.docstrings import entries, text
from atlas_rl.pages import PAGES, main
from atlas_rl.report.report import StepReport
from atlas_rl.report.sinks import METRIC_FAMILIES, METRICS, trainer_metrics
from tests import ROOT
from tests.reports import make_report


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_up_to_date(name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), f"docs/{name} is out of date: run `python -m atlas_rl.pages`"


def test_the_command_writes_them(tmp_path):
    main(["--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == set(PAGES)


def test_every_option_has_a_help():
    assert list(entries(EngineConfig, "Attributes")) == [field.name for field in fields(EngineConfig)]


def test_every_key_of_a_line_is_explained():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in make_report().to_dict():
        assert f"\n| `{name}` | " in page
    assert list(entries(StepReport, "Attributes")) == [field.name for field in fields(StepReport)]


def test_every_logged_name_is_explained():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in trainer_metrics(make_report(baseline_tokens_per_s=10.0)):
        family = name.removeprefix("atlas/").split("/")[0]
        member = {"acceptance_at": "POSITION"}.get(family, "DRAFTER")
        assert f"| `{f'atlas/{family}/{member}' if family in METRIC_FAMILIES else name}` |" in page
    assert all(f"| `atlas/{name}` |" in page for name in METRICS)


def test_texts_of_docstrings():
    def sample():
        """Say a thing.

        And another: with a colon.

        Args:
            one: The first,
                which goes on.
            two: The second.

        Raises:
            ValueError: Never.
        """

    assert entries(sample, "Args") == {"one": "The first, which goes on.", "two": "The second."}
    assert entries(sample, "Raises") == {"ValueError": "Never."}
    assert entries(sample, "Returns") == entries(int, "Args") == {}
    assert text(sample) == "Say a thing. And another: with a colon."
