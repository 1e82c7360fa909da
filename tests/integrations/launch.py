"""Runs a module of the tests on two CPU ranks, and reads what each rank wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import ROOT

_LIMIT_S = 300  # ten times what it takes on two idle cores


def reports_of(module: str, folder: Path) -> list[dict[str, Any]]:
    """What `rank0.json` and `rank1.json` hold after `python -m module folder` on two ranks of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", module, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
