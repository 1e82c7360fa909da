"""Kernels compile ahead of time without a GPU, within the registers they were planned with, and spill nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT

pytest.importorskip("triton", reason="the kernels need Triton")


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


@pytest.mark.slow
def test_every_kernel_compiles_within_its_bounds():
    code = (
        "import json; from benchmarks.kernels_aot import CASES, TARGETS, compiled\n"
        "print(json.dumps([compiled(name, sm) | {'bound': CASES[name].max_registers}"
        " for name in CASES for sm in TARGETS]))"
    )
    rows = json.loads(in_a_compiling_process(code))
    assert {row["sm"] for row in rows} == {90, 100}
    for row in rows:
        print(row)
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= row["bound"], row
        assert row["shared_bytes"] <= 48 * 1024, row


@pytest.mark.slow
def test_the_recorded_report_is_of_these_kernels():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "kernels_aot.json").read_text(encoding="utf-8"))
    cases = json.loads(
        in_a_compiling_process("import json; from benchmarks.kernels_aot import CASES; print(json.dumps([*CASES]))")
    )
    assert {(row["kernel"], row["sm"]) for row in recorded["rows"]} == {
        (case, sm) for case in cases for sm in (90, 100)
    }


@pytest.mark.slow
def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from atlas_kernels.verify import verify\n"
        "zero = torch.zeros(1, dtype=torch.int64)\n"
        "print(verify(torch.eye(3)[:1] * 99, zero, torch.tensor([0, 1]), zero, zero).token_ids.item())"
    )
    assert in_a_compiling_process(code).strip() == "0"
