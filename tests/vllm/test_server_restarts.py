"""Servers that are killed in the middle of something and started again on the same port; then adapters, on the last one.

Each is a real server, killed at once with all its workers. A trainer gets a clear error, nothing is left half done, and a
run that resumes from its last checkpoint goes on. The tests follow one another: starting a server takes longer than they do.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from atlas_rl import AtlasRolloutEngine
from tests import vllm_engines  # first: it skips this module where there is no vLLM
from tests.vllm.served import build, check_logprobs, complete, errors_of, loaded, policy, saved_policies
from tests.vllm_server import Server, call, free_port, post_for_text, start, wait_for

__all__ = ["vllm_engines"]
WITH_ADAPTERS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
STOPPING_S = 60
SENDING_S = 0.5  # in which a request is sent; a later one finds no server, which is one more thing that happens


class Port:
    """A port whose server can be killed and started again."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.number = model, folder, free_port()
        self.address = f"http://127.0.0.1:{self.number}"
        self._server: Server | None = None

    def up(self) -> str:
        """Its address, when a server is up."""
        if self._server is None or self._server.process.poll() is not None:
            self.start()
        assert self._server is not None
        wait_for(self._server)
        return self.address

    def start(self, *flags: str) -> None:
        """Start a server, and do not wait for it. vLLM lets a second one listen on the same port: there must be none."""
        assert self._server is None or self._server.process.poll() is not None, "the last one still runs"
        self._server = start(self.model, self.folder, *flags, port=self.number)

    def stop(self) -> None:
        """Let it and all its workers do nothing, but keep its connections. Returns when they do nothing.

        A process goes on after the signal until one of its threads is scheduled and takes it.
        """
        assert self._server is not None
        os.killpg(self._server.process.pid, signal.SIGSTOP)
        until_s = time.monotonic() + STOPPING_S
        while running := threads_of_group(self._server.process.pid) - {"T", "Z"}:
            assert time.monotonic() < until_s, f"threads of the stopped server are still in the states {running}"
            time.sleep(0.01)
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{self.address}/health", timeout=SENDING_S)

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()


def threads_of_group(group: int) -> set[str]:
    """The states in which the threads of a group of processes are, as /proc names them: T is stopped, Z has ended."""
    states = set()
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            states |= {state} if int(of_group) == group else set()
    return states


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_policies(tmp_path_factory, 1)


@pytest.fixture(scope="module")
def port(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    made = Port(folders[0], tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


def attached(folder: Path, address: str, output: Path, **options: Any) -> Any:
    """A trainer that saves after each step, with an engine attached."""
    saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = build(loaded(folder), address, output, **(saving | options))
    AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    return trainer


def unchanged_since(checkpoint: Path, trainer: Any) -> bool:
    saved = loaded(checkpoint).state_dict()
    return all(torch.equal(weight, saved[name]) for name, weight in trainer.model.state_dict().items())


def kill_in_a_request(port: Port, *, start_with: tuple[str, ...] | None) -> threading.Thread:
    """Kill the server after the next request was sent and before it is answered, and start another if told with which flags.

    It is stopped first: a server that goes on may answer before it is killed.
    """
    port.stop()

    def wait_and_kill() -> None:
        time.sleep(SENDING_S)
        port.kill()
        if start_with is not None:
            port.start(*start_with)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def with_retries(client: Any, times: int) -> None:
    """TRL's client repeats a request for about a minute; let it end at once, or go on until a server is up."""
    retries = Retry(total=times, connect=times, read=times, backoff_factor=0.5, backoff_max=1.0, allowed_methods=None)
    client.session.mount("http://", HTTPAdapter(max_retries=retries, pool_maxsize=64))


def test_killed_inside_a_weight_update(port: Port, folders: list[Path], tmp_path: Path) -> None:
    trainer = attached(folders[0], port.up(), tmp_path, peft=True)
    adapter = trainer.vllm_generation
    client, updates = adapter.generation.vllm_client, []
    update = client.update_named_params

    def killing(named: Iterator[Any]) -> Iterator[Any]:
        for number, pair in enumerate(named):
            if number == 3:
                port.kill()
            yield pair

    def killed_at_the_second(metadata: Any, named: Iterator[Any]) -> None:
        updates.append(len(metadata))
        update(metadata, killing(named) if len(updates) == 2 else named)

    client.update_named_params = killed_at_the_second
    with pytest.raises(RuntimeError, match=f"the policy's weights did not reach the vLLM server at {port.address}"):
        trainer.train()
    assert updates[1] > 4, "it died in the middle"
    assert trainer.state.global_step == len(adapter.engine.reports) == 1
    assert not any(getattr(module, "merged", False) for module in trainer.model.modules()), "adapters are apart again"
    with pytest.raises(ConnectionError, match=r"does not answer .* start it again, and resume the run from its last"):
        adapter.generate([[2, 3]] * 4, None, 4)

    port.up()
    with pytest.raises(RuntimeError, match="was restarted and has lost the policy"):
        adapter.generate([[2, 3]] * 4, None, 4)
    resumed = attached(folders[0], port.address, tmp_path, peft=True, max_steps=2)
    errors = errors_of(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [report.step for report in resumed.vllm_generation.engine.reports] == [1]
    assert len(errors) == 8
    assert max(errors) < 1e-3, "the new server has the trainer's weights"


def test_killed_and_started_again_inside_a_generate(port: Port, folders: list[Path], tmp_path: Path) -> None:
    """The repeated requests are answered from the initial weights: such completions are not trained on."""
    trainer = attached(folders[0], port.up(), tmp_path, max_completion_length=100)
    adapter = trainer.vllm_generation
    client, killers = adapter.generation.vllm_client, []
    with_retries(client, 10_000)
    send, once = client._post, threading.Lock()

    def killed_in_the_second_step(url: str, **options: Any) -> Any:
        at_completions = trainer.state.global_step == 1 and url.endswith("/v1/completions")
        if at_completions and once.acquire(blocking=False):  # several threads send requests
            killers.append(kill_in_a_request(port, start_with=WITH_ADAPTERS))
        return send(url, **options)

    client._post = killed_in_the_second_step
    with pytest.raises(RuntimeError, match=r"generated with policy version 0, expected \d+: it was started again"):
        trainer.train()
    killers[0].join()
    assert trainer.state.global_step == len(adapter.engine.reports) == 1
    assert unchanged_since(tmp_path / "checkpoint-1", trainer)


def adapted(seed: int, rank: int = 8) -> Any:
    torch.manual_seed(seed)
    modules = ["q_proj", "o_proj"]
    return get_peft_model(policy(1), LoraConfig(r=rank, target_modules=modules, init_lora_weights=False))


def load_adapter(port: Port, name: str, folder: Path) -> str:
    """POST /v1/load_lora_adapter: "" if it is loaded, else the server's answer."""
    try:
        post_for_text(port.address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read().decode()}"
    return ""


def test_an_adapter_that_is_loaded_is_a_new_policy_for_the_drafters(port: Port, tmp_path: Path) -> None:
    address = port.up()
    for seed in range(5):
        complete(address, seed)
    call(address, "atlas_report")
    before = call(address, "atlas_status")["policy_version"]
    for number in (1, 2):
        model = adapted(number)
        model.save_pretrained(str(tmp_path / f"adapter{number}"))
        assert load_adapter(port, f"adapter{number}", tmp_path / f"adapter{number}") == ""
        report = call(address, "atlas_report")
        assert report["policy_version"] == before + number
        assert report["refresh_s"] > 0, "drafters learn from the traffic before it"
        choices = [choice for seed in range(5) for choice in complete(address, seed, model=f"adapter{number}")]
        for choice in choices:
            check_logprobs(model, choice)
        assert sum(call(address, "atlas_report")["accepted"].values()) > 0


def test_an_adapter_that_is_refused_changes_nothing(port: Port, tmp_path: Path) -> None:
    address = port.up()
    before = call(address, "atlas_status")
    adapted(3).save_pretrained(str(tmp_path / "good"))
    adapted(3, rank=16).save_pretrained(str(tmp_path / "large"))
    assert "No adapter found" in load_adapter(port, "absent", tmp_path / "absent")
    assert "16" in load_adapter(port, "large", tmp_path / "large"), "a rank above --max-lora-rank"
    assert "conflicts with a served base model" in load_adapter(port, "policy", tmp_path / "good")
    assert call(address, "atlas_status") == before
    assert load_adapter(port, "good", tmp_path / "good") == ""
    assert "has already been loaded" in load_adapter(port, "good", tmp_path / "good")
    assert call(address, "atlas_status") == before | {"policy_version": before["policy_version"] + 1}
    check_logprobs(adapted(3), complete(address, 1, n=1, model="good")[0])
    check_logprobs(policy(1), complete(address, 1, n=1)[0])


def test_killed_inside_a_generate(port: Port, folders: list[Path], tmp_path: Path) -> None:
    trainer = attached(folders[0], port.up(), tmp_path, max_completion_length=100)
    adapter = trainer.vllm_generation
    client = adapter.generation.vllm_client
    with_retries(client, 0)
    killer = kill_in_a_request(port, start_with=None)
    with pytest.raises(ConnectionError, match=r"gave no completions|does not answer"):
        adapter.generate([[2, 3]] * 4, None, 4)
    killer.join()
    assert not adapter.engine.reports
    assert client.call is None
