"""Where a worker waits for calls and learns meanwhile: no call is lost, and learning ends with the engine."""

from __future__ import annotations

import logging
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from atlas_rl.vllm.checks import options_of
from atlas_rl.vllm.internals import idle

RUNNER = SimpleNamespace(requests={})
LARGE = ("execute_model", bytes(500))
SMALL = ("sample_tokens", b"")


class Learner:
    """A drafter that can always learn, does something instead, and is asked no more than three times."""

    def __init__(self, instead: Any) -> None:
        self.instead, self.pieces, self.told = instead, 0, 0

    def has_spare_time(self) -> bool:
        return True

    def study(self) -> None:
        self.pieces += 1
        assert self.pieces <= 3, "it goes on"
        self.instead(self.pieces)

    def rest(self, *, expects_tokens: bool) -> None:
        self.told += 1


class LateSocket:
    """A socket that sends a message when it is asked to; its slot in the ring was written before."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.is_due, self.may_send = socket, threading.Event(), threading.Event()

    def send_multipart(self, *args: Any, **kwargs: Any) -> None:
        self.is_due.set()
        assert self.may_send.wait(60)
        self.socket.send_multipart(*args, **kwargs)


@pytest.fixture
def ends() -> tuple[Any, Any]:
    """Both ends of vLLM's queue of calls, with slots that `LARGE` does not fit into."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    writer = MessageQueue(1, 1, max_chunk_bytes=200)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    return writer, reader


def test_a_call_is_waited_for_if_its_slot_came_first(ends: tuple[Any, Any]) -> None:
    """Else the other ranks enter the step without this one."""
    writer, reader = ends
    writer.local_socket = late = LateSocket(writer.local_socket)
    writing = threading.Thread(target=writer.enqueue, args=(LARGE,))
    writing.start()
    assert late.is_due.wait(60)

    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            return reader.dequeue(*args, **kwargs)
        finally:
            late.may_send.set()

    learner = Learner(lambda piece: pytest.fail("the call is taken for none"))
    assert idle._next_call(read, reader, RUNNER, learner, indefinite=True) == LARGE
    writing.join()
    assert learner.told == 1


def test_calls_are_taken_between_two_pieces(ends: tuple[Any, Any]) -> None:
    writer, reader = ends
    learner = Learner(lambda piece: writer.enqueue({1: SMALL, 3: LARGE}[piece]) if piece != 2 else None)
    following = partial(idle._next_call, reader.dequeue, reader, RUNNER, learner, indefinite=True)
    assert following() == SMALL
    assert learner.pieces == 1
    assert following() == LARGE
    assert (learner.pieces, learner.told) == (3, 2)


def test_learning_ends_with_the_engine(ends: tuple[Any, Any]) -> None:
    """vLLM's monitor of its death says so to the queue, which raises where it would wait."""
    _, reader = ends
    learner = Learner(lambda piece: reader.shutdown() if piece == 2 else None)
    with pytest.raises(RuntimeError, match="cancelled"):
        idle._next_call(reader.dequeue, reader, RUNNER, learner, indefinite=True)
    assert learner.pieces == 2


@pytest.mark.parametrize(
    ("size", "is_new", "reason"),
    [(2, True, "with data parallelism"), (1, False, "it takes vLLM 0.32")],
)
def test_it_is_said_once_where_it_was_asked_for_and_cannot_be(
    size: int, is_new: bool, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(idle, "since", lambda version: is_new)
    with caplog.at_level(logging.WARNING):
        for replica in range(size):
            for rank in range(2):
                idle.study_while_waiting(
                    SimpleNamespace(data_parallel_size=size, data_parallel_index=replica, rank=rank)
                )
    (warning,) = caplog.messages
    assert f"idle_learning is on, but drafters cannot learn in idle time: {reason}" in warning


@pytest.mark.parametrize("given", ["off", "on", 0, 1, None])
def test_the_option_is_a_flag(given: Any) -> None:
    with pytest.raises(ValueError, match=r"\['idle_learning'\] must be True or False, got"):
        options_of(SimpleNamespace(additional_config={"atlas_rl": {"idle_learning": given}}))
    for flag in (False, True):
        own = {"idle_learning": flag}
        assert options_of(SimpleNamespace(additional_config={"atlas_rl": own})) == own
