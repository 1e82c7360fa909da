"""The recorder: seconds that add up, counts, and what it refuses."""

import json

import numpy as np
import pytest

from atlas_rl.report import recorder as recorder_module
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import PHASES
from atlas_rl.report.sinks import console_line, console_warnings, summary_table
from tests.reports import Clock


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


def test_a_context_that_switches_phases_reads_the_clock_once_for_each():
    clock = Clock()
    recorder = StepRecorder(clock=clock)
    with recorder.generating():
        with recorder.time("controller"):
            clock.advance(1.0)
            assert recorder.switch("draft") == clock()
            assert recorder.running == "draft"
            clock.advance(2.0)
            with recorder.time("observe"):
                clock.advance(0.5)
            clock.advance(4.0)
            recorder.switch("controller")
            clock.advance(8.0)
        clock.advance(0.25)
    report = finish(recorder)
    seconds = {"controller": 9.0, "draft": 6.0, "observe": 0.5, "other": 0.25}
    assert seconds_of(report) == dict.fromkeys((*PHASES, "other"), 0.0) | seconds


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
        drafters=np.array([0, 1, -1]),
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
            recorder.forward(num_committed=committed, num_drafted=drafted, num_accepted=accepted, drafters=arms)
        reports.append(finish(recorder))
    assert reports[0] == reports[1] == reports[2]
    assert (
        sum(reports[0].drafted.values()) == sum(reports[0].drafted_by_position) == sum(int(c[1].sum()) for c in calls)
    )
    assert sum(reports[0].accepted_by_position) == sum(int(c[2].sum()) for c in calls)


def test_the_loop_puts_arrays_aside_and_counts_them_once(monkeypatch):
    """200 iterations of the decode loop count nothing until the report is made."""
    counted = []
    bincount = np.bincount
    monkeypatch.setattr(
        np, "bincount", lambda rows, *args, **options: counted.append(len(rows)) or bincount(rows, *args, **options)
    )
    recorder = StepRecorder(speculators=("a", "b"))
    ones, zeros = np.ones(32, np.int64), np.zeros(32, np.int64)
    assert recorder_module._FLUSH_ROWS > 200 * 32
    for _ in range(200):
        recorder.forward(num_committed=ones, num_drafted=ones, num_accepted=zeros, drafters=zeros)
    assert counted == []
    assert finish(recorder).drafted == {"a": 6400, "b": 0}
    assert counted == [6400] * 4  # per speculator and by position, drafted and accepted


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
