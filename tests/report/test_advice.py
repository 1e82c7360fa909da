"""Every warning that a report can hold has advice: the sources are read for what they say."""

import ast

import pytest

from atlas_rl.decode.loop import _PAUSED
from atlas_rl.report.advice import ADVICE, UNKNOWN, advice_for
from atlas_rl.vllm.checks import UNDEFINED_LOGITS
from tests import ROOT


def text_of(node: ast.expr) -> str:
    """What a literal or an f-string says; each of its values is a 7."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) else "7"


def said_in(path: str) -> list[str]:
    """Texts that the functions of a file yield."""
    tree = ast.parse((ROOT / "atlas_rl" / path).read_text(encoding="utf-8"))
    yields = [node.value for node in ast.walk(tree) if isinstance(node, ast.Yield)]
    return [text_of(value) for value in yields if isinstance(value, ast.Constant | ast.JoinedStr)]


SOURCES = ("report/dead_drafters.py", "audit/auditor.py", "vllm/lost_drafters.py")
WARNINGS = [
    *(text for path in SOURCES for text in said_in(path)),
    _PAUSED.format(3),
    UNDEFINED_LOGITS,
    "history: propose() raised KeyError: 3; it is off until the next policy update",
    "2 of 8 completions differ from the rerun without speculation: expected only from near-ties",
    "the server generated 7 tokens for others meanwhile: its figures of drafting and its seconds count them",
    "audit: returned logprobs differ from a plain forward pass by 7 nats on average, 7 at most: they are taken before "
    "temperature and truncation (vLLM: logprobs_mode='processed_logprobs')",
]


def test_the_sources_are_read():
    assert len(said_in("audit/auditor.py")) == 4
    assert all(said_in(path) for path in SOURCES)


@pytest.mark.parametrize("warning", WARNINGS)
def test_every_warning_has_advice(warning):
    assert advice_for(warning) != UNKNOWN


def test_no_advice_is_for_nothing():
    advised = {advice_for(warning) for warning in WARNINGS}
    assert {advice for _, advice in ADVICE} == advised


def test_an_unknown_warning_is_not_guessed_at():
    assert advice_for("the moon is full") == UNKNOWN
