"""Sums of reports are weight-correct, over ranks and over steps."""

from dataclasses import fields, replace

import pytest

from atlas_rl.report.report import StepReport
from atlas_rl.report.sums import concatenate, merge, thin_curve
from tests.reports import make_report


@pytest.mark.parametrize("field", fields(StepReport), ids=lambda field: field.name)
def test_every_field_says_how_it_adds_up_and_what_it_is(field):
    assert set(field.metadata) == {"ranks", "steps"}
    assert all(map(callable, field.metadata.values()))
    assert f"\n        {field.name}: " in StepReport.__doc__


@pytest.mark.parametrize("add_up", [merge, concatenate])
def test_the_sum_of_one_report_is_that_report(add_up):
    report = make_report(
        scored={"history": 30},
        calibration_error={"history": 0.25},
        baseline_tokens_per_s=12.0,
        num_audited_tokens=10,
        audit_score_nats=-4.0,
        audit_logprob_error_nats=0.5,
        audit_evidence_nats=5.0,
        warnings=("x",),
    )
    assert add_up([report]) == report


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


def test_merge_of_unlike_reports_is_refused():
    with pytest.raises(ValueError, match="policy_version"):
        merge([make_report(), make_report(policy_version=11)])
    for add_up in (merge, concatenate):
        with pytest.raises(ValueError, match="at least one"):
            add_up([])


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


@pytest.mark.parametrize("ranks", [((100, 1.0), (100, 1.0)), ((200, 1.0), (20, 0.1)), ((200, 1.0), (40, 0.1))])
def test_ranks_that_gain_nothing_gain_nothing_together(ranks):
    """The trainer waits for the slowest rank, with speculation and without."""
    reports = [
        make_report(num_tokens=tokens, generate_s=seconds, baseline_tokens_per_s=tokens / seconds)
        for tokens, seconds in ranks
    ]
    assert [report.speedup_measured for report in reports] == pytest.approx([1.0, 1.0])
    assert merge(reports).speedup_measured == pytest.approx(1.0)


def test_ranks_that_gain_alike_gain_that_together():
    twice = [
        make_report(num_tokens=tokens, generate_s=seconds, baseline_tokens_per_s=tokens / seconds / 2)
        for tokens, seconds in ((300, 3.0), (20, 0.1))
    ]
    assert merge(twice).speedup_measured == pytest.approx(2.0)
    assert merge([twice[0], make_report(baseline_tokens_per_s=None)]).speedup_measured is None
