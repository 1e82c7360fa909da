"""Policies that are spread over ranks, each way with two gloo ranks on the CPU: every completion is the single process's.

`sharded_ranks.py` is what a rank runs: several trainings in one launch, because a launch takes longer than all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from tests import ROOT
from tests.integrations.sharded_ranks import LONG, SHORT, WAYS, name_of

WRAPPERS = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
OTHERS = ("rloo", "distillation")
LIMIT_S = 400


@pytest.fixture(scope="module", params=WRAPPERS)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of one launch wrote, how it ended, and its folder."""
    wrapper = request.param
    if wrapper.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install atlas-rl[deepspeed]")
    folder = tmp_path_factory.mktemp(wrapper)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.integrations.sharded_ranks", wrapper, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    own = ["full", "lora", *(["kept"] if wrapper.startswith("fsdp") else [])]
    cases = [*(name_of(case, way) for way in WAYS for case in own), *OTHERS]
    written = [folder / f"{case}.rank{rank}.json" for case in cases for rank in range(2)]
    assert all(file.is_file() for file in written), done.stderr[-4000:]
    seen = {case: [json.loads((folder / f"{case}.rank{rank}.json").read_text()) for rank in range(2)] for case in cases}
    return SimpleNamespace(wrapper=wrapper, cases=seen, done=done, folder=folder)


pytestmark = pytest.mark.slow


def test_every_completion_is_the_single_process_s(launched: Any) -> None:
    runs = [run for ranks in launched.cases.values() for run in ranks]
    runs += [run["resumed"] for ranks in launched.cases.values() for run in ranks if "resumed" in run]
    for run in runs:
        assert run["calls"]
        for call in run["calls"]:
            assert call["same"] == call["completions"] > 0
            assert call["logprob_error_nats"] < 1e-4


def test_the_policy_moved_between_calls_and_is_one_on_all_ranks(launched: Any) -> None:
    for ranks in launched.cases.values():
        assert sum(call["drafted"] for run in ranks for call in run["calls"]) > 0
        first, second = ([call["weights"] for call in run["calls"]] for run in ranks)
        assert first == second
        assert len(set(first)) > 1


def test_an_evaluation_leaves_a_policy_that_is_sent_whole_and_trained_again(launched: Any) -> None:
    """FSDP keeps weights gathered after it. Bare accelerate refuses to prepare such a policy of FSDP2 again."""
    kept = [run for name, ranks in launched.cases.items() if name.startswith("kept") for run in ranks]
    assert len(kept) == (2 * len(WAYS) if launched.wrapper.startswith("fsdp") else 0)
    for run in kept:
        modes = [(call["step"], call["mode"]) for call in run["seconds"]]
        training = [(0, "eval"), (0, "eval"), (0, "train"), (1, "train")]  # two batches per evaluation
        assert modes == [*training, *[(2, "eval")] * 4, *training]
        assert run["sent_wrong"] == []
        weights = [call["weights"] for call in run["calls"]]
        assert len(set(weights)) == 4, "three steps are seen; the evaluations and what follows them have one policy"


def test_ranks_had_lengths_and_seeds_of_their_own(launched: Any) -> None:
    for ranks in launched.cases.values():
        longest = [max(length for call in run["calls"] for length in call["lengths"]) for run in ranks]
        assert longest[0] <= SHORT < longest[1] <= LONG
        first, second = ({call["seed"] for call in run["calls"]} for run in ranks)
        assert not first & second


def test_a_call_that_raises_leaves_the_policy_as_it_was(launched: Any) -> None:
    for name, ranks in launched.cases.items():
        if name.startswith(("full", "lora")):
            assert [run["changed"] for run in ranks] == [[], []]


def test_a_rank_that_raises_ends_the_run(launched: Any) -> None:
    assert launched.done.returncode != 0
    assert "on purpose" in launched.done.stderr
    assert not list(launched.folder.glob("one_raises.rank*.json"))


def test_reports_are_those_of_all_ranks(launched: Any) -> None:
    for ranks in launched.cases.values():
        reports = ranks[0]["reports"]
        assert not ranks[1]["reports"], "one rank publishes"
        for mode in {report["mode"] for report in reports}:
            calls = [call for run in ranks for call in run["calls"] if call["mode"] == mode]
            own = [report for report in reports if report["mode"] == mode]
            assert sum(report["num_tokens"] for report in own) == sum(sum(call["lengths"]) for call in calls)
        for report in reports:
            assert report["sync_s"] > 0
            assert not report["warnings"], (
                "reruns without speculation have the same tokens, and the audit finds nothing"
            )
        measured = [report["speedup_measured"] for report in reports if report["mode"] == "train"]
        assert (measured[0] is not None) == (ranks[0]["way"] == "attach"), "the other way has no `baseline_every`"


def test_seconds_of_gathering_are_measured_and_published(launched: Any) -> None:
    """Each rank timed its gathering, its rollouts in between and the whole call: the report's figure fits in between."""
    for ranks in launched.cases.values():
        for run in ranks:
            assert len(run["seconds"]) == len(run["calls"])
            for call in run["seconds"]:
                assert call["is_whole"]
                assert 0 < call["gathering_s"] <= call["sync_s"] <= call["call_s"] - call["rollouts_s"]
                assert call["sync_s"] < call["generate_s"]
        trained = [[call for call in run["seconds"] if call["mode"] == "train"] for run in ranks]
        reports = [report for report in ranks[0]["reports"] if report["mode"] == "train"]
        for report, *own in zip(reports, *trained, strict=True):  # one call of each rank
            assert {call["step"] for call in own} == {report["step"]}
            slowest = max(own, key=lambda call: call["generate_s"])
            assert report["sync_s"] == pytest.approx(slowest["sync_s"])


@pytest.mark.parametrize("way", WAYS)
def test_logged_evaluation_figures_are_those_of_all_ranks(launched: Any, way: str) -> None:
    run = launched.cases[name_of("full", way)][0]
    reports = [report for report in run["reports"] if report["mode"] == "eval"]
    logged = [row for row in run["log"] if "eval_atlas/num_tokens" in row]
    assert [report["num_requests"] for report in reports] == [32, 32], "two batches on each of two ranks"
    for report, row in zip(reports, logged, strict=True):
        for name in ("num_tokens", "accepted_length", "tokens_per_s", "num_forwards"):
            assert row[f"eval_atlas/{name}"] == pytest.approx(report[name])


def test_ranks_take_one_decision_on_importance_sampling(launched: Any) -> None:
    """With `rollout_func` the setting stays as it is: TRL makes no correction there."""
    for name, ranks in launched.cases.items():
        expected = None if name in OTHERS else ranks[0]["way"] == "rollout_func"
        assert [run["correction"] for run in ranks] == [expected, expected]


@pytest.mark.parametrize("way", WAYS)
def test_what_one_rank_rolls_out_is_known_to_all(launched: Any, way: str) -> None:
    """Both histories hold the rollouts of both ranks."""
    ranks = launched.cases[name_of("lora", way)]
    first, second = (run["archived"] for run in ranks)
    assert first == second
    assert first > sum(sum(call["lengths"]) for run in ranks for call in run["calls"])


@pytest.mark.parametrize("way", WAYS)
def test_what_the_recurrent_heads_learned_is_averaged_into_one(launched: Any, way: str) -> None:
    """Each rank trained its head on its own rollouts, for as long as its own clock let it."""
    first, second = (run["head"] for run in launched.cases[name_of("lora", way)])
    assert first
    assert first == second


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_has_files_of_its_own(launched: Any, way: str) -> None:
    name = name_of("full", way)
    saved = launched.folder / name / "trainer" / "checkpoint-2"
    assert sorted(file.name for file in saved.glob("atlas_rl*")) == [
        "atlas_rl.rank1.safetensors",
        "atlas_rl.safetensors",
    ]
    for rank in range(2):
        lines = (launched.folder / name / "atlas" / f"controller.rank{rank}.jsonl").read_text().splitlines()
        assert {json.loads(line)["rank"] for line in lines} == {rank}
    for run in launched.cases[name]:
        first, second = ([call for call in each["calls"] if call["mode"] == "train"] for each in (run, run["resumed"]))
        assert second[0]["seed"] == first[2]["seed"]
        assert second[0]["weights"] == pytest.approx(first[2]["weights"]), "the resumed run begins with step 2's policy"
