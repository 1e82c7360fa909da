"""Addresses at which no server of ours is: each is named, and none is waited for without end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from atlas_rl import AtlasRolloutEngine
from tests import ROOT, vllm_engines  # first: it skips this module where there is no vLLM
from tests.local_http import serving
from tests.models import tiny_llama
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer
from tests.vllm_server import free_port

__all__ = ["vllm_engines"]
LIMIT_S = 300  # a rank that waits for the other does so for half an hour


@contextmanager
def answering(answers: Mapping[str, tuple[int, Any]]) -> Iterator[str]:
    """The address of something that answers these paths, and 404 to all others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers.get(self.path.partition("?")[0], (404, {}))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address


def client_of(address: str) -> Any:
    from atlas_rl.integrations.trl.server_client import AtlasClient

    return AtlasClient(base_url=address, connection_timeout=0.0)


def refused(address: str, error: type[Exception], message: str, use: Callable[[Any], object] = bool) -> None:
    with pytest.raises(error, match=message):
        use(client_of(address))


def test_a_port_where_nothing_listens() -> None:
    refused(f"http://127.0.0.1:{free_port()}", ConnectionError, r"no vLLM server is up at .* \(nothing answers\)")


def test_a_port_where_something_else_listens() -> None:
    with answering({}) as address:
        refused(address, ConnectionError, "is no vLLM server .* check address and port")


def test_a_server_that_does_not_come_up() -> None:
    with answering({"/health": (503, {})}) as address:
        refused(address, ConnectionError, r"after 0 s \(/health answers 503\)")


def test_a_plain_vllm_serve() -> None:
    """As `vllm serve` starts it: without its development endpoints."""
    up = {"/health": (200, {}), "/v1/models": (200, {"data": [{"id": "policy"}]})}
    with answering(up) as address:
        refused(
            address,
            ValueError,
            "without the development endpoints .* start it with `atlas-rl vllm-serve",
            lambda client: client.check_server_is_ours(),
        )


def test_a_server_that_wants_a_key() -> None:
    with answering({"/health": (200, {}), "/v1/models": (401, {"error": "Unauthorized"})}) as address:
        refused(address, RuntimeError, "answered /v1/models with 401: .*Unauthorized")


UP: dict[str, tuple[int, Any]] = {"/health": (200, {}), "/v1/models": (200, {"data": [{"id": "policy"}]})}
STATUS: dict[str, Any] = {"server": "a", "policy_version": 0, "weights_are_whole": True, "num_trainers": 1}


@pytest.mark.parametrize(
    "answer",
    [
        {"results": [STATUS | {"newer": 1}]},
        {"results": [{"server": "a"}]},
        {"results": []},
        {"results": [None]},
        {},
        [],
    ],
    ids=str,
)
def test_a_server_with_another_version_of_the_package(answer: Any) -> None:
    """A `TypeError` or `KeyError` would say nothing to the user; with several ranks, the others waited for this one."""
    with answering(UP | {"/collective_rpc": (200, answer)}) as address:
        refused(
            address, ValueError, "atlas_status in another form .* the same versions", lambda client: client.status()
        )


@pytest.mark.parametrize("answer", [{}, {"vllm_config": None}, []], ids=str)
def test_a_server_with_another_version_of_vllm(answer: Any) -> None:
    with answering(UP | {"/server_info": (200, answer)}) as address:
        refused(
            address,
            ValueError,
            "/server_info in another form .* the same versions",
            lambda client: client.check_server_is_ours(),
        )


def test_an_engine_that_serves_a_trainer_takes_another_one_to_its_server(tmp_path: Path) -> None:
    """It was told to build that one with `use_vllm=False`, as if an engine in process were meant."""
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    engine = AtlasRolloutEngine(console=False)
    engine.attach(build_trainer("grpo", model, word_tokenizer(), tmp_path))
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path)
    trainer.use_vllm, trainer.args.vllm_mode = True, "server"
    trainer.args.vllm_server_base_url = f"http://127.0.0.1:{free_port()}"
    trainer.args.vllm_server_timeout = 0.0
    with pytest.raises(ConnectionError, match="no vLLM server is up"):
        engine.attach(trainer)


def test_a_server_that_cannot_be_used_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    """TRL connects in the main process alone. The other rank waited for it until gloo's timeout."""
    with answering(UP) as plain:
        nothing = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        command += ["-m", "tests.vllm.refused_ranks", str(tmp_path), nothing, plain]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    built, attached, built_plain, attached_plain = ranks[0]["raised"]
    assert built == attached
    assert built.startswith(f"ConnectionError: no vLLM server is up at {nothing} after 0 s (nothing answers)")
    assert built_plain == attached_plain
    assert built_plain.startswith(
        f"ValueError: the vLLM server at {plain} was started without the development endpoints"
    )
    assert ranks[1]["raised"] == ranks[0]["raised"]
    assert [rank["in_step"] for rank in ranks] == [[0, 1]] * 2, "and the ranks go on together"


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_adapters_that_trl_cannot_merge_are_refused(mode: str, tmp_path: Path) -> None:
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, peft=True, vllm_mode=mode)
    trainer._dist.fsdp_version = 1
    with pytest.raises(
        ValueError, match=r"TRL cannot merge adapters into a policy that FSDP1 shards.*train with FSDP2"
    ):
        AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    assert not trainer.use_vllm
