"""TRL's client of a vLLM server, with seeds per prompt, weights over gloo and reports, which our server supports."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlparse

import torch
from trl.generation.vllm_client import VLLMClient

from atlas_kernels.noise import mix64
from atlas_rl.integrations.trl.together import of_main_rank
from atlas_rl.report.report import StepReport
from atlas_rl.vllm.checks import PROPOSER
from atlas_rl.vllm.internals.transfer import BACKENDS, GLOO
from atlas_rl.vllm.serve import EXTENSION
from atlas_rl.vllm.weight_group import WeightGroup, address_towards

_ANSWER_S, _HEALTH_S = 600.0, 5.0
_AT_ONCE = 64  # concurrent requests: the number of connections that TRL's session keeps
_ANSWER = ("prompt_ids", "completion_ids", "logprobs", "logprob_token_ids")
_LONGEST = 2000  # characters of an answer that a message quotes

START_OURS = "start it with `atlas-rl vllm-serve MODEL` (docs/scaling.md)"


@dataclass(frozen=True)
class ServerStatus:
    """Status of a server; see `AtlasWorkerExtension.atlas_status`."""

    server: str
    policy_version: int
    weights_are_whole: bool
    num_trainers: int


@dataclass
class ServerCall:
    """One generation call: its seed, ending tokens and result.

    Attributes:
        seed: Seed of the noise of all its completions.
        stop_token_ids: Tokens that end a completion.
        num_prompt_tokens: Prompt tokens of all requests, repeats counted.
        completion_lengths: In tokens, one per request.
        failure: Error of the call. TRL continues without completions, so that all ranks reach the point where it is
            raised.
    """

    seed: int
    stop_token_ids: list[int]
    num_prompt_tokens: int = 0
    completion_lengths: tuple[int, ...] = ()
    failure: Exception | None = None


class AtlasClient(VLLMClient):  # type: ignore[misc, unused-ignore]
    """Extends TRL's client; other attributes are those of TRL's client.

    Errors are built-in exceptions that name the server: ConnectionError if it does not answer, RuntimeError if it
    answers with an error. Calls that must not happen twice are not repeated.
    """

    call: ServerCall | None = None
    connection: int | None = None
    """Number of the trainers that had connected to the server when this one had; None before."""

    _group: WeightGroup | None = None

    @classmethod
    def adopting(cls, client: VLLMClient) -> AtlasClient:
        """Wrap a client that TRL has made; both share connections and communicator."""
        own = cls.__new__(cls)
        own.__dict__ = client.__dict__
        return own

    # ------------------------------------------------------------------------------------------------------- our calls

    def check_server_is_ours(self) -> str:
        """Raise `ValueError` for a server without our drafter, or one that does not notify it of new weights.

        Returns:
            The name of its weight-transfer backend.
        """
        config = self._configuration()
        drafting, parallel = config.get("speculative_config") or {}, config.get("parallel_config") or {}
        transfer = (config.get("weight_transfer_config") or {}).get("backend")
        lacks = [
            text
            for text, missing in (
                (f"our proposer ({PROPOSER})", drafting.get("model") != PROPOSER),
                (f"our worker extension ({EXTENSION})", parallel.get("worker_extension_cls") != EXTENSION),
                (
                    f"a weight transfer that tells drafters of new weights ({' or '.join(BACKENDS)})",
                    transfer not in BACKENDS,
                ),
            )
            if missing
        ]
        if lacks:
            raise ValueError(
                f"the vLLM server at {self.base_url} was started without {', without '.join(lacks)}: {START_OURS}"
            )
        mode = (config.get("model_config") or {}).get("logprobs_mode")
        if mode != "processed_logprobs":
            raise ValueError(
                f"the vLLM server at {self.base_url} returns {mode}, not the logprobs of the sampled distribution: "
                f"{START_OURS}"
            )
        return str(transfer)

    def _configuration(self) -> dict[str, Any]:
        """vLLM's configuration of the server; `ValueError` for a server that does not publish it."""
        response = self.session.get(f"{self.base_url}/server_info", params={"config_format": "json"})
        if response.status_code == 404:
            raise ValueError(
                f"the vLLM server at {self.base_url} was started without the development endpoints through which weights "
                f"and reports go: {START_OURS}"
            )
        answer = self._read("/server_info", response)
        if not isinstance(answer, dict) or not isinstance(answer.get("vllm_config"), dict):
            raise self._unexpected("/server_info", answer)
        return answer["vllm_config"]

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Wait until the server is up. TRL's method waits for ever if another program answers at this address.

        Raises:
            ConnectionError: Nothing answers within `total_timeout` seconds, or a program answers that is not a vLLM
                server.
        """
        until_s = time.monotonic() + total_timeout
        while (code := self._health()) != 200:
            if code == 404:
                raise ConnectionError(
                    f"the server at {self.base_url} is no vLLM server (/health is not there): check address and port"
                )
            if time.monotonic() >= until_s:
                answers = "nothing answers" if code is None else f"/health answers {code}"
                raise ConnectionError(
                    f"no vLLM server is up at {self.base_url} after {total_timeout:g} s ({answers}): check address and "
                    f"port, or {START_OURS}"
                )
            time.sleep(retry_interval)
        super().check_server(total_timeout, retry_interval)

    def _health(self) -> int | None:
        """The HTTP status of `/health`; None if nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=_HEALTH_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, http.client.HTTPException):
            return None

    def status(self) -> ServerStatus:
        """Identity of the server and its policy version; `ValueError` if another version of the package answers."""
        told = self._rpc("atlas_status")
        if set(told) != {field.name for field in fields(ServerStatus)}:
            raise self._unexpected("atlas_status", told)
        return ServerStatus(**told)

    def report(self) -> StepReport:
        """The server's report since the last request; `ValueError` if another version of the package wrote it."""
        return StepReport.from_dict(self._rpc("atlas_report"))

    def _rpc(self, method: str) -> dict[str, Any]:
        answer = self.ask("/collective_rpc", {"method": method})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results or not isinstance(results[0], dict):
            raise self._unexpected(method, answer)
        return results[0]

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Send one POST, without retries, and return the answer.

        Raises:
            ConnectionError: No server answers.
            RuntimeError: The server returns an error; the message quotes it.
        """
        request = urllib.request.Request(
            self.base_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise self._refused(path, error.code, error.read().decode(errors="replace")) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"the vLLM server at {self.base_url} does not answer ({error}). If it has died, its log says why: start it "
                "again, and resume the run from its last checkpoint"
            ) from error
        return json.loads(text) if text else None

    def _refused(self, path: str, code: int, text: str) -> RuntimeError:
        return RuntimeError(f"the vLLM server at {self.base_url} answered {path} with {code}: {text[:_LONGEST]}")

    def _unexpected(self, call: str, answer: Any) -> ValueError:
        return ValueError(
            f"the vLLM server at {self.base_url} answers {call} in another form than this version of atlas_rl reads "
            f"({str(answer)[:_LONGEST]}): install the same versions of vLLM and atlas_rl for server and trainer, and start "
            "the server again"
        )

    # ------------------------------------------------------------------------------------------------------ generating

    def generate(  # type: ignore[override]
        self, prompts: Any, features: Any = None, n: int = 1, generation_kwargs: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Generate like TRL's client, within a `call` that has a request and a seed for each prompt.

        A request with several prompts has a single seed, so their completions would be drawn with the same noise.
        """
        call = self.call
        if call is None:
            return super().generate(prompts, features, n=n, generation_kwargs=generation_kwargs, **options)

        def complete(index: int) -> dict[str, Any]:
            seed = mix64(call.seed ^ mix64(index + 1)) >> 2  # below 2^62: vLLM adds the sample's number
            asked = {**(generation_kwargs or {}), "seed": seed, "stop_token_ids": call.stop_token_ids}
            return super(AtlasClient, self).generate([prompts[index]], n=n, generation_kwargs=asked, **options)

        answers: list[dict[str, Any]] = []
        try:
            with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(prompts)))) as executor:
                answers += executor.map(complete, range(len(prompts)))
        except Exception as error:  # noqa: BLE001 - the other ranks wait for completions: the adapter raises it on all
            call.failure = error
        # A trainer that asks for no logprobs gets none.
        joined: dict[str, Any] = {
            name: None if any(answer[name] is None for answer in answers) else [r for a in answers for r in a[name]]
            for name in _ANSWER
        }
        call.num_prompt_tokens = n * sum(map(len, joined["prompt_ids"]))
        call.completion_lengths = tuple(map(len, joined["completion_ids"]))
        return joined

    def _post(self, url: str, **options: Any) -> Any:
        return self._read(urlparse(url).path, self.session.post(url, **options))

    def _get(self, url: str, **options: Any) -> Any:
        return self._read(urlparse(url).path, self.session.get(url, **options))

    def _read(self, path: str, response: Any) -> Any:
        if response.status_code != 200:
            raise self._refused(path, response.status_code, response.text)
        return response.json()

    # --------------------------------------------------------------------------------------------------------- weights

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """Connect to the server's workers, over gloo if its backend is gloo, else as TRL does; once.

        Raises:
            ValueError: See `check_server_is_ours`.
        """
        if self.connection is not None:
            return
        if self.check_server_is_ours() == GLOO:
            self._join_over_gloo()
        else:
            super().init_communicator(device)
        self.connection = self.status().num_trainers

    def _join_over_gloo(self) -> None:
        where = urlparse(self.base_url)
        address = address_towards(where.hostname or "", where.port or 80)
        world_size = self.get_world_size() + 1
        info = {"master_address": address, "master_port": self.group_port, "rank_offset": 1, "world_size": world_size}
        # Client and server wait for each other here.
        with ThreadPoolExecutor(1) as executor:
            joined = executor.submit(self.ask, "/init_weight_transfer_engine", {"init_info": info})
            self._group = WeightGroup(address, self.group_port, 0, world_size)
            joined.result()

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        """Send weights like TRL's client. Always exhausts `named_params`, because TRL unmerges adapters at its end."""
        try:
            if self._group is None:
                super().update_named_params(metadata, named_params)
            else:
                self._update_over_gloo(self._group, metadata, named_params)
        finally:
            for _ in named_params:
                pass

    def _update_over_gloo(
        self,
        group: WeightGroup,
        metadata: list[tuple[str, str, list[int]]],
        named_params: Iterator[tuple[str, torch.Tensor]],
    ) -> None:
        names, dtype_names, shapes = (list(field) for field in zip(*metadata, strict=True))
        info = {"names": names, "dtype_names": dtype_names, "shapes": shapes}
        self._start_weight_update()
        with ThreadPoolExecutor(1) as executor:
            loaded = executor.submit(self.ask, "/update_weights", {"update_info": info})
            for _, tensor in named_params:
                if loaded.done():
                    loaded.result()  # refused before all weights were sent
                group.send(tensor)
            loaded.result()
        self._finish_weight_update()

    def _start_weight_update(self) -> None:
        self.ask("/start_weight_update", {})

    def _finish_weight_update(self) -> None:
        self.ask("/finish_weight_update", {})

    def close_communicator(self) -> None:
        if self._group is None:
            super().close_communicator()
        self._group = None


@contextmanager
def our_clients() -> Iterator[None]:
    """Context in which TRL connects to servers by our client. If that fails, every rank raises the error.

    TRL connects in the main process, while the other ranks wait in a barrier whether it succeeds or not.
    """
    from trl.generation import vllm_generation

    generation_class: Any = vllm_generation.VLLMGeneration
    own = generation_class._init_vllm

    def init_vllm(generation: Any) -> None:
        if generation.mode == "server":
            connected: list[AtlasClient] = []
            of_main_rank(generation.accelerator, lambda: connected.append(_connected_client(generation)))
            with _client_of_trl(lambda **_: connected[0]):
                own(generation)
        else:
            own(generation)

    generation_class._init_vllm = init_vllm
    try:
        yield
    finally:
        generation_class._init_vllm = own


def _connected_client(generation: Any) -> AtlasClient:
    """A client of the server that TRL's `VLLMGeneration` was given; raises like `AtlasClient.init_communicator`."""
    address = generation.server_base_url or f"http://{generation.server_host}:{generation.server_port}"
    timeout_s = float(generation.server_timeout)
    client = AtlasClient(address, group_port=generation.group_port, connection_timeout=timeout_s)
    client.init_communicator(generation.accelerator.device)
    return client


@contextmanager
def _client_of_trl(make: Any) -> Iterator[None]:
    """Context in which TRL's `VLLMGeneration` makes its client by `make`."""
    from trl.generation import vllm_generation

    own = vllm_generation.VLLMClient
    vllm_generation.VLLMClient = make  # type: ignore[misc]
    try:
        yield
    finally:
        vllm_generation.VLLMClient = own  # type: ignore[misc]
