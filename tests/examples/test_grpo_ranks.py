"""The examples of several ranks, each started by its command, with two gloo ranks on a CPU and a tiny policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import ROOT
from tests.models import tiny_bigram
from tests.trainers import WORDS, with_special_tokens, word_tokenizer

pytest.importorskip("reasoning_gym")
LIMIT_S = 400


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["grpo_fsdp/fsdp2.yaml", "grpo_deepspeed/zero3.yaml"])
def test_an_example_runs_on_two_ranks(configuration: str, tmp_path: Path) -> None:
    if "deepspeed" in configuration and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install atlas-rl[deepspeed]")
    policy = tmp_path / "policy"
    with_special_tokens(tiny_bigram(vocab=len(WORDS), hidden=32, context=256, logit_std=2.5)).save_pretrained(policy)
    word_tokenizer().save_pretrained(policy)
    examples, output = ROOT / "examples", tmp_path / "output"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(examples / configuration)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(examples / "grpo_ranks.py")]
    command += ["--model", str(policy), "--steps", "2", "--prompts", "1", "--max-new-tokens", "8"]
    done = subprocess.run(
        [*command, "--output-dir", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-12000:]
    reports = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    assert [report["policy_version"] for report in reports] == [0, 1]
    assert [report["num_requests"] for report in reports] == [8, 8], "four of each rank"
    assert all(report["sync_s"] > 0 for report in reports), "the policy is sharded, and is gathered for each call"
    assert done.stdout.count("atlas step") == 2
