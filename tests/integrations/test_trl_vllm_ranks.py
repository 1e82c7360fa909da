"""Two gloo ranks, each with a colocated vLLM engine: what fails on one of them, and a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import (
    ROOT,
    vllm_engines,  # it skips this module where there is no vLLM
)

__all__ = ["vllm_engines"]

LIMIT_S = 300  # ten times what it takes on two idle cores
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.integrations.vllm_ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "doing", "own"),
    [
        ("option", "attaching the engine", "max_completion_length must be"),
        ("weights", "loading weights into vLLM", "lm_head.weight holds values that are not finite"),
        ("drafters", "making its drafters", "not a state of the history index"),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all(
    case: str, doing: str, own: str, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[case] for rank in ranks)
    assert second.startswith(f"ValueError: {own}")
    assert first == f"RuntimeError: rank 1 failed while {doing}: {second}"


def test_they_train_after_it(ranks: list[dict[str, Any]]) -> None:
    reports = ranks[0]["reports"]
    assert [report["policy_version"] for report in reports] == [0, 1]
    assert [report["num_requests"] for report in reports] == [16, 16], "those of both ranks"
    assert not any(report["warnings"] for report in reports)
    assert ranks[1]["reports"] == []
