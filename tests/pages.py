"""Reads the Markdown pages of the repository: their code blocks, the commands in them, headings and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

FOLDERS = (ROOT / "docs", ROOT / "examples")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for folder in FOLDERS for page in folder.rglob("*.md")),
]
_FENCE = re.compile(r"^( *)```(\w*)$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_LIST = re.compile(r"^(- |\d+\. )")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page.

    Attributes:
        page: The file, from the root of the repository.
        line: Of its first line of code, counted from 1.
        language: What follows the fence; `indented` for one without a fence.
        text: The code.
        reason: Why it is not run; empty where it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The code blocks of a page, in order."""
    lines, number, paragraph = text.split("\n"), 0, ""
    while number < len(lines):
        line = lines[number]
        if fence := _FENCE.match(line):
            end = lines.index(f"{fence[1]}```", number + 1)
            before = next((each for each in reversed(lines[:number]) if each.strip()), "")
            reason = _NOT_RUN.match(before.strip())
            code = "\n".join(each.removeprefix(fence[1]) for each in lines[number + 1 : end])
            yield Block(page, number + 2, fence[2], code, reason[1] if reason else "")
            number = end
        elif line.startswith("    ") and not lines[number - 1].strip() and not _LIST.match(paragraph):
            yield Block(page, number + 1, "indented", line, "")
        elif line and not line.startswith(" "):
            paragraph = line
        number += 1


def blocks_of_pages() -> list[Block]:
    """The code blocks of all pages."""
    return [
        block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))
    ]


def commands_of(shell: str) -> list[list[str]]:
    """The words of every command of a shell script, without variables that are set for it."""
    commands = []
    for line in shell.replace("\\\n", " ").split("\n"):
        if re.match(r"^\w+=\$\(", line):  # a variable that a command's output is kept in
            continue
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"^[A-Z_]\w*=", command[0]):
                command = command[1:]
            commands += [command] if command else []
    return commands


def anchors_of(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"^[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken
