"""Every warning of the library is explained: the sources are read for what they say.

A warning is the text of a call of a logger or of `warnings.warn`, one that a function yields, one that is kept in
`_messages` or added to `warnings`, or one that is called `message` or `saying` until it is handed on. Its values are
written as 7.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from atlas_rl.report.advice import LOGGED, REPORTED, UNKNOWN, Explained, advice_for
from tests import ROOT

SOURCES = sorted((ROOT / "atlas_rl").rglob("*.py")) + sorted((ROOT / "kernels" / "atlas_kernels").rglob("*.py"))
LOG_CALLS = ("warning", "error", "exception", "critical")
ENOUGH_WORDS = 3  # fewer are a frame around a message, such as "atlas_rl: %s: left out"


def texts_of(node: ast.expr, constants: dict[str, str]) -> list[str]:
    """What an expression may say: literals, f-strings, constants of a module, and the branches of a choice."""
    match node:
        case ast.Constant(value=str(text)):
            return [re.sub(r"%(\.\d+)?[sdf]", "7", text)]
        case ast.JoinedStr(values=values):
            return ["".join(part.value if isinstance(part, ast.Constant) else "7" for part in values)]
        case ast.Name(id=name) | ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="format")):
            return [constants[name].replace("{}", "7")] if name in constants else []
        case ast.IfExp(body=body, orelse=orelse):
            return texts_of(body, constants) + texts_of(orelse, constants)
    return []


def said_in(tree: ast.Module, constants: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts of a module that reports hold, and those that are logged."""
    reported, logged = [], []
    logs = any(isinstance(node, ast.Name) and node.id == "logger" for node in ast.walk(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=name)) if name in LOG_CALLS:
                logged += texts_of(node.args[0], constants)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"), attr="warn")):
                logged += texts_of(node.args[0], constants)
            case ast.Call(func=ast.Attribute(attr="warn")) if node.args:
                reported += texts_of(node.args[0], constants)
            case ast.Yield(value=ast.expr() as value):
                reported += texts_of(value, constants)
            case ast.Assign(targets=[ast.Subscript(value=ast.Attribute(attr="_messages"), slice=key)]):
                reported += texts_of(key, constants)
            case ast.AugAssign(target=ast.Name(id="warnings"), value=ast.Tuple(elts=added)):
                reported += [text for value in added for text in texts_of(value, constants)]
            case ast.Assign(targets=[ast.Name(id="message" | "saying")], value=value):
                (logged if logs else reported).extend(texts_of(value, constants))
    return [[text for text in texts if _num_words(text) >= ENOUGH_WORDS] for texts in (reported, logged)]


def _num_words(text: str) -> int:
    return len(re.findall(r"[A-Za-z][\w'-]*", text.removeprefix("atlas_rl:")))


@cache
def constants_of_the_library() -> dict[str, str]:
    """Texts that modules name in capitals."""
    found = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    found[name] = text
    return found


def all_said() -> Iterator[tuple[str, tuple[Explained, ...]]]:
    for path in SOURCES:
        reported, logged = said_in(ast.parse(path.read_text(encoding="utf-8")), constants_of_the_library())
        yield from ((text, REPORTED) for text in reported)
        yield from ((text, LOGGED) for text in logged)


SAID = list(dict.fromkeys(all_said()))
CLIPPED = (
    "audit: returned logprobs differ from a plain forward pass by 7 nats on average, 7 at most: they are taken before "
)
CLIPPED += "temperature and truncation (vLLM: logprobs_mode='processed_logprobs')"


def test_the_sources_are_read():
    assert len([text for text, of in SAID if of is REPORTED]) >= 14
    assert len([text for text, of in SAID if of is LOGGED]) >= 22


@pytest.mark.parametrize(("warning", "explained"), SAID, ids=[text[:60] for text, _ in SAID])
def test_every_warning_is_explained(warning, explained):
    assert any(each.fits(warning) for each in explained), "atlas_rl/report/advice.py does not know it"


def test_nothing_is_explained_that_is_not_said():
    said = [*SAID, (CLIPPED, REPORTED)]
    first = {next(each for each in of if each.fits(text)).says for text, of in said}
    assert {each.says for each in REPORTED + LOGGED} == first


def test_a_new_warning_is_noticed():
    tree = ast.parse(
        'logger.warning("atlas_rl: the moon is %s now", phase)\nrecorder.warn(f"{n} stars are gone today")'
    )
    assert said_in(tree, {}) == [["7 stars are gone today"], ["atlas_rl: the moon is 7 now"]]


def test_the_page_of_a_run_takes_the_cure():
    assert "processed_logprobs" in advice_for(CLIPPED)
    assert advice_for("the moon is full") == UNKNOWN
