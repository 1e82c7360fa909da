"""The type that a process makes its tensors of is not the drafters': they have float32, or the policy's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from tests.drafters import recurrent_drafter
from tests.engines import engine_of, generate
from tests.models import tiny_bigram


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def of_another_type(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


def drafted(dtype: torch.dtype) -> tuple[list[list[int]], dict[str, int], dict[str, int]]:
    model, drafter = tiny_bigram(), recurrent_drafter()
    torch.set_default_dtype(dtype)
    engine = engine_of(model, speculators=[drafter], controller=FixedController([drafter.name], drafter.name, 3))
    for _ in range(2):
        output = generate(engine)
        engine.policy_updated()
    assert not output.report.drafter_faults
    assert all(weight.dtype == torch.float32 for weight in drafter.weights())
    return output.completion_ids, output.report.drafted, output.report.accepted


def test_the_recurrent_drafter_learns_and_drafts_the_same(of_another_type: torch.dtype) -> None:
    expected = drafted(torch.float32)
    assert expected[2]["recurrent"] > 10
    assert drafted(of_another_type) == expected
