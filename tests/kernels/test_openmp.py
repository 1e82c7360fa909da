"""numba and torch share an OpenMP runtime; ours leaves torch's part of it as it was. In processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run(code: str, *arguments: str, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, check=True).stdout


def test_the_kernels_leave_torchs_threads_alone():
    code = (
        "import numba, torch; torch.set_num_threads(1); import atlas_kernels.noise;"
        "print(numba.get_num_threads(), torch.get_num_threads())"
    )
    assert run(code).split() == ["1", "1"]


@pytest.mark.parametrize("threads_after", [1, 2])
@pytest.mark.parametrize("numba_before", ["", "import numba; numba.get_num_threads()"])
def test_no_team_of_threads_in_a_team(threads_after: int, numba_before: str):
    """Where teams are nested, a product inside torch's attention starts threads, and the step takes three times as long."""
    code = f"""
{numba_before}
import ctypes, torch
import atlas_kernels.noise
torch.set_num_threads({threads_after})
runtime = ctypes.CDLL(None)
print(runtime.omp_get_max_active_levels() if hasattr(runtime, "omp_get_max_active_levels") else 1)
"""
    assert run(code).split() == ["1"]


def test_nesting_that_the_environment_asks_for_stays():
    code = """
import ctypes, torch
import atlas_kernels.noise
print(ctypes.CDLL(None).omp_get_max_active_levels())
"""
    assert int(run(code, OMP_MAX_ACTIVE_LEVELS="3").split()[0]) > 1
