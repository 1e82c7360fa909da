"""Ranks exchange rollouts and what drafters learned, though some ranks have no drafters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.integrations.exchanging_ranks import NUM_UPDATES, WITHOUT_DRAFTERS


def test_a_rank_without_drafters_keeps_nothing_and_keeps_nobody_from_learning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone"]
    command += ["-m", "tests.integrations.exchanging_ranks", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert [each["kept"] for each in told] == [0, 0, 0]
    for rank, each in enumerate(told):
        if rank == WITHOUT_DRAFTERS:
            assert (each["elsewhere"], each["totals"]) == (0, [])
        else:
            assert each["elsewhere"] == NUM_UPDATES, "those of one other rank that drafts"
            # Drafters are known to the exchange from their first refresh on.
            assert each["totals"] == [[0.0 + 2.0, 2.0]] * (NUM_UPDATES - 1), "of ranks 0 and 2"
