"""Kernels compile ahead of time without a GPU, within the registers they were planned with, and spill nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from tests import ROOT

triton = pytest.importorskip("triton", reason="the kernels need Triton")


def in_a_compiling_process(code: str) -> str:
    """Output of `code` in a process whose kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@cache
def compiled_rows() -> list[dict]:
    """Every kernel for every target, compiled once for all tests, with the registers that it may use."""
    code = (
        "import json; from benchmarks.kernels_aot import CASES, TARGETS, compiled\n"
        "print(json.dumps([compiled(name, sm) | {'bound': CASES[name].max_registers}"
        " for name in CASES for sm in TARGETS]))"
    )
    return json.loads(in_a_compiling_process(code))


@pytest.mark.slow
def test_every_kernel_compiles_within_its_bounds():
    assert {row["sm"] for row in compiled_rows()} == {90, 100}
    for row in compiled_rows():
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= row["bound"], row
        assert row["shared_bytes"] <= 48 * 1024, row
        if "choose_splits" in row["kernel"]:
            assert row["wide_loads"], "logits are read several at a time"


@pytest.mark.slow
def test_the_recorded_report_is_of_these_kernels():
    """`python -m benchmarks.kernels_aot` records it anew, and docs/kernels.md shows it."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "kernels_aot.json").read_text(encoding="utf-8"))
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"recorded with Triton {recorded['triton']}, which brings another compiler")
    assert recorded["rows"] == [{name: row[name] for name in row if name != "bound"} for row in compiled_rows()]


def test_the_documented_table_is_the_recorded_report():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "kernels_aot.json").read_text(encoding="utf-8"))
    lines = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    for row in recorded["rows"]:
        kernel, *variant = row["kernel"].split(" ")
        name = f"`{kernel}`" + "".join(f", {word}" for word in variant)
        cells = [
            name,
            *(row[key] for key in ("sm", "num_warps", "registers", "shared_bytes", "wide_loads", "spill_bytes")),
        ]
        assert f"| {' | '.join(map(str, cells))} |" in lines, row


@pytest.mark.slow
def test_the_package_works_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch
from atlas_kernels.draft_head import draft_head
from atlas_kernels.head_call import DraftHeadWeights
from atlas_kernels.nvfp4 import linear, quantize
from atlas_kernels.rejection import verify_by_rejection
from atlas_kernels.verify import verify

zero, ones = torch.zeros(1, dtype=torch.int64), torch.ones
rows = (torch.eye(3)[1:2] * 99, zero, torch.tensor([0, 1]), zero, zero)
print(verify(*rows).token_ids.item(), verify_by_rejection(*rows).token_ids.item())
head = DraftHeadWeights(ones(4, 6), ones(6, 2), ones(6), ones(3, 2), torch.eye(3)[2] * 99, torch.arange(3))
print(draft_head(head, ones(1, 2), zero, zero, zero, 1).indices.item())
print(linear(ones(1, 16), quantize(ones(1, 16))).item())
"""
    assert in_a_compiling_process(code).split() == ["1", "1", "2", "16.0"]
