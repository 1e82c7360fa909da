"""Panels and sentences of the page: their figures are the reports' own, and what is missing is said."""

import json
import re

import pytest

from atlas_rl.audit.bets import ALARM
from atlas_rl.report.page import drafting, evidence, reading, speed, thinning
from atlas_rl.report.page import totals as of_runs
from atlas_rl.report.page.figures import Figure, Table, height_px
from atlas_rl.report.page.headline import headline, side_by_side
from atlas_rl.report.page.html import PANELS, page
from atlas_rl.report.page.reading import read_runs
from atlas_rl.report.page.thinning import MOST_POINTS
from atlas_rl.report.page.totals import totals
from atlas_rl.report.page.verdict import verdict
from atlas_rl.report.report import PHASES
from atlas_rl.report.sums import concatenate
from tests.report.page.runs import OFF, long_run, real_folder, run_of, steps
from tests.reports import make_report


def charts(panel):
    return [part for part in panel.parts if isinstance(part, Figure)]


def real_runs():
    return read_runs([real_folder(), real_folder(False)])


RUNS = {
    "real": real_runs,
    "one step": lambda: [run_of(steps([3]))],
    "off": lambda: [run_of(steps(range(5), **OFF))],
    "long": lambda: [run_of(long_run(real_runs()[0].steps, 500))],
    "nothing known": lambda: [
        run_of([make_report(entropy=None, step_s=None, completion_lengths=(), active_batch_curve=(), **OFF)])
    ],
    "nothing generated": lambda: [
        run_of([make_report(num_tokens=0, num_forwards=0, num_request_forwards=0, num_decoded_tokens=0, generate_s=0.0,
                            forward_s=0.0, other_s=0.0, no_speculation_s=0.0, completion_lengths=())])
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("make", PANELS, ids=lambda make: make.__name__)
def test_every_panel_shows_something_or_says_why_not(name, make):
    panel = make(RUNS[name]())
    assert bool(panel.parts) != bool(panel.absent)
    assert panel.sentence.endswith(".")
    for part in panel.parts:
        if isinstance(part, Table):
            assert {len(row) for row in part.rows} == {len(part.header)}
        else:
            assert any(value is not None for trace in part.data for value in trace["y"])
            json.dumps([part.data, part.layout], allow_nan=False)


@pytest.mark.parametrize("name", RUNS)
def test_plotly_takes_every_figure(name):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for make in PANELS:
        for part in charts(make(RUNS[name]())):
            graph_objects.Figure(data=part.data, layout=part.layout)


def test_a_drafter_has_one_colour_on_the_page():
    """Scores begin before the first draft is verified, or in another order."""
    first = {"drafted": {"history": 40}, "accepted": {"history": 20}, "calibration_error": {"eagle3": 0.1},
             "scored": {"eagle3": 9}}  # fmt: skip
    names = ("history", "recurrent", "eagle3")
    later = {
        "drafted": dict.fromkeys(names, 40),
        "accepted": dict.fromkeys(names, 9),
        "scored": dict.fromkeys(names, 40),
    }
    reports = [*steps([0], **first), *steps([1], **later, calibration_error=dict.fromkeys(reversed(names), 0.1))]
    runs = [run_of(reports)]
    lines = [*charts(drafting.speculators(runs))[1].data, *charts(drafting.calibration(runs))[0].data]
    colors = {(trace["name"], trace["line"]["color"]) for trace in lines}
    assert len(lines) == 6
    assert len(colors) == len({color for _, color in colors}) == 3


def test_real_figures_are_those_of_the_reports():
    runs = real_runs()
    reports = runs[0].steps
    assert len(reports) == 4
    (lengths,) = charts(speed.accepted_length(runs))
    assert lengths.data[0]["y"] == [report.accepted_length for report in reports]
    bars = charts(speed.seconds(runs))[0]
    per_token = sum(trace["x"][0] for trace in bars.data)
    total = totals(reports).all
    assert per_token == pytest.approx(total.us_per_token)
    drafted = charts(drafting.speculators(runs))[0]
    assert sum(sum(trace["x"]) for trace in drafted.data) == sum(total.drafted.values()) > 0
    assert not evidence.audit(runs).absent
    assert speed.PHASE_COLORS.keys() == {*PHASES, "other"}


def test_long_runs_are_drawn_as_sums_of_steps():
    run = run_of(long_run(real_runs()[0].steps, 500))
    (chart,) = charts(speed.tokens_per_s([run]))
    assert max(len(trace["x"]) for trace in chart.data) == MOST_POINTS == 250
    first = chart.data[0]["y"][0]
    assert first == sum(r.num_tokens for r in run.steps[:2]) / sum(r.generate_s for r in run.steps[:2])
    assert "2 per point" in chart.layout["xaxis"]["title"]["text"]


def test_the_audits_alarm_is_where_it_is():
    assert pytest.approx(ALARM) == 2.718281828459045**evidence.ALARM_NATS


def test_warnings_come_with_what_to_do():
    gone = "history: none of 900 verified drafts was accepted; its state was lost or belongs to another policy or tokenizer"
    run = run_of([*steps(range(3)), *steps(range(3, 5), warnings=(gone,), drafter_faults={"history": 2})])
    warned, faults = evidence.warnings([run]).parts
    (row,) = warned.rows
    assert row[:2] == (gone, "3 to 4 (2×)")
    assert "saved state" in row[2]
    assert faults.rows == [("history", "4")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"baseline_tokens_per_s": 10.0},
            "Speculation paid: 1.50x the tokens/s of no speculation (measured on 4 of 4",
        ),
        ({"baseline_tokens_per_s": 30.0}, "Speculation cost speed: 0.50x"),
        ({"no_speculation_s": 2.0}, "Speculation made no difference: 1.00x"),
        ({}, "(estimated over 4 of 4 steps, not measured)"),
        ({"no_speculation_s": None}, "not known yet"),
        (OFF, "Speculation was off"),
    ],
)
def test_the_verdict(changes, says):
    assert says in verdict(steps(range(4), **changes))[0]


def test_the_verdict_says_why_and_what_to_change():
    slow = steps(range(4), baseline_tokens_per_s=30.0, draft_s=1.0, forward_s=0.5, accepted={"history": 2})
    said = " ".join(verdict(slow))
    assert "took 50% of the generation" in said
    assert "8% of the draft tokens were accepted at an entropy of 0.30 nats" in said
    assert "speculation=False" in said
    assert "baseline_every" in " ".join(verdict(steps(range(4))))


def test_a_slow_first_step_is_told_apart():
    compiled = [*steps([0], generate_s=40.0), *steps(range(1, 5))]
    assert "Step 0 took 40 s" in verdict(compiled)[1]
    assert "Without it the gain is 1.50x" in verdict(compiled)[1]
    assert "Step 0" not in " ".join(verdict(steps(range(5))))


def test_the_headline_of_one_run_and_of_several():
    tiles = {label: value for label, value, _ in headline(run_of(steps(range(4)))).tiles}
    assert (tiles["tokens/s"], tiles["gain, measured"], tiles["gain, estimated"]) == ("15", "–", "1.50×")
    assert (tiles["rollout's share"], tiles["accepted length"]) == ("40%", "2.00")
    table = side_by_side([run_of(steps(range(4)), "a"), run_of(steps(range(4), **OFF), "b")])
    assert table.header == ("", "a", "b")
    assert ("accepted length", "2.00", "–") in table.rows


def test_the_verdict_says_when_it_paid():
    learning = [*steps(range(6), baseline_tokens_per_s=20.0), *steps(range(6, 12), baseline_tokens_per_s=10.0)]
    said = " ".join(verdict(learning))
    assert "In the first 3 steps it was 0.75x, and in the last 3 it was 1.50x (measured)." in said
    only_late = [*steps(range(6)), *steps(range(6, 12), baseline_tokens_per_s=10.0)]
    assert "In the first 3 steps it was 1.50x, and in the last 3 it was 1.50x (estimated)." in " ".join(
        verdict(only_late)
    )


@pytest.mark.parametrize(("drafters", "advised"), [(("history", "recurrent"), True), (("history", "eagle3"), False)])
def test_a_trained_head_is_advised_where_there_is_none(drafters, advised):
    counts = {"drafted": dict.fromkeys(drafters, 50), "accepted": dict.fromkeys(drafters, 5)}
    said = " ".join(verdict(steps(range(4), baseline_tokens_per_s=30.0, **counts)))
    assert ("train-speculator" in said) == advised
    assert "train-speculator" not in " ".join(verdict(steps(range(4), baseline_tokens_per_s=10.0, **counts)))


def test_a_long_run_is_added_up_few_times_for_all_panels(monkeypatch):
    added = []
    for module in (reading, speed, thinning, of_runs):
        monkeypatch.setattr(module, "concatenate", lambda reports: added.append(len(reports)) or concatenate(reports))
    num_steps = 500
    page([run_of(long_run(real_runs()[0].steps, num_steps))], "", "now")
    assert 0 < sum(added) < 7 * num_steps


def test_numbers_of_long_runs_are_written_out():
    run = run_of(long_run(steps(range(3), generate_s=1500.0, forward_s=1499.5, step_s=None), 3000))
    text = page([run], "", "now")
    assert "4,500,000 s" in text
    assert "3,000 of 3,000 steps" in text
    assert not re.search(r"\de\+\d", text)


def test_a_step_whose_time_is_not_known_hides_no_other_steps_time():
    """As the first one of a run in which one generation serves several optimizer steps."""
    (_, by_step) = charts(speed.seconds([run_of([make_report(step=0, step_s=None), make_report(step=4)])]))
    (rest,) = [trace["y"] for trace in by_step.data if trace["name"] == speed._REST]
    assert rest == [0.0, 3.0]


def test_a_legend_of_many_rows_takes_no_room_from_its_chart():
    traces = [{"name": f"a run with a long name {i}"} for i in range(9)]
    figure = Figure(traces, {}, height_px=200)
    assert height_px(figure, 620) == 200 + 19 * (5 - 2)
    assert height_px(figure, 280) == 200 + 19 * (9 - 2)
    assert height_px(Figure(traces[:1], {}, height_px=200), 280) == 200


def test_names_are_names_whatever_they_look_like():
    runs = [run_of(steps(range(3)), name) for name in ("2026-11-26", "7")]
    for panel in (speed.seconds(runs), drafting.speculators(runs)):
        assert charts(panel)[0].layout["yaxis"]["type"] == "category"


def test_nothing_that_a_file_holds_is_taken_for_html():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = run_of(
        steps(range(3), drafted={evil: 24}, accepted={evil: 14}, warnings=(evil,), drafter_faults={evil: 1}), evil
    )
    text = page([run], "", "now")
    assert "<script>alert" not in text
    assert "<img" not in text
    # plotly reads tags of its own in texts
    figures = json.loads(re.search(r'id="figures">(.*)</script>', text)[1])
    names = [trace["name"] for figure in figures.values() for trace in figure["data"]]
    assert any("&lt;img src=x" in name for name in names)
    assert not any("<" in name for name in names)
