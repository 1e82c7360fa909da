"""The table of docs/policies.md is the recorded result, and a dozen of its rows are what they say."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import transformers

from benchmarks.policies import BEGIN, END, PAGE, RESULT, VARIANTS, WRAPPERS, Outcome, built, table, tried, updated
from benchmarks.tiny_policies import model_types

REPRESENTATIVE = (
    "cohere2",
    "deepseek_v3",
    "doge",
    "falcon",
    "gemma4_text",
    "gpt2",
    "llama, yarn rope",
    "llama4_text",
    "mamba",
    "mpt",
    "phi3, longrope across its switch",
    "phi3, longrope within its first factors",
    "phimoe",
)


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RESULT.read_text(encoding="utf-8"))


def test_the_page_shows_the_recorded_result(recorded):
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0].strip() == table(recorded).strip()


def test_a_long_reason_ends_with_a_sentence_or_a_word():
    words = "word " * 100
    for detail, shown in (
        (f"One. Two. {words}", "One. Two ..."),
        (words, f"{'word ' * 52}..."),
        ("One. Two.", "One. Two."),
    ):
        row = {"name": "x", "model_class": None, "outcome": "not built", "detail": detail}
        result = {"environment": {"versions": {"transformers": "5"}}, "policies": [row]}
        assert table(result).splitlines()[-1] == f"| x |  | not built: {shown} |"


def test_some_rows_are_written_anew_and_others_stay(recorded):
    news = [Outcome("gpt2", "X", "wrong", ""), Outcome("something later", "Y", "same", "")]
    result = updated(recorded, news)
    assert [row for row in result["policies"] if row not in recorded["policies"]] == [
        *(asdict(news[0]) for row in recorded["policies"] if row["name"] == "gpt2"),
        asdict(news[1]),
    ]
    assert result["updates"][-1]["names"] == ["gpt2", "something later"]


def test_rows_are_told_apart_by_name(recorded):
    names = [line.split(" | ")[0] for line in table(recorded).splitlines()[4:]]
    assert len(names) == len(set(names)) == len(recorded["policies"])


def test_no_class_is_wrong_or_crashes(recorded):
    outcomes = {row["name"]: row["outcome"] for row in recorded["policies"]}
    assert set(outcomes.values()) == {"same", "refused", "not built"}
    if recorded["environment"]["versions"]["transformers"] == transformers.__version__:
        assert set(model_types()) <= set(outcomes) <= {*model_types(), *VARIANTS, *WRAPPERS}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_class_is_what_the_table_says(name, recorded):
    outcome = {row["name"]: row["outcome"] for row in recorded["policies"]}[name]
    assert tried(name, built(name)).outcome == outcome
