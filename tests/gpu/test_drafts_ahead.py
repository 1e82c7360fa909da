"""Drafts that are queued behind the verification, on a pretended GPU: those that would be made after its outcome."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.decode.ahead import DraftsAhead
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy.captures import Captures
from atlas_rl.policy.logits import NonFiniteLogits
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.verification import Verifying
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.draft_graphs import DraftGraphs
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from tests.drafters import recurrent_drafter
from tests.gpu.engines import DEPTH, PROMPTS, SAMPLINGS, generate, policy, tokens_of
from tests.pretend_cuda import WAITS, PretendCuda

pytestmark = pytest.mark.usefixtures("probed_once")

NAME = "recurrent"
CALL: dict[str, Any] = {"temperature": 0.8, "num_generations": 2, "max_new_tokens": 12, "eos_token_ids": [17, 3, 40]}


def run(move=lambda module: module, *, controller=None, speculators=None, calls=2, faults=False, **options):
    """Calls of an engine whose rows are fewer than its requests, so that some wait for others to end."""
    speculator = recurrent_drafter(budget_share=4.0)
    engine = AtlasRolloutEngine(
        model=move(policy()), speculators=[speculator] if speculators is None else [*speculators, speculator],
        controller=controller or FixedController([NAME], NAME, DEPTH, ahead=True), console=False, audit_share=0.0,
        max_batch_size=4, verification=options.pop("verification", "invariant"),
        clock=options.pop("clock", time.perf_counter),
    )  # fmt: skip
    if not faults:
        return generate(engine, calls, **CALL | options)
    outputs = []
    for call in range(calls):
        outputs.append(engine.generate(PROMPTS, **CALL | options | {"seed": call}))
        engine.policy_updated()
    return outputs


class Fetched:
    """Notes what every step fetches, and the drafts that are asked for in the usual way after the same outcome."""

    def __init__(self, cuda: PretendCuda) -> None:
        self.ahead: list[Any] = []
        self.asked: list[Any] = []
        self.events: list[Any] = []
        self.movements = 0
        own, loops, batch = DraftsAhead.fetch, [], DecodeLoop.step

        def step(loop):
            loops.append(loop)
            batch(loop)

        def fetch(ahead, sequences, requests, step):
            first, former = len(cuda.events), [queued[0] for queued in ahead._queued.values()]
            own(ahead, sequences, requests, step)
            if not step.drafts:
                return
            self.events.append(cuda.events[first:])
            self.movements += not np.array_equal(former[0], requests)
            draft, rows = step.drafts[NAME], np.flatnonzero(step.asked[NAME])
            loops[-1].observing.hand_over(NAME)
            plain = ahead._speculators[NAME].propose(sequences, requests[rows], step.asked[NAME][rows])
            queued = draft.of(rows)
            for noted, one in ((self.ahead, queued), (self.asked, plain)):
                noted.append([row[:length].tolist() for row, length in zip(one.token_ids, one.lengths, strict=True)])
            drafted = np.arange(plain.confidence.shape[1]) < plain.lengths[:, None]
            # Not bit for bit: the batches differ by the requests that have ended.
            confidence = queued.confidence[:, : plain.confidence.shape[1]]
            np.testing.assert_allclose(confidence[drafted], plain.confidence[drafted], rtol=1e-5)

        self.patches = [mock.patch.object(DraftsAhead, "fetch", fetch), mock.patch.object(DecodeLoop, "step", step)]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_ahead_is_the_one_that_would_be_made_after_the_outcome(sampling, graphs, flash_in_float32):
    """With its noise, positions and states, while requests end, rows move and others come in."""
    with PretendCuda(graphs=graphs) as cuda, ExitStack() as stack:
        fetched = Fetched(cuda)
        for patch in fetched.patches:
            stack.enter_context(patch)
        outputs = run(cuda.move, **SAMPLINGS[sampling])
    assert len(fetched.ahead) >= 4
    assert fetched.movements >= 1 or sampling == "greedy"  # whose requests end together
    assert fetched.ahead == fetched.asked
    assert sum(len(tokens) for step in fetched.ahead for tokens in step) >= 20
    assert tokens_of(outputs) == tokens_of(run(**SAMPLINGS[sampling]))
    assert outputs[1].report.drafted[NAME] > 0
    steps = sum(event.what == "graph" and "step_graphs" in event.where for event in cuda.events)
    assert (steps > 0) == graphs, "the policy's steps, too, with verification inside where nothing truncates"


@pytest.mark.parametrize("graphs", [False, True])
def test_fetching_it_launches_and_copies_nothing(graphs, flash_in_float32):
    """One wait for a copy that was queued with the draft."""
    with PretendCuda(graphs=graphs) as cuda, ExitStack() as stack:
        fetched = Fetched(cuda)
        for patch in fetched.patches:
            stack.enter_context(patch)
        run(cuda.move)
    assert fetched.events
    for events in fetched.events:
        assert [event.kind for event in events] == ["sync"]
    assert "sync" in WAITS


def test_it_is_queued_without_a_wait():
    found = []
    with PretendCuda(graphs=True) as cuda:
        own = RecurrentSpeculator.propose_ahead

        def propose_ahead(*arguments):
            first = len(cuda.events)
            fetch = own(*arguments)
            found.append([event.kind for event in cuda.events[first:]])
            return fetch

        with mock.patch.object(RecurrentSpeculator, "propose_ahead", propose_ahead):
            run(cuda.move, calls=3)
    assert len(found) >= 6
    # A capture waits, and so does what happens once after a refresh.
    quiet = [kinds for kinds in found if not set(kinds) & set(WAITS)]
    assert len(quiet) >= len(found) // 2
    assert min(kinds.count("h2d_async") for kinds in quiet) == 1


def test_beside_another_drafter_under_the_adaptive_controller():
    def two(move=lambda module: module):
        controller = GoodputController(["history", NAME])
        return run(move, controller=controller, speculators=[HistorySpeculator()], calls=3)

    own, queued = DraftsAhead.queue, []

    def queue(ahead, *arguments):
        own(ahead, *arguments)
        queued.extend(ahead._queued)

    with PretendCuda(graphs=True) as cuda, mock.patch.object(DraftsAhead, "queue", queue):
        found = two(cuda.move)
    assert set(queued) == {NAME}
    assert tokens_of(found) == tokens_of(two())


def test_nothing_is_queued_under_rejection_verification():
    """There a plan may read the prefix alone."""
    with PretendCuda() as cuda, mock.patch.object(DraftsAhead, "queue", side_effect=AssertionError):
        found = run(cuda.move, verification="rejection")
    assert found[1].report.drafted[NAME] > 0
    assert tokens_of(found) == tokens_of(run(verification="rejection"))


def test_a_controller_that_knows_fewer_drafters_is_not_asked_about_the_others():
    with PretendCuda() as cuda, mock.patch.object(DraftsAhead, "queue", side_effect=AssertionError):
        found = run(cuda.move, controller=GoodputController(["history"]), speculators=[HistorySpeculator()])
    assert NAME not in found[1].report.drafted or not found[1].report.drafted[NAME]


def test_where_the_host_decides_a_draft_is_asked_for_in_the_usual_way(monkeypatch):
    own = FusedVerifier.begin
    monkeypatch.setattr(FusedVerifier, "begin", lambda *arguments: Verifying(own(*arguments).finish))
    with PretendCuda() as cuda, mock.patch.object(RecurrentSpeculator, "propose_ahead", side_effect=AssertionError):
        found = run(cuda.move)
    monkeypatch.undo()
    assert found[1].report.drafted[NAME] > 0
    assert tokens_of(found) == tokens_of(run())


class Noting(FixedController):
    """Notes the seconds of every step."""

    def __init__(self):
        super().__init__([NAME], NAME, DEPTH, ahead=True)
        self.seconds = []

    def observe(self, step, admission, verified, forward_s, step_s):
        self.seconds.append((forward_s, step_s))
        return super().observe(step, admission, verified, forward_s, step_s)


def test_captures_of_drafts_are_no_cost_of_forwards(monkeypatch):
    captures, late_s, own = [], [0.0], DraftGraphs._graph_of

    def captured(graphs, work):
        graph = own(graphs, work)
        captures.append(graph)
        late_s[0] += 100.0
        graphs.capture_s += 100.0
        return graph

    monkeypatch.setattr(DraftGraphs, "_graph_of", captured)
    controller = Noting()
    with PretendCuda(graphs=True) as cuda:
        run(cuda.move, controller=controller, clock=lambda: time.perf_counter() + late_s[0])
    assert captures
    assert all(max(pair) < 50 for pair in controller.seconds)


def test_what_runs_when_a_capture_begins_is_no_part_of_its_price(monkeypatch):
    """Entering a capture waits for it."""
    with PretendCuda(graphs=True):
        captures, now, running = Captures(capture=True), [0.0], [3.0]

        def synchronize(device=None):
            now[0] += running[0]
            running[0] = 0.0

        @contextmanager
        def graph(graph, **options):
            torch.cuda.synchronize()
            now[0] += 1.0
            yield

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        captures._graph_of(lambda: None)
        monkeypatch.undo()
    assert captures.captured == 1
    assert captures.capture_s == pytest.approx(1.0)


def test_an_outcome_that_did_not_hold_takes_its_draft_along(monkeypatch):
    """Logits that are no distribution: requests run one by one, and the device's decisions are not those of the host."""
    begun, dropped, own = [], [], FusedVerifier.begin

    def begin(verifier, logits, draft, sequences, requests, tail=None):
        one = own(verifier, logits, draft, sequences, requests, tail)
        begun.append(draft.lengths.any())
        if not begun[-1] or begun.count(True) % 3:
            return one
        logits[int(np.append(0, np.cumsum(draft.lengths + 1))[draft.lengths.argmax()])] = float("nan")

        def finish():
            raise NonFiniteLogits("of a test")

        return Verifying(finish, one.decided)

    def drop(ahead, own=DraftsAhead.drop):
        dropped.append(len(ahead._queued))
        own(ahead)

    monkeypatch.setattr(FusedVerifier, "begin", begin)
    monkeypatch.setattr(DraftsAhead, "drop", drop)
    with PretendCuda() as cuda, ExitStack() as stack:
        fetched = Fetched(cuda)
        for patch in fetched.patches:
            stack.enter_context(patch)
        found = run(cuda.move)
    assert dropped.count(1) >= 1
    assert fetched.ahead == fetched.asked
    monkeypatch.undo()
    assert tokens_of(found) == tokens_of(run())


@pytest.mark.parametrize("where", ["propose_ahead", "_take_ahead"])
def test_an_error_in_it_costs_drafts_and_nothing_else(where):
    with PretendCuda() as cuda, mock.patch.object(RecurrentSpeculator, where, side_effect=RuntimeError("of a test")):
        found = run(cuda.move, faults=True)
    assert found[1].report.drafter_faults == {NAME: 1}
    assert tokens_of(found) == tokens_of(run())
