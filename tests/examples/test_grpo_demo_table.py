"""The demo's closing figures, and TRL's own generation over given tokens, on a tiny trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_llama
from tests.reports import make_report
from tests.trainers import EOS, WORDS, build_trainer, rewards, with_special_tokens, word_tokenizer

pytest.importorskip("reasoning_gym")


@pytest.fixture
def table(demo: Any) -> Any:
    return demo("table")


def trained(**changes: Any) -> Any:
    """2 s with speculation for 30 tokens, and 3 s in the rerun without."""
    return make_report(**{"mode": "train", "baseline_tokens_per_s": 10.0, "no_speculation_s": 3.3} | changes)


def test_speeds_are_compared_over_equal_tokens(table: Any, tmp_path: Path) -> None:
    reports = [
        trained(step=0),
        trained(step=1, baseline_tokens_per_s=30.0, no_speculation_s=None),  # 1 s
        trained(step=2, baseline_tokens_per_s=None),
        make_report(mode="eval", step=2, baseline_tokens_per_s=1.0),
    ]
    figures = table.summarize_rollouts(reports, tmp_path / "none.jsonl", steps_per_epoch=2)
    assert (figures["generations"], figures["paired_generations"], figures["paired_tokens"]) == (3, 2, 60)
    assert figures["speedup"] == pytest.approx((3 + 1) / (2 + 2))
    assert figures["on_tokens_per_s"] == pytest.approx(60 / 4)
    assert figures["estimate_error"] == pytest.approx(0.1), "of the generation that has an estimate and a rerun"
    assert [epoch["paired_generations"] for epoch in figures["epochs"]] == [2, 0]
    assert figures["accepted_length"] == 2


def test_steps_are_compared_by_active_requests(table: Any) -> None:
    rows = [
        {"speculation": speculation, "batch": batch, "tokens": tokens, "step_s": 0.5}
        for speculation, batch, tokens in (
            (True, 1, 3),
            (True, 2, 4),
            (True, 3, 6),
            (False, 3, 3),
            (False, 2, 2),
            (False, 9, 9),
        )
    ]
    (found,) = table.by_batch(rows)
    assert found["batch"] == "2 to 3", "the only sizes that were decoded both ways"
    assert (found["on_steps"], found["off_steps"]) == (2, 2)
    assert found["speedup"] == pytest.approx(10 / 5)


def test_predictions_grow_with_what_is_accepted(table: Any) -> None:
    low, high = (table.predictions(length, 2.4)[0] for length in (1.5, 2.5))
    assert low["draft_tokens"] == high["draft_tokens"] == 3
    for batch, speedup in low["speedup_by_batch"].items():
        assert high["speedup_by_batch"][batch] == pytest.approx(speedup * 2.5 / 1.5)
        assert 0 < speedup < 1.5


def test_trl_repeats_what_the_engine_generated(demo: Any, tmp_path: Path) -> None:
    """Token by token, in texts of many lengths, with its own generation; and the trainer is as it was."""
    peer = demo("peer")
    generations = peer.KeepsGenerations(rewards)
    model = with_special_tokens(tiny_llama(vocab=len(WORDS)))
    options = {"max_completion_length": 24, "max_steps": 2}
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, reward_funcs=generations, **options)
    AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    assert sorted(generations.kept) == [0, 1]
    kept = generations.kept[1]
    assert len(kept.prompts) == len(kept.completion_ids) == 8
    assert len({len(row) for row in kept.completion_ids}) > 1
    assert any(row[-1] == EOS for row in kept.completion_ids)
    assert peer.time_trl(trainer, kept) > 0
    assert trainer.use_vllm
    assert "generate" not in vars(trainer.model)


def test_the_whole_summary_is_json_and_prints(table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "controller.jsonl"
    row = {"batch": 8, "tokens": 12, "step_s": 0.1}
    trace.write_text("".join(json.dumps(row | {"speculation": on}) + "\n" for on in (True, False)))
    summary = {
        "rollouts": table.summarize_rollouts([trained(step=0), trained(step=1)], trace, 1),
        "trl": [{"step": 0, "num_tokens": 30, "on_s": 2.0, "off_s": 3.0, "trl_s": 6.0}],
        "reward_window_steps": 1,
        "reward_first": 0.5,
        "reward_last": 0.75,
        "held_out_reward_before_after": [None, None],
        "train_s": 60.0,
    }
    table.print_table(json.loads(json.dumps(summary)))
    printed = capsys.readouterr().out
    assert "PREDICTED" in printed
    assert "+10.0% off" in printed
    for label, figures in (
        ("epoch 2", ["15.0", "10.0", "1.50"]),
        ("1 generations", ["15.0", "10.0", "5.0", "3.00", "2.00"]),
    ):
        line = next(line for line in printed.splitlines() if line.startswith(label))
        assert [word for word in line.split() if word in figures] == figures


@pytest.mark.parametrize(
    ("requests", "expected"), [([], "So this run has 4 requests at a time"), (["--prompts", "4"], "NOTHING TO WIN")]
)
def test_the_first_lines_say_whether_there_is_anything_to_win(
    requests: list[str], expected: str, demo: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = demo("run")
    run.announce(run.parse_args(requests))
    said = capsys.readouterr().out
    assert expected in said
    assert ("NOTHING TO WIN" in said) == bool(requests)
