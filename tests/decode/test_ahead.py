"""What becomes of drafts that were queued for the requests of the step before."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from atlas_rl.controller.base import Step
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Draft, Hidden
from atlas_rl.decode.ahead import DraftsAhead, of_active
from atlas_rl.decode.checked import checked_plan, checked_plan_ahead
from atlas_rl.report.recorder import StepRecorder
from tests.drafters import Stateless


@pytest.mark.parametrize("seed", range(20))
def test_every_request_gets_its_own_row_within_its_room(seed):
    rng = np.random.default_rng(seed)
    former, requests = (rng.permutation(12)[: rng.integers(1, 10)] for _ in range(2))
    width, num_tokens = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    tokens = rng.integers(0, 99, (len(former), width))
    sure = rng.random((len(former), width)).astype(np.float32)
    lengths, room = rng.integers(0, width + 1, len(former)), rng.integers(0, 5, len(requests))
    asked, own_tokens, own_sure, own_lengths, anybody = of_active(
        former, np.full(12, -1), requests, room, num_tokens, tokens, sure, lengths
    )
    rows = {request: row for row, request in enumerate(former.tolist())}
    for row, request in enumerate(requests.tolist()):
        if request not in rows:
            assert asked[row] == own_lengths[row] == 0
            continue
        assert asked[row] == min(num_tokens, room[row])
        assert own_lengths[row] == min(lengths[rows[request]], room[row])
        assert own_tokens[row].tolist() == tokens[rows[request]].tolist()
        assert own_sure[row].tolist() == sure[rows[request]].tolist()
    assert anybody == asked.any()


def test_plans_that_ask_what_cannot_be_asked_are_refused():
    step = Step(np.array([3, 3]), 10, ["history", "head"], ahead=("head",))
    assert list(checked_plan({"history": np.array([1, 2])}, step)) == ["history"]
    with pytest.raises(ValueError, match="drafts ahead"):
        checked_plan({"head": np.array([1, 2])}, step)
    assert checked_plan_ahead({"head": 3}, ("head",)) == {"head": 3}
    with pytest.raises(ValueError, match="does not draft ahead"):
        checked_plan_ahead({"history": 3}, ("head",))
    for wrong in (0, 2.5, None):
        with pytest.raises(ValueError, match="number of tokens from 1 on"):
            checked_plan_ahead({"head": wrong}, ("head",))


CAPTURE_S, WAIT_S = 4.0, 0.5
SEQUENCES = SimpleNamespace(lengths=np.full(8, 20))


class Head(Stateless):
    """Drafts two tokens per request ahead. Queuing the first draft takes a capture, and fetching one a while."""

    name = "head"

    def __init__(self):
        self.now, self.taken_s = 0.0, 0.0

    @property
    def once_s(self):
        return self.taken_s

    def propose(self, sequences, requests, max_draft_tokens):
        raise AssertionError("asked in the usual way")

    def propose_ahead(self, sequences, coming, num_tokens):
        if not self.taken_s:
            self.now, self.taken_s = self.now + CAPTURE_S, CAPTURE_S

        def fetch():
            self.now += WAIT_S
            tokens = np.ones((len(coming.requests), num_tokens), np.int64)
            return Draft(tokens, np.full(len(tokens), num_tokens), np.full(tokens.shape, 0.5, np.float32))

        return fetch


class Queue:
    """Drafts ahead of one head, without a loop."""

    def __init__(self):
        self.head = Head()
        self.recorder = StepRecorder(speculators=("head",), clock=lambda: self.head.now)
        controller = FixedController(["head"], "head", 2, ahead=True)
        self.ahead = DraftsAhead({"head": self.head}, controller, self.recorder)

    def queue(self, requests, room, *, decided=lambda: (None, None)):
        step = Step(np.array(room), 100, ["head"])
        with self.recorder.time("forward"):
            self.ahead.queue(step, SEQUENCES, np.array(requests), decided, Hidden.none())

    def fetch(self, requests, room):
        step = Step(np.array(room), 100, ["head"])
        with self.recorder.time("controller"):
            self.ahead.fetch(SEQUENCES, np.array(requests), step)
        return step


def test_a_wait_for_a_draft_is_its_cost():
    queue = Queue()
    assert queue.fetch([0, 1], [9, 9]).ahead == ("head",), "its drafts begin behind the first forward"
    queue.queue([0, 1], [9, 9])
    step = queue.fetch([1, 2], [8, 9])
    assert (step.ahead, step.planned_ahead) == (("head",), True)
    assert (step.draft_s, step.wasted_s) == ({"head": WAIT_S}, 0.0)
    assert step.drafts["head"].lengths.tolist() == [2, 0]


@pytest.mark.parametrize(("requests", "room"), [([4, 5], [9, 9]), ([0, 1], [0, 0]), ([1, 4], [0, 9])])
def test_a_wait_for_a_draft_that_nobody_can_use_is_set_apart(requests, room):
    queue = Queue()
    queue.queue([0, 1], [9, 9])
    step = queue.fetch(requests, room)
    assert step.drafts == step.asked == step.draft_s == {}
    assert step.wasted_s == WAIT_S


def test_nothing_is_queued_for_requests_that_will_have_no_room():
    queue = Queue()
    queue.queue([0, 1], [1, 0])
    step = queue.fetch([0, 1], [0, 0])
    assert (queue.head.now, step.planned_ahead, step.ahead) == (0.0, False, ())
    queue.queue([0, 1], [1, 2])
    assert queue.fetch([0, 1], [0, 1]).asked["head"].tolist() == [0, 1]


def test_where_the_host_decides_a_drafter_is_asked_in_the_usual_way():
    queue = Queue()
    queue.queue([0, 1], [9, 9], decided=None)
    step = queue.fetch([0, 1], [8, 8])
    assert (step.ahead, step.planned_ahead, step.drafts) == ((), False, {})
    assert step.left == ["head"]


def test_captures_of_queued_drafts_are_told():
    queue = Queue()
    for _ in range(2):
        queue.queue([0, 1], [9, 9])
        assert queue.ahead.once_s == CAPTURE_S
        queue.fetch([0, 1], [8, 8])
