"""The compiled gate of a CPU equals torch's, on one thread and several, to a few units in the last place."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from atlas_kernels import gate_cpu
from atlas_kernels.gate_cpu import silu_times


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that a call is divided among, however small it is."""
    monkeypatch.setattr(gate_cpu, "_GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [1, 2, 3, 17, 1536])
def test_it_equals_torchs(size: int) -> None:
    torch.manual_seed(0)
    for rows in (1, 2, 5):
        gate, up = 6 * torch.randn(rows, size), torch.randn(rows, size)
        expected = functional.silu(gate.double()) * up.double()
        out = silu_times(gate, up)
        assert out is gate
        assert torch.all((out - expected).abs() <= 4e-7 * expected.abs())


@pytest.mark.usefixtures("threads")
def test_every_size_of_number() -> None:
    powers = torch.logspace(-45, 38, 4001, dtype=torch.float64).float()
    gate = torch.cat((powers, -powers, torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0])))[None]
    expected = functional.silu(gate.double())
    out = silu_times(gate.clone(), torch.ones_like(gate)).double()
    least = torch.finfo(torch.float32).tiny
    assert torch.all((out - expected).abs() <= 4e-7 * expected.abs() + 100 * least)


@pytest.mark.usefixtures("threads")
def test_what_is_not_finite_stays_where_it_is() -> None:
    gate = torch.tensor([[1.0, math.nan, math.inf, -math.inf, 2.0, 3.0, 4.0]])
    up = torch.tensor([[1.0, 1.0, 1.0, 1.0, math.nan, math.inf, 1.0]])
    expected = functional.silu(gate) * up
    out = silu_times(gate.clone(), up)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
