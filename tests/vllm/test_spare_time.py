"""When drafters of a server learn in idle time, without vLLM; `test_server.py` has servers that wait."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_rl.controller.fixed import NoSpeculation
from atlas_rl.core import Draft, SamplingParams, Sequences
from atlas_rl.vllm.drafting import Drafting
from atlas_rl.vllm.spare_time import SpareTime
from tests.drafters import Stateless


class Student(Stateless):
    """Drafts nothing, and has so many pieces to learn."""

    name = "student"

    def __init__(self, pieces: int) -> None:
        self.left, self.num_ends = pieces, 0

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        return Draft.empty(len(requests))

    def study(self) -> bool:
        self.left -= 1
        return self.left > 0

    def end_study(self) -> None:
        self.num_ends += 1


class Server:
    """Drafters of a server that has generated some tokens, and its idle time."""

    def __init__(self, tokens: int, pieces: int = 9) -> None:
        self.student, self.drafting = Student(pieces), Drafting(3, 256, 4, 100)
        self.drafting.use({"student": self.student}, NoSpeculation())
        self.drafting.requests.table.open(SamplingParams(max_new_tokens=8), 0)
        self.spare = SpareTime(self.drafting)
        self.generates(tokens)

    def generates(self, tokens: int) -> None:
        self.drafting.traffic.ended(5, tokens)


def test_enough_new_tokens_begin_it_and_it_ends_by_itself() -> None:
    server = Server(2047)
    assert not server.spare.is_there()
    server.generates(1)
    while server.spare.is_there():
        server.spare.study()
    assert server.student.left == 0
    assert server.student.num_ends == 1, "it need not hold anything"
    report = server.drafting.take_report()
    assert report.idle_learning_s > 0
    assert (report.generate_s, report.refresh_s) == (0, 0), "nobody waited"
    assert server.drafting.take_report().idle_learning_s == 0
    server.generates(2047)
    assert not server.spare.is_there(), "those before are known"


def test_a_step_ends_it_and_small_calls_add_up() -> None:
    server = Server(1500)
    server.spare.rest(expects_tokens=True)
    server.generates(1500)
    server.spare.rest(expects_tokens=True)  # the step that tells a worker which requests have ended
    assert server.spare.is_there()
    server.spare.study()
    assert server.student.num_ends == 0
    server.spare.rest(expects_tokens=True)
    assert not server.spare.is_there()
    assert server.student.num_ends == 1


@pytest.mark.parametrize("begun", [False, True])
def test_nothing_is_learned_after_other_calls(begun: bool) -> None:
    """They bring weights, or send the engine to sleep; what they say is not known."""
    server = Server(5000)
    assert server.spare.is_there()
    if begun:
        server.spare.study()
    server.spare.rest(expects_tokens=False)
    assert not server.spare.is_there()
    assert server.student.num_ends == begun


def test_not_while_requests_run_or_in_a_call_of_an_engine() -> None:
    server = Server(5000)
    table = server.drafting.requests.table
    table.request_of["a request"] = 0
    assert not server.spare.is_there()
    table.leave("a request")
    assert server.spare.is_there()
    table.close()
    assert not server.spare.is_there()
