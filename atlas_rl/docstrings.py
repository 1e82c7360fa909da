"""Parses docstrings of attributes and arguments, so that help texts and pages need not repeat them."""

from __future__ import annotations

import inspect
import re
from typing import Any

_ENTRY = re.compile(r"^    (\w+): (.*)$")


def entries(of: Any, section: str) -> dict[str, str]:
    """Name and text of each entry in a section of a Google-style docstring, each text on one line.

    Args:
        of: A class or a function.
        section: Title of the section, such as "Attributes" or "Args". One that is not there has no entries.
    """
    found: dict[str, list[str]] = {}
    lines = iter((inspect.getdoc(of) or "").splitlines())
    for line in lines:
        if line == f"{section}:":
            break
    for line in lines:
        if line and not line.startswith("    "):
            break
        if entry := _ENTRY.match(line):
            found[entry[1]] = [entry[2]]
        elif found and line.strip():
            next(reversed(found.values())).append(line.strip())
    return {name: " ".join(texts) for name, texts in found.items()}


def text(of: Any) -> str:
    """A docstring without its sections, on one line."""
    prose = re.split(r"\n(?:Args|Attributes|Raises|Returns):\n", inspect.getdoc(of) or "")[0]
    return " ".join(prose.split())
