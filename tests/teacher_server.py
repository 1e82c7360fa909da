"""A server that scores texts, as vLLM answers `prompt_logprobs`: the teacher of TRL's `ServerDistillationTrainer`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import torch

from tests.local_http import serving

_UP = {"/health": {}, "/v1/models": {"data": [{"id": "teacher"}]}}


@contextmanager
def scoring(model: Any) -> Iterator[str]:
    """The address of a server that scores texts with a policy."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(_UP[self.path])

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [scores_of(model, tokens, asked["prompt_logprobs"]) for tokens in asked["prompt"]]
            self._answer({"choices": [{"prompt_logprobs": each} for each in scores]})

        def _answer(self, body: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address


@torch.no_grad()
def scores_of(model: Any, tokens: list[int], most: int) -> list[dict[str, dict[str, float]] | None]:
    """For each token of a text the likeliest tokens at its place and the token itself, with logprob and rank."""
    logprobs = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    places: list[dict[str, dict[str, float]] | None] = [None]
    for row, token in zip(logprobs, tokens[1:], strict=True):
        order = row.argsort(descending=True).tolist()
        named = dict.fromkeys([*order[:most], token])
        places.append({str(each): {"logprob": float(row[each]), "rank": order.index(each) + 1} for each in named})
    return places
