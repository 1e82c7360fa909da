"""`vllm serve` with our proposer by its own flags, over loopback: an OpenAI client sees nothing but the policy's tokens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_rl.vllm.checks import speculative_config
from tests import vllm_engines  # first: it skips this module where there is no vLLM
from tests.models import tiny_bigram
from tests.trainers import WORDS, word_tokenizer

__all__ = ["vllm_engines"]
START_S = 240
EXTENSION = "atlas_rl.vllm.server.AtlasWorkerExtension"


def policy(seed: int) -> Any:
    return tiny_bigram(vocab=len(WORDS), hidden=64, heads=2, kv_heads=2, context=128, seed=seed, logit_std=3.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of one policy, as a trainer would write them."""
    made = []
    for seed in (1, 2):
        path = tmp_path_factory.mktemp(f"policy{seed}")
        policy(seed).save_pretrained(path)
        word_tokenizer().save_pretrained(path)
        made.append(path)
    return made


@pytest.fixture(scope="module")
def server(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs. The command itself asks for its version under a name that the CPU wheel does not have.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders[0])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy", "--dtype", "float32"]
    command += ["--max-model-len", "128", "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--speculative-config", json.dumps(speculative_config()), "--worker-extension-cls", EXTENSION]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, log)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no server after {START_S} s: {log.read_text()[-4000:]}")


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def call(address: str, method: str, *args: str) -> dict[str, Any]:
    return post(address, "/collective_rpc", {"method": method, "args": list(args)})["results"][0]


def complete(address: str, seed: int, **options: Any) -> Any:
    body = {
        "model": "policy",
        "prompt": [2, 3, 4],
        "max_tokens": 60,
        "seed": seed,
        "n": 8,
        "ignore_eos": True,
        "logprobs": 1,
    }
    return post(address, "/v1/completions", body | options)["choices"]


def test_it_serves_the_policy_learns_from_traffic_and_follows_new_weights(server: str, folders: list[Path]) -> None:
    first = [[choice["text"] for choice in complete(server, seed)] for seed in range(8)]
    report = call(server, "atlas_report")
    assert report["num_requests"] == 64
    assert report["num_tokens"] == 64 * 60
    assert sum(report["accepted"].values()) > 0
    assert report["accepted_length"] > 1
    assert [[choice["text"] for choice in complete(server, seed)] for seed in range(8)] == first
    _logprobs_are_those_of(policy(1), complete(server, 99, n=1)[0])

    loaded = call(server, "atlas_load_weights", str(folders[1]), "5")
    assert loaded["policy_version"] == 5
    # On a CPU vLLM's worker is a process of its own, which cannot empty the prefix cache; the answer says so.
    post(server, loaded["left_to_do"].removeprefix("POST "), {})
    _logprobs_are_those_of(policy(2), complete(server, 99, n=1)[0])
    assert call(server, "atlas_policy_updated")["policy_version"] == 6
    assert call(server, "atlas_report")["policy_version"] == 6


def _logprobs_are_those_of(model: Any, choice: Any) -> None:
    prompt, tokens = [2, 3, 4], [WORDS.index(word.strip()) for word in choice["logprobs"]["tokens"]]
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(choice["logprobs"]["token_logprobs"]), expected, atol=1e-3)
