"""The engine's reports, the warnings in them, and the controller's trace."""

from __future__ import annotations

import json

import numpy as np
import pytest

from atlas_rl import AtlasRolloutEngine, StepReport
from atlas_rl.controller.fixed import FixedController
from atlas_rl.report.report import PHASES
from atlas_rl.report.sinks import read_jsonl
from atlas_rl.rollout import engine as engine_module
from tests.drafters import Parrot, RandomDrafter
from tests.engines import ARMS, VOCAB, Mute, engine_of, fixed, generate, parrot, policy, reference


@pytest.mark.parametrize("arm", ["controller, four", "parrot, 30% wrong, k=3", "draft LM, k=3"])
def test_a_report_adds_up(arm):
    engine = ARMS[arm]()
    output = generate(engine)
    report = output.report
    lengths = [len(row) for row in output.completion_ids]
    assert report.num_tokens == report.num_scored_tokens == sum(lengths)
    assert report.completion_lengths == tuple(lengths)
    assert report.num_requests == 10
    assert report.num_prompt_tokens == sum(map(len, output.prompt_ids))
    assert report.num_decoded_tokens == sum(lengths) - 10  # the first of each comes from the prefill
    accepted = sum(report.accepted.values())
    # Every request and forward commits its accepted drafts and one more, unless an accepted draft ended it.
    assert 0 <= report.num_request_forwards + accepted - report.num_decoded_tokens <= 10
    assert report.accepted_length == report.num_decoded_tokens / report.num_request_forwards
    assert all(report.drafted[name] >= report.accepted[name] >= 0 for name in report.drafted)
    assert sum(report.drafted_by_position) == sum(report.drafted.values())
    assert sum(report.accepted_by_position) == accepted
    assert list(report.drafted_by_position) == sorted(report.drafted_by_position, reverse=True)
    seconds = [getattr(report, f"{phase}_s") for phase in (*PHASES, "other")]
    assert min(seconds) >= 0
    assert sum(seconds) == pytest.approx(report.generate_s)
    assert min(report.prefill_s, report.forward_s, report.sample_s, report.draft_s) > 0
    assert report.tokens_per_s == pytest.approx(report.num_tokens / report.generate_s)
    assert report.mode == "standalone"
    assert report.policy_version == 0


def test_a_report_without_speculation():
    report = reference().report
    assert not report.speculation
    assert report.accepted_length == 1
    assert report.acceptance_rate is None
    assert report.no_speculation_s is None
    assert report.num_forwards == max(report.completion_lengths) - 1
    assert report.draft_s == 0


def test_the_newest_reports_are_kept(monkeypatch):
    monkeypatch.setattr(engine_module, "_KEPT_REPORTS", 2)
    engine = engine_of()
    reports = [generate(engine, [[1]], max_new_tokens=1).report for _ in range(3)]
    assert engine.reports == reports[1:]


def test_reports_are_kept_printed_and_written(tmp_path, capsys):
    engine = AtlasRolloutEngine(model=policy(), output_dir=tmp_path / "new" / "folder")
    first, second = generate(engine), generate(engine)
    assert engine.reports == [first.report, second.report]
    assert [report.step for report in engine.reports] == [0, 1]
    assert len([line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]) == 2
    rows = read_jsonl(tmp_path / "new" / "folder" / "rollouts.jsonl")
    assert len({row.pop("engine") for row in rows}) == 1
    assert [row.pop("rank") for row in rows] == [0, 0]
    assert [StepReport.from_dict(row).to_dict() for row in rows] == [report.to_dict() for report in engine.reports]


def test_a_drafter_that_is_always_wrong_is_named(capsys):
    wrong = [[(token + 1) % VOCAB for token in row] for row in reference().completion_ids]
    engine = AtlasRolloutEngine(
        model=policy(),
        speculators=[Parrot(wrong, error_rate=0)],
        controller=FixedController(["parrot"], "parrot", 4),
    )
    output = generate(engine)
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafted["parrot"] >= 200
    (warning,) = output.report.warnings
    assert "parrot" in warning
    assert "none of" in warning
    assert "parrot" in capsys.readouterr().out


def test_a_drafter_that_proposes_nothing_is_named():
    (warning,) = generate(fixed(Mute(), 4)).report.warnings
    assert "mute" in warning
    assert "proposed none" in warning


def test_a_living_drafter_is_not_warned_of():
    assert not generate(fixed(parrot(0.5), 4)).report.warnings


class AskSome(FixedController):
    """Asks for every second request only, and keeps the draft tokens that it wants of each."""

    def __init__(self, *args):
        super().__init__(*args)
        self.wanted = []

    def plan(self, step):
        plan = {name: np.where(np.arange(step.batch) % 2 == 0, most, 0) for name, most in super().plan(step).items()}
        self.wanted += [most[most > 0].tolist() for most in plan.values() if most.any()]
        return plan


class Watched(RandomDrafter):
    """Keeps the draft tokens that each call asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def propose(self, sequences, requests, max_draft_tokens):
        assert len(requests) == len(max_draft_tokens)
        self.asked.append(max_draft_tokens.tolist())
        return super().propose(sequences, requests, max_draft_tokens)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_speculators_are_asked_for_the_wanted_requests_only(verification):
    drafter = Watched()
    controller = AskSome(["random"], "random", 3)
    output = generate(engine_of(speculators=[drafter], controller=controller, verification=verification))
    assert drafter.asked == controller.wanted
    assert len(drafter.asked[0]) == len(output.completion_ids) / 2
    assert output.report.drafted["random"] > 0
    if verification == "invariant":
        assert output.completion_ids == reference().completion_ids


def test_a_trace_says_what_was_expected_and_what_came(tmp_path):
    engine = engine_of(output_dir=tmp_path, trace=True, speculators=[parrot(0.1)])
    reports = [generate(engine).report for _ in range(2)]
    steps = [json.loads(line) for line in (tmp_path / "controller.jsonl").read_text().splitlines()]
    for call, report in enumerate(reports):
        own = [step for step in steps if step["call"] == call]
        assert [step["step"] for step in own] == list(range(report.num_forwards))
        assert sum(step["tokens"] for step in own) == report.num_decoded_tokens
        forwards_s = sum(step["forward_s"] for step in own)  # with what verification puts in the device's queue
        assert report.forward_s <= forwards_s + 1e-9 <= report.forward_s + report.sample_s
        assert all(step["step_s"] >= step["forward_s"] for step in own)
    assert any(step["admitted"] for step in steps)
    assert sum(reports[-1].scored.values()) > 0
    assert 0 <= reports[-1].calibration_error["parrot"] < 1


def test_a_trace_of_plain_decoding_says_that_nothing_was_asked(tmp_path):
    report = generate(engine_of(output_dir=tmp_path, trace=True, speculators=[])).report
    steps = [json.loads(line) for line in (tmp_path / "controller.jsonl").read_text().splitlines()]
    assert len(steps) == report.num_forwards
    assert not any(step["asked"] or step["admitted"] for step in steps)


def test_a_trace_has_the_steps_without_speculation_too(tmp_path):
    output = generate(engine_of(output_dir=tmp_path, trace=True, speculation=False))
    steps = [json.loads(line) for line in (tmp_path / "controller.jsonl").read_text().splitlines()]
    assert len(steps) == output.report.num_forwards
    assert sum(step["tokens"] for step in steps) == output.report.num_decoded_tokens
    assert not any(step["speculation"] or step["asked"] for step in steps)
