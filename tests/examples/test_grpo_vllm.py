"""The example with vLLM on the demo's policy: a run of two steps, as a reader would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import (
    ROOT,
    vllm_engines,  # first: it skips this module where there is no vLLM
)

__all__ = ["vllm_engines"]
SCRIPT = ROOT / "examples" / "grpo_vllm" / "run.py"


@pytest.mark.slow
def test_the_example_runs_on_smollm2(tmp_path: Path) -> None:
    arguments = ["--steps", "2", "--prompts", "1", "--max-new-tokens", "32", "--output-dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=800, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    reports = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [report["policy_version"] for report in reports] == [0, 1]
    for report in reports:
        assert report["num_requests"] == 4
        assert report["sync_s"] > 0
        assert report["entropy"] < 1.5, "the warm-started policy is sharp, so its weights have reached vLLM"
        assert not report["warnings"]
