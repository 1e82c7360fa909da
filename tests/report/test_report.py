"""Figures that are derived from a report, and the formulas behind them."""

from dataclasses import replace

import numpy as np
import pytest

from atlas_rl.report.recorder import StepRecorder
from atlas_rl.report.report import amdahl_bound, no_speculation_seconds, rerun_tokens_per_s, with_sync
from tests.reports import Clock, make_report


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


def test_no_speculation_pays_for_its_own_turns():
    report = make_report(prefill_s=1.0, draft_s=64.0, sample_s=2.0, commit_s=4.0, controller_s=64.0, other_s=8.0)
    turns = 3 * report.num_forwards
    assert no_speculation_seconds(report, turns, 16.0) == 1.0 + 2.0 + 3 * (4.0 + 8.0) + 16.0
    assert no_speculation_seconds(report, turns, None) is None


def test_no_speculation_draws_no_rejected_positions():
    counts = {"num_tokens": 30, "num_decoded_tokens": 28, "num_request_forwards": 14, "drafted": {"history": 44}}
    report = make_report(sample_s=2.0, accepted={"history": 14}, **counts)
    whole = no_speculation_seconds(report, 28, 1.0)
    # Two first tokens, 14 positions after drafts and 44 drafted ones were drawn for the 30 tokens.
    assert whole - no_speculation_seconds(report, 28, 1.0, draws_all=True) == pytest.approx(2.0 * (1 - 30 / 60))


def test_amdahl_formula():
    assert amdahl_bound(0.0, 5) == 1
    assert amdahl_bound(1.0, 5) == pytest.approx(5)
    assert amdahl_bound(0.7, 2.0) == pytest.approx(1 / (0.35 + 0.3))
    for share, alpha in ((1.1, 2), (-0.1, 2), (0.5, 0)):
        with pytest.raises(ValueError, match="share"):
            amdahl_bound(share, alpha)


def test_weights_come_in_with_speculation_and_without():
    report = make_report(num_tokens=30, generate_s=2.0, sync_s=0.0, no_speculation_s=3.0, baseline_tokens_per_s=10.0)
    synced = with_sync(report, 1.0)
    assert (synced.sync_s, synced.generate_s, synced.no_speculation_s) == (1.0, 3.0, 4.0)
    assert synced.baseline_tokens_per_s == pytest.approx(30 / 4)
    assert synced.speedup_measured == pytest.approx(synced.speedup_estimate) == pytest.approx(4 / 3)
    unknown = with_sync(make_report(no_speculation_s=None), 1.0)
    assert unknown.no_speculation_s is None
    assert unknown.baseline_tokens_per_s is None


def recorded(**seconds):
    """The report of a step that took these seconds: two forwards, of two tokens each."""
    clock = Clock()
    recorder = StepRecorder(speculators=("history",), clock=clock)
    with recorder.generating():
        for phase, took in seconds.items():
            with recorder.time(phase):
                clock.advance(took)
        for _ in range(2):
            recorder.forward(num_committed=np.array([2]))
    return recorder.finish(step=0, policy_version=0, mode="train", num_prompt_tokens=1, completion_lengths=[4])


def test_an_audit_is_paid_with_speculation_and_without():
    phases = {"prefill": 1.0, "forward": 4.0, "sample": 2.0, "commit": 1.0}
    report = recorded(**phases, audit=1.0)
    assert (report.audit_s, report.generate_s) == (1.0, 9.0)
    estimated = replace(report, no_speculation_s=no_speculation_seconds(report, report.num_forwards, report.forward_s))
    assert estimated.speedup_estimate == 1
    measured = replace(report, baseline_tokens_per_s=rerun_tokens_per_s(report, recorded(**phases)))
    assert measured.speedup_measured == pytest.approx(1)
    synced = with_sync(report, 3.0)
    assert replace(synced, baseline_tokens_per_s=rerun_tokens_per_s(synced, recorded(**phases))).speedup_measured == 1
