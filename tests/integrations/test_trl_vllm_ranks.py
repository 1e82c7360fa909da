"""Two gloo ranks, each with a colocated vLLM engine: what fails on one of them, and a run."""

from __future__ import annotations

from typing import Any

import pytest

from tests import vllm_engines  # it skips this module where there is no vLLM
from tests.integrations.launch import reports_of

__all__ = ["vllm_engines"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return reports_of("tests.integrations.vllm_ranks", tmp_path_factory.mktemp("ranks"))


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
