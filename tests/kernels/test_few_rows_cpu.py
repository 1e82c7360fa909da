"""Products of a few rows on a CPU equal torch's, for all numbers of rows, outputs and inputs, on one thread and several."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from atlas_kernels import few_rows_cpu
from atlas_kernels.few_rows_cpu import FORMS, few_rows_linear
from tests import ROOT

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 67)
OUTPUTS = (1, 3, 4, 5, 7, 8, 1030)
INPUTS = (1, 15, 16, 100, 5000)


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that a call is divided among, however small it is."""
    monkeypatch.setattr(few_rows_cpu, "_GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def close(ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Within float32's rounding of the product in float64."""
    expected = functional.linear(x.double(), weight.double())
    bound = functional.linear(x.abs().double(), weight.abs().double())
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert ours.shape == expected.shape
    assert torch.all((ours - expected).abs() <= 1e-6 * bound.clamp_min(1e-3))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.usefixtures("threads")
def test_products_equal_torchs(inputs: int) -> None:
    torch.manual_seed(0)
    for rows in ROWS:
        for outputs in OUTPUTS:
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            for form in range(len(FORMS)):
                (ours,) = few_rows_linear(x, (weight,), form)
                close(ours, x, weight)


@pytest.mark.parametrize("form", [-1, len(FORMS)])
def test_a_form_that_the_processor_lacks_is_refused(form: int) -> None:
    with pytest.raises(ValueError, match=f"form must be at least 0 and less than {len(FORMS)} on this processor, got"):
        few_rows_linear(torch.ones(1, 3), (torch.ones(4, 3),), form)


@pytest.mark.usefixtures("threads")
def test_several_weights_in_one_pass() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(outputs, 300) for outputs in (700, 3, 4, 201)]
    for rows in (1, 3, 6):
        x = torch.randn(rows, 300)
        for ours, weight in zip(few_rows_linear(x, weights), weights, strict=True):
            close(ours, x, weight)


def test_parts_of_other_tensors() -> None:
    """A column of a larger tensor, a transposed weight, a slice at an odd offset."""
    torch.manual_seed(2)
    x, columns, part = torch.randn(5, 200)[:, ::2], torch.randn(100, 40).t(), torch.randn(101, 100)[1:]
    for ours, weight in zip(few_rows_linear(x, (columns, part)), (columns, part), strict=True):
        close(ours, x, weight)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_outputs_and_no_others(number: float, rows: int) -> None:
    x, weight = torch.ones(rows, 64), torch.ones(9, 64)
    weight[5, 63] = number
    x[0, 0] = -number
    (ours,) = few_rows_linear(x, (weight,))
    expected = functional.linear(x, weight)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.isinf(), expected.isinf())


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 3), torch.ones(4, 5)),
        (torch.ones(2, 3).double(), torch.ones(4, 3)),
        (torch.ones(2, 3), torch.ones(4, 3).bfloat16()),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta")),
    ],
    ids=["inputs", "rows", "weight", "device"],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be float32 \[rows, in\] and \[out, in\] on a CPU, got"):
        few_rows_linear(x, (weight,))


def test_a_weight_without_memory_is_not_read() -> None:
    weight = torch.ones(4, 3)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        few_rows_linear(torch.ones(1, 3), (weight,))


PRODUCTS = """
import torch
from atlas_kernels import tiles_cpu
from atlas_kernels.few_rows_cpu import few_rows_linear

torch.manual_seed(0)
for rows in range(1, 15):
    x, weight = torch.randn(rows, 45), torch.randn(30, 45)
    torch.testing.assert_close(few_rows_linear(x, (weight,))[0], x @ weight.t())
print(tiles_cpu.OUTPUTS, tiles_cpu.ROWS)
"""


ON_X86 = platform.machine() == "x86_64"
OLDEST = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"} if ON_X86 else {"NUMBA_CPU_FEATURES": "+neon"}
SMALL = "3 4" if ON_X86 else "4 6"  # every ARM processor of 64 bits has 32 registers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "tile"),
    [(OLDEST, SMALL), ({"NUMBA_CPU_NAME": "generic"}, SMALL), ({"NUMBA_DISABLE_JIT": "1"}, None)],
    ids=["oldest", "kernels that unlike processors share", "not compiled"],
)
def test_other_processors_and_uncompiled_code(settings: dict[str, str], tile: str | None) -> None:
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tile in (None, done.stdout.strip())
