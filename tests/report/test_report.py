"""Reports: seconds that add up, weight-correct sums, sinks that survive."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import PHASES, StepReport, amdahl_bound, concatenate, merge, thin_curve
from atlas_rl.report.sinks import (
    CONSOLE_WIDTH,
    JsonlSink,
    console_line,
    console_warnings,
    read_jsonl,
    summary_table,
    trainer_metrics,
)


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def make_report(**changes):
    values = {
        "step": 12,
        "policy_version": 12,
        "mode": "train",
        "num_requests": 2,
        "num_prompt_tokens": 40,
        "num_tokens": 30,
        "num_forwards": 10,
        "num_request_forwards": 14,
        "num_decoded_tokens": 28,
        "drafted": {"history": 24},
        "accepted": {"history": 14},
        "drafted_by_position": (14, 10),
        "accepted_by_position": (10, 4),
        "generate_s": 2.0,
        "forward_s": 1.5,
        "other_s": 0.5,
        "entropy": 0.3,
        "mean_max_prob": 0.9,
        "num_scored_tokens": 30,
        "no_speculation_s": 3.0,
        "step_s": 5.0,
        "active_batch_curve": ((0, 2), (6, 2), (9, 1)),
        "completion_lengths": (10, 20),
    }
    return StepReport(**(values | changes))


def finish(recorder, **changes):
    values = {
        "step": 0,
        "policy_version": 0,
        "mode": "standalone",
        "num_prompt_tokens": 4,
        "completion_lengths": [3, 5],
    }
    return recorder.finish(**(values | changes))


def seconds_of(report):
    return {name: getattr(report, f"{name}_s") for name in (*PHASES, "other")}


def test_seconds_are_exclusive_and_add_up():
    clock = Clock()
    recorder = StepRecorder(clock=clock)
    with recorder.time("sync"):  # ahead of the generation, and part of it
        clock.advance(0.25)
    clock.advance(50.0)  # the trainer's own time is nobody's
    with recorder.generating():
        clock.advance(1.0)
        with recorder.time("forward"):
            clock.advance(2.0)
            with recorder.time("sample"):
                clock.advance(0.5)
            clock.advance(4.0)
        clock.advance(0.125)
        with recorder.time("forward"):
            clock.advance(8.0)
    report = finish(recorder)
    expected = dict.fromkeys((*PHASES, "other"), 0.0) | {"sync": 0.25, "forward": 14.0, "sample": 0.5, "other": 1.125}
    assert seconds_of(report) == expected
    assert report.generate_s == pytest.approx(sum(expected.values()), abs=1e-12)


def test_seconds_add_up_after_an_exception():
    clock = Clock()
    recorder = StepRecorder(clock=clock)
    with pytest.raises(ZeroDivisionError), recorder.generating(), recorder.time("draft"):  # noqa: PT012
        clock.advance(1.0)
        1 / 0  # noqa: B018
    with recorder.generating():
        clock.advance(2.0)
    report = finish(recorder)
    assert (report.draft_s, report.other_s, report.generate_s) == (1.0, 2.0, 3.0)


def test_finish_inside_a_timer_and_unknown_phases_are_refused():
    recorder = StepRecorder()
    with recorder.generating(), pytest.raises(RuntimeError, match="inside"):
        finish(recorder)
    with pytest.raises(KeyError):
        recorder.time("lunch")


def test_counts_per_speculator_and_position():
    recorder = StepRecorder(speculators=("history", "draft_lm", "idle"))
    recorder.forward(
        num_committed=np.array([3, 1, 1]),
        num_drafted=np.array([3, 2, 0]),
        num_accepted=np.array([2, 0, 0]),
        arms=np.array([0, 1, -1]),
    )
    recorder.forward(num_committed=np.array([1, 2]), num_drafted=np.array([0, 1]), num_accepted=np.array([0, 1]))
    recorder.forward(num_committed=np.array([1]))
    report = finish(recorder, completion_lengths=[6, 2, 3])
    assert report.drafted == {"history": 4, "draft_lm": 2, "idle": 0}
    assert report.accepted == {"history": 3, "draft_lm": 0, "idle": 0}
    assert report.drafted_by_position == (3, 2, 1)
    assert report.accepted_by_position == (2, 1, 0)
    assert report.acceptance_by_position == (2 / 3, 1 / 2, 0.0)
    assert report.acceptance_rate == 3 / 6
    assert (report.num_forwards, report.num_request_forwards, report.num_decoded_tokens) == (3, 6, 9)
    assert report.accepted_length == 9 / 6
    assert report.num_tokens == 11  # two of them drawn from prefills
    assert report.active_batch_curve == ((0, 3), (1, 2), (2, 1))


def test_counting_in_bulk_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    calls = []
    for _ in range(200):
        drafted = rng.integers(0, 5, 7)
        accepted = rng.integers(0, drafted + 1)
        calls.append((accepted + 1, drafted, accepted, rng.integers(0, 2, 7)))
    reports = []
    for rows in (1, 64, 1 << 16):
        monkeypatch.setattr("atlas_rl.report.recorder._FLUSH_ROWS", rows)
        recorder = StepRecorder(speculators=("a", "b"), clock=Clock())
        for committed, drafted, accepted, arms in calls:
            recorder.forward(num_committed=committed, num_drafted=drafted, num_accepted=accepted, arms=arms)
        reports.append(finish(recorder))
    assert reports[0] == reports[1] == reports[2]
    assert (
        sum(reports[0].drafted.values()) == sum(reports[0].drafted_by_position) == sum(int(c[1].sum()) for c in calls)
    )
    assert sum(reports[0].accepted_by_position) == sum(int(c[2].sum()) for c in calls)


def test_wrong_counts_are_refused():
    recorder = StepRecorder(speculators=("a",))
    recorder.forward(num_committed=np.array([3]), num_drafted=np.array([1]), num_accepted=np.array([2]))
    with pytest.raises(ValueError, match="more draft tokens"):
        finish(recorder)
    with pytest.raises(ValueError, match="speculators"):
        StepRecorder().forward(num_committed=np.array([1]), num_drafted=np.array([0]), num_accepted=np.array([0]))


def test_nothing_recorded_makes_a_report_without_a_division_by_zero():
    report = finish(StepRecorder(clock=Clock()), completion_lengths=[])
    assert report.tokens_per_s == 0
    assert report.accepted_length == 1
    assert report.us_per_token is report.entropy is report.acceptance_rate is report.completion_length_mean is None
    assert report.drafted_by_position == ()
    assert not report.speculation
    json.dumps(report.to_dict(), allow_nan=False)
    assert console_line(report)
    assert summary_table([report])


def test_entropy_is_a_mean_over_tokens():
    recorder = StepRecorder()
    recorder.distribution(entropy_sum=3.0, max_prob_sum=0.5, num_tokens=1)
    recorder.distribution(entropy_sum=0.0, max_prob_sum=3.0, num_tokens=3)
    report = finish(recorder)
    assert (report.entropy, report.mean_max_prob, report.num_scored_tokens) == (0.75, 0.875, 4)


def test_warnings_are_said_once():
    recorder = StepRecorder()
    for message in ("no drafts: a", "no drafts: a", "no drafts: b"):
        recorder.warn(message)
    report = finish(recorder)
    assert console_warnings(report) == ["atlas warning: no drafts: a", "atlas warning: no drafts: b"]
    assert "2 warnings" in console_line(report)


def test_recording_an_iteration_costs_microseconds():
    """An upper bound with room for a busy machine: the best of several rounds over a loop of nine timers."""
    recorder = StepRecorder(speculators=("a", "b"))
    arrays = {
        "num_committed": np.ones(32, np.int64),
        "num_drafted": np.ones(32, np.int64),
        "num_accepted": np.zeros(32, np.int64),
        "arms": np.zeros(32, np.int64),
    }
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        with recorder.generating():
            for _ in range(200):
                for phase in ("controller", "draft", "forward", "sample", "commit", "observe"):
                    with recorder.time(phase):
                        pass
                recorder.forward(**arrays)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 100e-6


def test_derived_figures():
    report = make_report()
    assert report.tokens_per_s == 15
    assert report.us_per_token == pytest.approx(2e6 / 30)
    assert report.accepted_length == 2
    assert report.no_speculation_tokens_per_s == 10
    assert report.speedup_estimate == 1.5
    assert report.generation_share == 0.4
    assert report.amdahl_bound == pytest.approx(1 / (0.5 / 2 + 0.5))  # 3 s of 6 s without speculation, alpha 2
    assert (report.completion_length_mean, report.completion_length_p50, report.completion_length_max) == (15, 15, 20)
    assert make_report(step_s=None).amdahl_bound is None
    assert make_report(no_speculation_s=None).amdahl_bound is None
    assert make_report(baseline_tokens_per_s=12.0).speedup_measured == 1.25
    assert make_report(completion_lengths=(1, 9, 2)).completion_length_p50 == 2


def test_amdahl_formula():
    assert amdahl_bound(0.0, 5) == 1
    assert amdahl_bound(1.0, 5) == pytest.approx(5)
    assert amdahl_bound(0.7, 2.0) == pytest.approx(1 / (0.35 + 0.3))
    for share, alpha in ((1.1, 2), (-0.1, 2), (0.5, 0)):
        with pytest.raises(ValueError, match="share"):
            amdahl_bound(share, alpha)


def test_merge_of_ranks_is_weight_correct():
    slow = make_report(num_tokens=10, num_request_forwards=10, num_decoded_tokens=10, entropy=0.1, num_scored_tokens=10)
    fast = make_report(
        num_tokens=90,
        num_request_forwards=30,
        num_decoded_tokens=90,
        entropy=0.5,
        num_scored_tokens=90,
        generate_s=1.0,
        forward_s=1.0,
        other_s=0.0,
        drafted={"history": 76, "draft_lm": 5},
        accepted={"history": 56, "draft_lm": 1},
        drafted_by_position=(30, 30, 21),
        accepted_by_position=(25, 20, 12),
        active_batch_curve=((0, 4), (3, 4)),
        completion_lengths=(90,),
        scored={"history": 60, "draft_lm": 5},
        calibration_error={"history": 0.1, "draft_lm": 0.3},
        warnings=("x",),
    )
    slow = replace(slow, scored={"history": 20}, calibration_error={"history": 0.5})
    both = merge([slow, fast])
    assert both == merge([slow, fast])
    assert both.num_tokens == 100
    assert (both.generate_s, both.forward_s, both.other_s) == (2.0, 1.5, 0.5)  # the slowest rank's, still adding up
    assert both.tokens_per_s == 50
    assert both.accepted_length == 100 / 40
    assert both.acceptance_rate == (14 + 57) / (24 + 81)
    assert both.acceptance_by_position == (35 / 44, 24 / 40, 12 / 21)
    assert both.entropy == pytest.approx(0.46)
    assert both.drafted == {"history": 100, "draft_lm": 5}
    assert both.scored == {"history": 80, "draft_lm": 5}
    assert both.calibration_error == pytest.approx({"history": 0.2, "draft_lm": 0.3})
    assert both.active_batch_curve == ((0, 6), (3, 6), (6, 2), (9, 1))
    assert both.completion_lengths == (10, 20, 90)
    assert both.warnings == ("x",)
    assert merge([slow, make_report(no_speculation_s=None)]).no_speculation_s is None
    assert merge([make_report(entropy=None, num_scored_tokens=0), fast]).entropy == 0.5


def test_audits_of_ranks_and_of_steps_add_up():
    first = make_report(
        num_audited_tokens=10,
        audit_score_nats=-4.0,
        audit_score_variance_nats2=9.0,
        audit_logprob_error_nats=0.1,
        audit_evidence_nats=5.0,
    )
    second = replace(
        first, num_audited_tokens=30, audit_score_nats=14.0, audit_score_variance_nats2=16.0, audit_evidence_nats=1.0
    )
    none = make_report()
    assert first.audit_z == pytest.approx(-4 / 3)
    assert none.audit_z is None
    for both, evidence in ((merge([first, none, second]), 5.0), (concatenate([first, none, second]), 1.0)):
        assert both.num_audited_tokens == 40
        assert both.audit_z == pytest.approx(10 / 5)
        assert both.audit_evidence_nats == evidence
    second = replace(second, audit_logprob_error_nats=0.3)
    assert merge([first, none, second]).audit_logprob_error_nats == pytest.approx(0.25)
    assert console_line(replace(first, entropy=None)).endswith("| 30 tok in 2.0 s | audit z -1.3")
    assert trainer_metrics(first)["atlas/audit/evidence_nats"] == 5.0
    assert "atlas/audit/z" not in trainer_metrics(none)


def test_merge_of_unlike_reports_is_refused():
    with pytest.raises(ValueError, match="policy_version"):
        merge([make_report(), make_report(policy_version=11)])
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_concatenation_adds_seconds():
    two = concatenate(
        [make_report(step=1, baseline_tokens_per_s=10.0), make_report(step=2, baseline_tokens_per_s=30.0)]
    )
    assert (two.step, two.num_tokens, two.generate_s, two.forward_s, two.step_s) == (2, 60, 4.0, 3.0, 10.0)
    assert two.tokens_per_s == 15
    assert two.baseline_tokens_per_s == 60 / (3 + 1)  # total tokens over total seconds
    assert two.active_batch_curve == ((0, 2), (6, 2), (9, 1), (10, 2), (16, 2), (19, 1))


def test_curve_is_thinned_with_its_ends():
    curve = [(i, 1000 - i) for i in range(1000)]
    thin = thin_curve(curve)
    assert len(thin) == 64
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert sorted(set(thin)) == list(thin)


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


def test_trainer_metrics_are_finite_floats_under_one_prefix():
    metrics = trainer_metrics(make_report(entropy=None))
    assert all(name.startswith("atlas/") and type(value) is float for name, value in metrics.items())
    assert "atlas/entropy" not in metrics
    assert metrics["atlas/accepted/history"] == 14
    assert metrics["atlas/acceptance_at/1"] == 0.4
    assert metrics["atlas/time/forward_s"] == 1.5


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


def test_jsonl_survives_a_killed_run(tmp_path):
    sink = JsonlSink(tmp_path / "reports.jsonl")
    sink.write(make_report())
    whole = sink.path.read_bytes()
    sink.path.write_bytes(whole + whole[: len(whole) // 2])
    sink.write(make_report(step=14))
    with pytest.warns(UserWarning, match=":2: half-written"):
        rows = read_jsonl(sink.path)
    assert [row["step"] for row in rows] == [12, 14]


def test_json_numbers_are_finite_or_null(tmp_path):
    sink = JsonlSink(tmp_path / "reports.jsonl")
    sink.write(make_report(entropy=math.nan, no_speculation_s=math.inf))
    row = read_jsonl(sink.path)[0]
    assert row["entropy"] is None
    assert row["no_speculation_s"] is None
    assert row["speedup_estimate"] is None


def test_summary_table_uses_totals():
    runs = [make_report(), make_report(generate_s=4.0, other_s=2.5)]
    plain = [make_report(drafted={}, accepted={}, generate_s=6.0, num_request_forwards=28, num_forwards=20)] * 2
    table = summary_table(runs, baseline=plain)
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = {row[1].strip(): [c.strip() for c in row[2:-1]] for row in (line.split("|") for line in lines)}
    assert cells["tokens/s"] == ["10.0", "5.0", "2.00x"]
    assert cells["target forwards"] == ["20", "40", "0.50x"]
    assert cells["accepted / drafted, history"] == ["28 / 48", "-", ""]
    with pytest.raises(ValueError, match="same steps"):
        summary_table(runs, baseline=plain[:1])
