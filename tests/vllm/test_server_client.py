"""Addresses at which no server of ours is: each is named, and none is waited for without end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests import vllm_engines  # first: it skips this module where there is no vLLM
from tests.vllm_server import free_port

__all__ = ["vllm_engines"]


@contextmanager
def answering(answers: Mapping[str, tuple[int, Any]]) -> Iterator[str]:
    """The address of something that answers these paths, and 404 to all others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers.get(self.path.partition("?")[0], (404, {}))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


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
