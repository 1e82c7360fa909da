"""Which lines of report files make a run, and what is left out and said."""

import json
from dataclasses import fields

import pytest

from atlas_rl.report.page.checking import FORMS, report_of
from atlas_rl.report.page.reading import read_runs
from atlas_rl.report.report import StepReport
from tests.report.page.runs import steps, write
from tests.reports import make_report


def test_a_run_is_read_from_its_folder_or_its_file(tmp_path):
    folder = write(tmp_path / "demo", [("a", 0, report) for report in steps(range(3))])
    (run,) = read_runs([folder], now_s=1e12)
    assert (run.name, run.mode, run.notes) == ("demo", "train", ())
    assert run.steps == tuple(steps(range(3)))
    assert read_runs([folder / "rollouts.jsonl"], now_s=1e12) == [run]


def test_ranks_are_merged_and_a_step_that_one_lacks_is_left_out(tmp_path):
    lines = [(f"e{rank}", rank, report) for report in steps(range(3)) for rank in (0, 1)]
    (run,) = read_runs([write(tmp_path, lines[:-1])], now_s=1e12)
    assert [report.num_tokens for report in run.steps] == [60, 60]
    assert "2 ranks are merged" in run.notes[0]
    assert run.notes[1].startswith("1 step was left out")


def test_several_generations_of_a_step_stay_apart(tmp_path):
    (run,) = read_runs([write(tmp_path, [("a", 0, make_report())] * 3)])
    assert len(run.steps) == 3


def test_a_resumed_run_goes_on(tmp_path):
    lines = [("a", 0, r) for r in steps(range(6))] + [("b", 0, r) for r in steps(range(4, 8), num_tokens=99)]
    (run,) = read_runs([write(tmp_path, lines)], now_s=1e12)
    assert [(report.step, report.num_tokens) for report in run.steps] == [
        *((n, 30) for n in range(4)),
        *((n, 99) for n in range(4, 8)),
    ]
    assert run.notes == ("The run was resumed at step 4; 2 steps were done again.",)


def test_a_run_resumed_with_more_ranks_goes_on(tmp_path):
    lines = [("a", 0, r) for r in steps(range(1, 6))]
    lines += [(engine, rank, r) for r in steps(range(6, 11)) for engine, rank in (("b", 0), ("c", 1))]
    (run,) = read_runs([write(tmp_path, lines)], earlier=True, now_s=1e12)
    assert [report.num_tokens for report in run.steps] == [30] * 5 + [60] * 5
    assert "2 ranks are merged" in run.notes[1]


def test_a_run_resumed_with_fewer_ranks_goes_on(tmp_path):
    lines = [(f"e{rank}", rank, r) for r in steps(range(5)) for rank in (2, 0, 1)]
    lines += [(f"f{rank}", rank, r) for r in steps(range(3, 8)) for rank in (0, 1)]
    (run,) = read_runs([write(tmp_path, lines)], earlier=True, now_s=1e12)
    assert [report.num_tokens for report in run.steps] == [90] * 3 + [60] * 5


def test_ranks_whose_files_were_joined_are_merged(tmp_path):
    """One after another, and both resumed: the engines with most steps in common ran together."""
    of_rank = [steps(range(5)), steps(range(4, 8))]
    lines = [(f"{name}{rank}", rank, r) for rank in (0, 1) for name, of in zip("ab", of_rank, strict=True) for r in of]
    runs = read_runs([write(tmp_path, lines)], earlier=True, now_s=1e12)
    assert [[(report.step, report.num_tokens) for report in run.steps] for run in runs] == [
        [(report.step, 60) for report in of] for of in of_rank
    ]


def test_two_engines_of_every_rank_are_two_runs(tmp_path):
    lines = [(f"{name}{rank}", rank, r) for r in steps(range(3)) for rank in (1, 0) for name in "ab"]
    runs = read_runs([write(tmp_path, lines)], now_s=1e12)
    assert [[report.num_tokens for report in run.steps] for run in runs] == [[60] * 3] * 2


def test_a_rank_without_a_step_in_common_is_said(tmp_path):
    lines = [("a", 0, r) for r in steps(range(3))] + [("b", 1, r) for r in steps(range(7, 9))]
    (run,) = read_runs([write(tmp_path, lines)], now_s=1e12)
    assert [report.num_tokens for report in run.steps] == [30] * 5
    assert "Rank 1 is shown by itself: its lines share no step with another rank's." in run.notes


def test_earlier_runs_are_left_out_unless_asked_for(tmp_path):
    lines = [("a", 0, r) for r in steps(range(3))] + [("b", 0, r) for r in steps(range(2))]
    folder = write(tmp_path / "demo", lines)
    (run,) = read_runs([folder], now_s=1e12)
    assert len(run.steps) == 2
    assert "--all" in run.notes[0]
    assert [(run.name, len(run.steps)) for run in read_runs([folder], earlier=True)] == [("demo #1", 3), ("demo #2", 2)]


def test_engines_that_ran_at_once_are_shown_apart(tmp_path):
    lines = [(engine, 0, report) for report in steps(range(3)) for engine in "ab"]
    assert [run.name for run in read_runs([write(tmp_path / "demo", lines)])] == ["demo #1", "demo #2"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: json.dumps(row)[:100],
        lambda row: json.dumps(row | {"generate_s": "soon"}),
        lambda row: json.dumps(row | {"generate_s": None}),
        lambda row: json.dumps(row | {"drafted": {"history": -1}}),
        lambda row: json.dumps(row | {"accepted": {}}),
        lambda row: json.dumps(row | {"accepted_by_position": []}),
        lambda row: json.dumps(row | {"active_batch_curve": [[1, 2, 3]]}),
        lambda row: json.dumps(row | {"mode": ["train"]}),
        lambda row: json.dumps({key: value for key, value in row.items() if key != "num_tokens"}),
        lambda row: json.dumps(row | {"generate_s": -1.0}),
        lambda row: json.dumps(row | {"no_speculation_s": -1.0}),
        lambda row: json.dumps(row | {"generate_s": 1e-320}),
        lambda row: json.dumps(row | {"forward_s": 1e308}),
        lambda row: json.dumps(row | {"entropy": 10**400}),
        lambda row: json.dumps(row | {"num_tokens": 10**400}),
        lambda row: json.dumps(row | {"completion_lengths": [10**400]}),
        lambda row: json.dumps(row | {"generate_s": float("nan")}),
        lambda row: json.dumps(row | {"step_s": float("inf")}),
        lambda row: "[]",
        lambda row: '"' + "x" * 20,
        lambda row: "\x00\ufffd",
    ],
)
def test_damaged_lines_are_skipped_and_counted(tmp_path, damage):
    folder = write(tmp_path, [("a", 0, report) for report in steps(range(3))])
    with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write(damage({"engine": "a", "rank": 0, **make_report().to_dict()}) + "\n")
    (run,) = read_runs([folder], now_s=1e12)
    assert len(run.steps) == 3
    assert "line (4) was skipped" in run.notes[0]


def test_figures_of_other_versions_are_named(tmp_path):
    row = {**make_report().to_dict(), "reward": 0.5}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row))
    (run,) = read_runs([tmp_path], now_s=1e12)
    assert run.notes == ("Figures that this version does not know are left out: reward.",)


def test_a_run_that_may_be_going_on_is_said(tmp_path):
    folder = write(tmp_path, [("a", 0, report) for report in steps(range(3))])
    written_s = (folder / "rollouts.jsonl").stat().st_mtime
    assert "12 s before" in read_runs([folder], now_s=written_s + 12)[0].notes[0]
    assert not read_runs([folder], now_s=written_s + 100)[0].notes


def test_training_steps_go_before_evaluations(tmp_path):
    lines = [("a", 0, r) for r in [*steps(range(2)), *steps([1], mode="eval")]]
    (run,) = read_runs([write(tmp_path, lines)], now_s=1e12)
    assert (run.mode, len(run.steps)) == ("train", 2)
    assert run.notes == ("1 line was left out, of other modes than train.",)


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / name / "atlas", [("a", 0, make_report())]) for name in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/atlas", "y/atlas"]
    assert read_runs(folders[:1])[0].name == "atlas"


def test_what_is_no_run_is_refused_with_a_hint(tmp_path):
    folder = write(tmp_path / "a" / "b", [("a", 0, make_report())])
    with pytest.raises(ValueError, match=r"did you mean .*a/b\?"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="there is no"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folder, folder / "rollouts.jsonl"])
    (tmp_path / "rollouts.jsonl").write_text('{"call": 1}\n')
    with pytest.raises(ValueError, match="holds no step report: it lacks step"):
        read_runs([tmp_path])
    for text, message in (("", "no step has ended yet"), ('{"step": 1, "po', "its lines are half-written or damaged")):
        (tmp_path / "rollouts.jsonl").write_text(text)
        with pytest.raises(ValueError, match=f"holds no step report: {message}"):
            read_runs([tmp_path])


def test_every_field_is_checked():
    assert {str(field.type) for field in fields(StepReport)} == set(FORMS)
    report = make_report()
    assert report_of(report.to_dict()) == report
