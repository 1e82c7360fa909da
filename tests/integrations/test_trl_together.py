"""Two gloo ranks, of which one fails before a collective: both raise, and neither waits for the other."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from atlas_rl.integrations.trl.together import of_all_ranks, of_main_rank, on_all_ranks
from tests.integrations.launch import reports_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return reports_of("tests.integrations.together_ranks", tmp_path_factory.mktemp("ranks"))


def test_results_are_those_of_all_ranks_in_order(ranks: list[dict[str, Any]]) -> None:
    assert [rank["of_all"] for rank in ranks] == [[0, 10]] * 2
    assert [rank["own"] for rank in ranks] == [0, 10]
    assert [rank["of_main"] for rank in ranks] == ["from rank 0"] * 2


def test_a_rank_that_fails_is_named_on_the_others(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["one_fails"] == "KeyError: 'on purpose'"
    assert ranks[0]["one_fails"] == "RuntimeError: rank 1 failed while counting: KeyError: 'on purpose'"


def test_an_error_of_the_main_rank_keeps_its_message_and_its_kind_if_that_says_something(
    ranks: list[dict[str, Any]],
) -> None:
    assert ranks[0]["main_fails"] == [
        "ConnectionRefusedError: on purpose",
        "ValueError: on purpose",
        "KeyError: 'on purpose'",
    ]
    assert ranks[1]["main_fails"] == [
        "ConnectionError: on purpose",
        "ValueError: on purpose",
        "RuntimeError: 'on purpose'",
    ]


def test_a_drafter_that_fails_in_the_exchange_leaves_nobody_waiting(ranks: list[dict[str, Any]]) -> None:
    cases = [rank["exchange"] for rank in ranks]
    assert [case[""] for case in cases] == [{"raised": "nothing", "taken": [3.0, 3.0]}] * 2
    # Before the sums are made nobody takes any.
    told = "RuntimeError: rank 1 failed while collecting what its drafters share: RuntimeError: shared on purpose"
    assert cases[0]["shared"] == {"raised": told, "taken": [0.0, 0.0]}
    assert cases[1]["shared"] == {"raised": "RuntimeError: shared on purpose", "taken": [0.0, 0.0]}
    # After that nobody waits for anybody.
    assert cases[0]["take_shared"] == {"raised": "nothing", "taken": [3.0, 3.0]}
    assert cases[1]["take_shared"] == {"raised": "RuntimeError: take_shared on purpose", "taken": [0.0, 0.0]}
    assert [rank["in_step"] for rank in ranks] == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("case", "own"),
    [
        ("no draft model", "ValueError: draft_model: .*draft"),
        ("damaged state", "ValueError: .*history"),
        ("other option", "ValueError: max_completion_length"),
        ("first rollout", "ValueError: .*history"),
    ],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all_before_they_train(
    case: str, own: str, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank["unattached"][case] for rank in ranks)
    assert re.match(own, second)
    assert first == f"RuntimeError: rank 1 failed while attaching the engine: {second}"


def test_a_single_process_raises_its_own_errors() -> None:
    alone = SimpleNamespace(num_processes=1, is_main_process=True)

    def fail() -> None:
        raise KeyError("on purpose")

    assert of_all_ranks(alone, "counting", lambda: 3) == [3]
    assert on_all_ranks(alone, "counting", lambda: 3) == 3
    with pytest.raises(KeyError):
        of_all_ranks(alone, "counting", fail)
    with pytest.raises(KeyError):
        of_main_rank(alone, fail)
