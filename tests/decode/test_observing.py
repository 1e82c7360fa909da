"""Late observers observe before they draft, or while the next forward runs; nothing else changes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from atlas_rl.controller.base import Step
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Draft, Prompts, SamplingParams, Sequences, Verified
from atlas_rl.decode.observing import Observing
from atlas_rl.decode.propose import Proposing
from atlas_rl.policy.base import PolicyCache
from atlas_rl.replay.costs import ToldClock
from atlas_rl.report.recorder import StepRecorder
from atlas_rl.speculators.base import NO_PROMPTS
from tests.drafters import Stateless
from tests.engines import engine_of, generate, reference


class Noting(Stateless):
    """Notes the calls that it gets, and how much of every text it has been told when it needs to know."""

    name = "noting"

    def __init__(self, *, late: bool) -> None:
        self.observes_late = late
        self.calls: list[str] = []
        self.told: dict[int, int] = {}  # tokens of each request in the batch
        self.was_up_to_date = True

    def start(
        self,
        sequences: Sequences,
        requests: np.ndarray,
        prompts: Prompts = NO_PROMPTS,
        cache: PolicyCache | None = None,
    ) -> None:
        self.calls.append("start")
        self._compare(sequences)
        self.told |= {int(request): int(sequences.prompt_lengths[request]) for request in requests}

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int:
        self.calls.append("backlog")
        return 0

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        self.calls.append("propose")
        self._compare(sequences)
        batch = len(requests)
        tokens = np.full((batch, 2), 7)
        return Draft(tokens, np.minimum(max_draft_tokens, 2), np.full((batch, 2), 0.5, np.float32))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self.calls.append("observe")
        for request, count, finished in zip(verified.requests, verified.num_committed, verified.finished, strict=True):
            self.told[int(request)] += int(count)
            if finished:
                del self.told[int(request)]
        self._compare(sequences)

    def learn(self) -> None:
        self.calls.append("learn")

    def _compare(self, sequences: Sequences) -> None:
        self.was_up_to_date &= all(sequences.lengths[request] == told for request, told in self.told.items())


class Never(FixedController):
    """Asks nobody."""

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        return {}


class Sometimes(FixedController):
    """Asks in every third step."""

    steps = 0

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        if not step.drafts:
            self.steps += 1
        return super().plan(step) if self.steps % 3 == 0 else {}


ORDERS = {
    # The drafter is asked about fewer requests where some have no room, and its backlog is asked for again.
    (FixedController, False): "start (observe backlog ((backlog )?propose )?learn )+observe learn ",
    (FixedController, True): "start (backlog observe ((backlog )?propose )?learn )+observe learn ",
    (Never, False): "start (observe backlog learn )+observe learn ",
    (Never, True): "start (backlog observe learn )+observe learn ",
}


@pytest.mark.parametrize(("controller", "late"), ORDERS)
def test_the_order_of_calls(controller: type[FixedController], late: bool) -> None:
    drafter = Noting(late=late)
    output = generate(engine_of(speculators=[drafter], controller=controller(["noting"], "noting", 2)))
    assert output.completion_ids == reference().completion_ids
    assert re.fullmatch(ORDERS[controller, late], "".join(f"{call} " for call in drafter.calls))
    assert drafter.was_up_to_date


@pytest.mark.parametrize("late", [False, True])
def test_a_drafter_knows_every_token_when_it_drafts_and_when_requests_enter(late: bool) -> None:
    drafter = Noting(late=late)
    controller = Sometimes(["noting"], "noting", 2)
    output = generate(engine_of(speculators=[drafter], controller=controller, max_batch_size=3))
    assert output.completion_ids == reference().completion_ids
    assert drafter.calls.count("start") > 2
    assert 0 < drafter.calls.count("propose") < drafter.calls.count("backlog")
    assert drafter.was_up_to_date
    assert not drafter.told


OBSERVE_S, DRAFT_S = 2.0, 1.0


class Slow(Noting):
    """Takes a while to observe and to draft."""

    def __init__(self, clock: ToldClock) -> None:
        super().__init__(late=True)
        self.clock = clock

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self.clock.now_s += OBSERVE_S

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        self.clock.now_s += DRAFT_S
        return Draft.empty(len(requests))


@pytest.mark.parametrize(
    ("is_hidden", "charged_s", "apart_s"), [(True, OBSERVE_S + DRAFT_S, 0.0), (False, DRAFT_S, -OBSERVE_S)]
)
def test_who_is_asked_pays_for_observing_where_it_would_have_been_hidden(
    is_hidden: bool, charged_s: float, apart_s: float
) -> None:
    two, clock = np.ones(2, np.int64), ToldClock()
    sampling = SamplingParams(max_new_tokens=9)
    sequences = Sequences(np.ones((2, 9), np.int32), two, two, two, two.astype(np.uint64), sampling, 64, 0)
    drafter, recorder = Slow(clock), StepRecorder(speculators=("noting",), clock=clock)
    observing = Observing({"noting": drafter}, lambda one, seen: one.observe(sequences, seen), is_hidden)
    observing.put_off(Verified(*[np.zeros(2, np.int64)] * 6))
    proposing = Proposing({"noting": drafter}, FixedController(["noting"], "noting", 2), recorder, observing)
    with recorder.time("controller"):
        step = proposing.run(sequences, np.arange(2), np.full(2, 9))
    assert step.draft_s == {"noting": charged_s}
    assert step.exposed_s == apart_s  # the loop adds the whole way from the outcome to the forward
    assert (recorder.seconds("observe"), recorder.seconds("draft")) == (OBSERVE_S, DRAFT_S)
