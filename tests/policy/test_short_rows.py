"""Decode steps on a CPU take the compiled attention wherever they may, drafts as well, and get a plain forward's logits."""

from __future__ import annotations

import pytest
import torch

from atlas_rl.controller.draft_forecast import MAX_LOOKAHEAD
from atlas_rl.policy import ragged_attention, rectangle
from atlas_rl.policy.placement import Placement
from tests.families import policy
from tests.policy.rows import Rows, run_in_every_way, texts


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts tokens of the steps that the kernel attends for, per layer: of layers with their own code, and of flat ones."""
    counts: list[int] = []

    def counting(name: str, tokens: int) -> None:
        attend = getattr(ragged_attention, name)

        def counted(query: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
            counts.append(query.shape[tokens])
            return attend(query, *rest, **options)

        monkeypatch.setattr(ragged_attention, name, counted)

    counting("attend_short", 2)
    counting("attend_rows", 0)
    return counts


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3n_text", "gemma4_text, shared keys and values"])
def test_rows_run_in_every_way_are_as_plain_forwards(family: str, taken: list[int]) -> None:
    run_in_every_way(Rows(policy(family)))
    assert 3 in taken, "a plain step of three rows"
    assert 18 in taken, "drafts in five rows"


def test_steps_with_the_longest_drafts_are_taken(taken: list[int]) -> None:
    rows = Rows(policy("llama"))
    with rows.runner.session(rows.cache):
        rows.forward({row: text[:3] for row, text in enumerate(texts(2))})
        taken.clear()
        rows.forward({row: text[3:4] for row, text in enumerate(texts(2))}, rejected=[MAX_LOOKAHEAD, 0])
    assert set(taken) == {MAX_LOOKAHEAD + 2}


def test_sinks_stay_with_the_formula(taken: list[int]) -> None:
    rows = Rows(policy("gpt_oss"))
    with rows.runner.session(rows.cache):
        for step in range(4):
            rows.forward({row: text[step : step + 1] for row, text in enumerate(texts(3))})
    assert not taken


def test_a_mask_is_converted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens of a row keep the rectangle."""
    masks, attend = [], rectangle.attend

    def watched(*args: torch.Tensor, **options: object) -> torch.Tensor:
        masks.append(options.get("mask"))
        return attend(*args, **options)

    monkeypatch.setattr(rectangle, "attend", watched)
    rows = Rows(policy("llama"))
    with rows.runner.session(rows.cache):
        rows.forward({row: text[:5] for row, text in enumerate(texts(2))})
        masks.clear()
        rows.forward({row: text[5:] for row, text in enumerate(texts(2))}, rejected=[2, 1])
    assert len(masks) > 1
    assert all(mask is masks[0] and mask.dtype == torch.float32 for mask in masks)


def test_a_bias_hides_what_a_mask_hides() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    empty = torch.zeros(0, dtype=torch.int64)
    placed = Placement(empty, empty, packing=None, _masks={(1, None): mask})  # type: ignore[arg-type]
    assert placed.bias(1, None, torch.float32).tolist() == [[0.0, float("-inf")], [0.0, 0.0]]
