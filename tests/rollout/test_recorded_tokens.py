"""Tokens and counts written down: a change of the code's shape must not change one of them.

`recorded_tokens.json` was made by `python -m tests.rollout.test_recorded_tokens`. Make it anew only for a change that
is meant to give other tokens, and say so in the change.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.models import FACTORIES, tiny_llama

RECORD = Path(__file__).with_name("recorded_tokens.json")
VOCAB = 64
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4, 11, 2, 9, 5, 6], [5, 9, 2]]
EOS = [17, 40, 35]
SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.6, "top_p": 0.9},
    "everything": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.8},
}
ARMS = {
    "off": lambda: None,
    "history": HistorySpeculator,
    "draft_lm": lambda: DraftLM(tiny_llama(layers=1, seed=12), VOCAB),
}
CASES = [
    *((family, setting, "off", "invariant") for family in FACTORIES for setting in ("plain", "everything")),
    *(("llama", setting, arm, "invariant") for setting in SETTINGS for arm in ("history", "draft_lm")),
    *(("llama", setting, arm, "rejection") for setting in SETTINGS for arm in ARMS),
]


@cache
def model(family):
    return FACTORIES[family](seed=11)


def run(family, setting, arm, verification):
    """Two calls, a policy update between them: tokens of both, and what was drafted and accepted."""
    speculator = ARMS[arm]()
    options = {"speculation": False}
    if speculator is not None:
        options = {
            "speculators": [speculator],
            "controller": FixedController([speculator.name], speculator.name, 3),
        }
    engine = AtlasRolloutEngine(model=model(family), console=False, verification=verification, **options)
    rows = []
    for seed in (3, 4):
        output = engine.generate(
            PROMPTS, num_generations=2, max_new_tokens=16, eos_token_ids=EOS, seed=seed, **SETTINGS[setting]
        )
        report = output.report
        counts = [report.num_forwards, sum(report.drafted.values()), sum(report.accepted.values())]
        rows.append({"tokens": output.completion_ids, "forwards_drafted_accepted": counts})
        engine.policy_updated()
    return rows


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_tokens_are_those_that_were_written_down(case):
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert run(*case) == recorded[" ".join(case)]


def test_drafting_changes_no_token_in_the_record_and_is_there():
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for setting in ("plain", "everything"):
        plain = [row["tokens"] for row in recorded[f"llama {setting} off invariant"]]
        for arm in ("history", "draft_lm"):
            rows = recorded[f"llama {setting} {arm} invariant"]
            assert [row["tokens"] for row in rows] == plain
            assert all(row["forwards_drafted_accepted"][1] > 0 for row in rows)


if __name__ == "__main__":
    found = {" ".join(case): run(*case) for case in CASES}
    RECORD.write_text(json.dumps(found, separators=(",", ":")).replace('],"', '],\n"') + "\n", encoding="utf-8")
