"""Two runs beside each other: figures are ratios of sums, and intervals hold what they say."""

import tracemalloc

import numpy as np
import pytest

from atlas_rl.cli import main
from atlas_rl.report.compare import _interval, _sums_of_blocks, compare, table
from atlas_rl.report.sums import concatenate
from tests.report.page.runs import OFF, real_folder, run_of, steps, write
from tests.reports import make_report


def noisy(seed, seconds=2.0, num_steps=40, shared=0):
    own, common = np.random.default_rng(seed), np.random.default_rng(shared)
    scales = np.exp(0.3 * common.standard_normal(num_steps)) * np.exp(0.05 * own.standard_normal(num_steps))
    return [make_report(step=i, policy_version=i, generate_s=seconds * s) for i, s in enumerate(scales)]


def by_label(first, second):
    return {row.label: row for row in compare(first, second)}


def test_figures_are_those_of_the_whole_run():
    first, second = noisy(1), noisy(2, seconds=1.0)
    rows = by_label(first, second)
    names = {
        "tokens/s": "tokens_per_s",
        "gain, estimated": "speedup_estimate",
        "entropy, nats per token": "entropy",
        "rollout's share of the step": "generation_share",
    }
    for row, name in names.items():
        assert rows[row].values == pytest.approx([getattr(concatenate(run), name) for run in (first, second)])
    measured = [make_report(baseline_tokens_per_s=rate) for rate in (5.0, 20.0)]
    rows = by_label(measured, measured)
    assert rows["gain, measured"].values[0] == pytest.approx(concatenate(measured).speedup_measured)


def test_the_interval_holds_the_true_ratio_and_not_one_that_is_false():
    row = by_label(noisy(1), noisy(2, seconds=1.0))["tokens/s"]
    low, high = row.interval
    assert 1.8 < low < 2.0 < high < 2.2
    low, high = by_label(noisy(1), noisy(2))["tokens/s"].interval
    assert low < 1 < high


def test_the_same_steps_are_drawn_together():
    """What both runs share, such as long prompts in a step, widens no interval of their ratio."""

    def width(second):
        low, high = by_label(noisy(1), second)["tokens/s"].interval
        return high - low

    apart = [make_report(step=r.step + 100, generate_s=r.generate_s) for r in noisy(2)]
    assert width(noisy(2)) < 0.5 * width(apart)


@pytest.mark.slow
def test_an_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        low, high = by_label(noisy(2 * seed + 1, shared=seed), noisy(2 * seed, shared=seed))["tokens/s"].interval
        covered += low <= 1 <= high
    assert 85 <= covered <= 100


def test_long_runs_are_compared_in_little_memory():
    sums = np.ones((20_000, 2))
    tracemalloc.start()
    assert _interval(sums, sums, False, 0) == pytest.approx((1.0, 1.0))
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("starts", "rows"),
    [([0, 9, 3, 3, 8], [0, 1, 9, 0, 3, 4, 3, 4, 8, 9]), ([0, 10, 3, 3, 8, 10], [0, 1, 10, 0, 3, 4, 3, 4, 8, 9, 10])],
)
def test_blocks_are_cut_to_the_length_of_the_run(starts, rows):
    sums = np.arange(2.0 * len(rows)).reshape(-1, 2)
    assert _sums_of_blocks(sums, np.array([starts])).tolist() == [sums[rows].sum(0).tolist()]


def test_an_interval_shows_whether_it_holds_one():
    slower = [make_report(step=i, policy_version=i, generate_s=2.0 * 1.003) for i in range(40)]
    text = table(run_of(steps(range(40)), "a"), run_of(slower, "b"))
    assert "0.997 to 0.997" in next(line for line in text.splitlines() if "tokens/s" in line)


def test_few_steps_have_no_interval_and_what_is_unknown_is_a_dash():
    text = table(run_of(steps(range(3)), "on"), run_of(steps(range(3), **OFF), "off"))
    line = next(line for line in text.splitlines() if "drafts accepted" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == ["0.583", "0.583 to 0.583", "-", "-", "-", "-"]
    with pytest.raises(ValueError, match="--skip leaves out 3"):
        table(run_of(steps(range(3))), run_of(steps(range(3))), skip=3)


def test_the_command_compares_real_runs(capsys, tmp_path):
    main(["compare", str(real_folder()), str(real_folder(False)), "--skip", "1"])
    shown = capsys.readouterr().out
    assert "3 and 3 steps" in shown
    # One seed gives the same tokens with speculation and without.
    line = next(line for line in shown.splitlines() if "completion length" in line)
    assert "1.00x" in line
    twice = write(tmp_path, [(engine, 0, report) for report in steps(range(2)) for engine in "ab"])
    with pytest.raises(SystemExit):
        main(["compare", str(twice), str(real_folder())])
    assert "these are 3 runs" in capsys.readouterr().err
