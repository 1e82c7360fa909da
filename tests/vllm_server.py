"""A real server for the tests, over loopback, started as a user starts it."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT

START_S = 600  # ten times what it takes on two idle cores
_ANSWER_S = 120


@dataclass(frozen=True)
class Server:
    """A running server: its address, its process, which leads a group of its own, and its log."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End it and all its workers at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(model: Path, folder: Path, *flags: str, workers_apart: bool = True) -> Iterator[Server]:
    """A server that is up inside of the context."""
    server = start(model, folder, *flags, port=free_port(), workers_apart=workers_apart)
    try:
        wait_for(server)
        yield server
    finally:
        server.kill()


def start(model: Path, folder: Path, *flags: str, port: int, workers_apart: bool = True) -> Server:
    """`atlas-rl vllm-serve` of a policy of 128 tokens of context, in float32; its log goes to `folder`. Does not wait.

    Its worker is a process of its own, or one with the engine, as vLLM chooses for one GPU.
    """
    command = [sys.executable, "-m", "atlas_rl", "vllm-serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "policy", "--dtype", "float32", "--max-model-len", "128", "--max_num_seqs", "16"]
    command += ["--enforce_eager", "True", "--kv-cache-memory-bytes", str(64 << 20), *flags]
    command += [] if workers_apart else ["--distributed-executor-backend", "uni"]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            # As a user starts it, whatever tests of engines in this process have set: the scheduler in a process of its
            # own. On CPUs this variable also keeps vLLM from the executor that it uses for one GPU.
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if workers_apart else "0"},
            start_new_session=True,
        )
    return Server(f"http://127.0.0.1:{port}", process, log)


def wait_for(server: Server) -> None:
    """Return when it is up; fails if it ends, or does not come up."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{server.address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no server after {START_S} s: {server.log.read_text()[-4000:]}")


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    text = post_for_text(address, path, body)
    return json.loads(text) if text else None


def post_for_text(address: str, path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
        return bytes(answer.read())


def streamed(address: str, **options: Any) -> Iterator[Any]:
    """The pieces of one completion as they come."""
    body = {"model": "policy", "prompt": [2, 3, 4], "seed": 3, "ignore_eos": True, "logprobs": 1, "stream": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body | options).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield from json.loads(line.removeprefix(b"data: "))["choices"]


def call(address: str, method: str, *args: str) -> dict[str, Any]:
    """A method of the worker extension."""
    return post(address, "/collective_rpc", {"method": method, "args": list(args)})["results"][0]
