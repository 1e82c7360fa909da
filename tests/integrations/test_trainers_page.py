"""docs/trainers.md has a row for every trainer of the installed TRL, and says what `attach` does with it."""

from __future__ import annotations

import importlib
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from atlas_rl.integrations.trl.kinds import kind_of
from tests import ROOT

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
NONE = ("", "no")  # cells of a column in which a trainer is not served


@cache
def trainers_of_trl() -> dict[str, str]:
    """The trainers that TRL defines, and their modules; of several of one name that which is not experimental."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: ("experimental" in path.parts, path)):
        for name in re.findall(r"^class ([A-Za-z]\w*Trainer)\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found.setdefault(name, ".".join(part for part in parts if part != "__init__"))
    return found


@cache
def rows_of_the_page() -> dict[str, list[str]]:
    """The trainers of the page's first table, and the cells behind their names."""
    lines = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| trainer |"))
    rows: dict[str, list[str]] = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            assert name not in rows, f"{name} has two rows"
            rows[name] = cells
    return rows


def test_every_trainer_of_trl_has_a_row_and_every_row_is_a_trainer() -> None:
    """A new one fails here until the page says how it samples."""
    assert set(rows_of_the_page()) == set(trainers_of_trl())


@pytest.mark.parametrize("name", sorted(trainers_of_trl()))
def test_a_row_says_what_attaching_does(name: str) -> None:
    in_process, colocated, server = rows_of_the_page()[name]
    made = object.__new__(getattr(importlib.import_module(trainers_of_trl()[name]), name))
    if in_process in NONE or in_process.startswith("never"):
        with pytest.raises(ValueError, match=f"^{name} (never samples|samples only to log|generates in a vLLM server)"):
            kind_of(made)
        assert colocated in NONE
        return
    served = kind_of(made).vllm is not None
    assert (colocated not in NONE, server not in NONE) == (served, served)
