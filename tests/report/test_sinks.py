"""Sinks: lines that fit, files that survive a killed run."""

import math

import pytest

from atlas_rl.report.report import ORIGIN, StepReport
from atlas_rl.report.sinks import (
    CONSOLE_WIDTH,
    JsonlSink,
    console_line,
    read_jsonl,
    sinks_in,
    trainer_metrics,
)
from tests.reports import make_report


def test_console_line_fits_and_says_what_matters():
    line = console_line(make_report())
    assert line == (
        "atlas step 12 | 15 tok/s | 1.50x of no speculation (est.) | accepted length 2.00 | history 14/24 | "
        "H 0.30 nats | 30 tok in 2.0 s"
    )
    assert "speculation off" in console_line(make_report(drafted={}, accepted={}))
    assert "atlas eval 12" in console_line(make_report(mode="eval"))
    crowded = make_report(
        step=10**9,
        num_tokens=10**9,
        generate_s=12345.0,
        drafted={f"speculator_{i}": 10**7 for i in range(9)},
        accepted={f"speculator_{i}": 10**6 for i in range(9)},
        warnings=("w",) * 3,
    )
    assert len(console_line(crowded)) <= CONSOLE_WIDTH
    assert "\n" not in console_line(crowded)
    assert "tok/s" in console_line(crowded)


def test_an_audit_is_shown_where_there_was_one():
    audited = make_report(entropy=None, audit_score_nats=-4.0, audit_score_variance_nats2=9.0, audit_evidence_nats=5.0)
    assert console_line(audited).endswith("| 30 tok in 2.0 s | audit z -1.3")
    assert trainer_metrics(audited)["atlas/audit/evidence_nats"] == 5.0
    assert "atlas/audit/z" not in trainer_metrics(make_report())


def test_trainer_metrics_are_finite_floats_under_one_prefix():
    metrics = trainer_metrics(make_report(entropy=None))
    assert all(name.startswith("atlas/") and type(value) is float for name, value in metrics.items())
    assert "atlas/entropy" not in metrics
    assert metrics["atlas/accepted/history"] == 14
    assert metrics["atlas/acceptance_at/1"] == 0.4
    assert metrics["atlas/time/forward_s"] == 1.5


def test_the_measured_gain_reaches_the_trainers_log():
    measured = trainer_metrics(make_report(baseline_tokens_per_s=12.0))
    assert (measured["atlas/speedup_measured"], measured["atlas/baseline_tokens_per_s"]) == (1.25, 12.0)
    assert not {"atlas/speedup_measured", "atlas/baseline_tokens_per_s"} & trainer_metrics(make_report()).keys()


def test_jsonl_round_trip(tmp_path):
    sink = JsonlSink(tmp_path / "a" / "b" / "reports.jsonl")
    reports = [make_report(), make_report(step=13, warnings=("zero drafts: µ",), mode="eval")]
    sink.write(reports[0], reward=0.5)
    sink.write(reports[1])
    rows = read_jsonl(sink.path)
    assert rows[0].pop("reward") == 0.5
    assert rows[0]["tokens_per_s"] == 15
    assert [StepReport.from_dict(row) for row in rows] == reports
    with pytest.raises(ValueError, match="unknown keys"):
        StepReport.from_dict({**rows[0], "reward": 0.5})


def test_a_line_says_who_wrote_it_and_reads_as_a_report(tmp_path):
    sink, _ = sinks_in(tmp_path, trace=False)
    sink.write(make_report())
    (row,) = read_jsonl(sink.path)
    assert set(ORIGIN) <= set(row)
    assert StepReport.from_dict(row) == make_report()


def test_jsonl_survives_a_killed_run(tmp_path):
    sink = JsonlSink(tmp_path / "reports.jsonl")
    sink.write(make_report())
    whole = sink.path.read_bytes()
    sink.path.write_bytes(whole + whole[: len(whole) // 2])
    sink.write(make_report(step=14))
    with pytest.warns(UserWarning, match="skipped 1 half-written or damaged lines: 2$"):
        rows = read_jsonl(sink.path)
    assert [row["step"] for row in rows] == [12, 14]


def test_json_numbers_are_finite_or_null(tmp_path):
    sink = JsonlSink(tmp_path / "reports.jsonl")
    sink.write(make_report(entropy=math.nan, no_speculation_s=math.inf))
    row = read_jsonl(sink.path)[0]
    assert row["entropy"] is None
    assert row["no_speculation_s"] is None
    assert row["speedup_estimate"] is None


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\xff\xfe{}\n[1]\n{"step": 2, "text": "\xff"}\n' + b"[" * 20_000 + b'\n\n{"step": 3}\n'
    )
    with pytest.warns(UserWarning, match="skipped 4 half-written or damaged lines: 2, 3, 4, 5$"):
        assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize(("world", "name"), [("1", "controller.jsonl"), ("2", "controller.rank1.jsonl")])
def test_each_rank_has_a_trace_of_its_own(world, name, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", world)
    reports, trace = sinks_in(tmp_path, trace=True)
    reports.write(make_report())
    trace.write_rows([{"step": 0}])
    assert sorted(file.name for file in tmp_path.iterdir()) == [name, "rollouts.jsonl"]
    assert read_jsonl(tmp_path / name)[0]["rank"] == 1
