"""Following, committing and drafting beside an engine, without vLLM: rows that move, and no Python per request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.controller.base import Admission, Step
from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.core import Draft, Sequences, Verified
from atlas_rl.decode.commit import NOBODY_WANTS
from atlas_rl.decode.settling import Drawn as Settling
from atlas_rl.decode.settling import Fates, Texts
from atlas_rl.vllm import row_passes
from atlas_rl.vllm.drafting import Drafting
from atlas_rl.vllm.draw import NO_TOKEN, DrawnTokens
from atlas_rl.vllm.internals import Forward, ForwardBatch
from atlas_rl.vllm.settling import settle_rows
from tests.drafters import Stateless
from tests.settling import settle_in_numpy
from tests.vllm import row_passes_in_numpy

VOCAB, CONTEXT, PROMPT, K = 100, 256, 5, 3


class Constant(Stateless):
    """Drafts K zeros for everybody."""

    name = "constant"

    def __init__(self) -> None:
        self.observed: list[Verified] = []

    def propose(self, sequences: Sequences, requests: np.ndarray, max_draft_tokens: np.ndarray) -> Draft:
        shape = len(requests), int(max_draft_tokens.max())
        return Draft(np.zeros(shape, np.int64), max_draft_tokens, np.full(shape, 0.5, np.float32))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        self.observed.append(verified)


class Noting(FixedController):
    """Notes which admissions came back to it."""

    def __init__(self) -> None:
        super().__init__(["constant"], "constant", K)
        self.lengths: list[list[int]] = []

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        self.lengths.append(admission.lengths.tolist())
        return super().observe(step, admission, verified, forward_s, step_s)


class Engine:
    """Rows of an engine that accepts every draft but the last, when there are any."""

    def __init__(self, batch: int, speculates: bool) -> None:
        self.drafting = Drafting(K, CONTEXT, batch, VOCAB)
        self.drafter, self.controller = Constant(), Noting()
        if speculates:
            self.drafting.use({"constant": self.drafter}, self.controller)
        else:
            self.drafting.use({}, NoSpeculation())
        self.names = [f"request {i}" for i in range(batch)]
        self.lengths = dict.fromkeys(self.names, PROMPT)
        self.drafts: dict[str, list[int]] = {name: [] for name in self.names}
        self.params = SimpleNamespace(
            extra_args=None, seed=3, temperature=1.0, top_k=0, top_p=1.0, max_tokens=200, stop_token_ids=[99],
            eos_token_id=None, ignore_eos=True, repetition_penalty=1.0, thinking_token_budget=None,
        )  # fmt: skip

    def forward(self) -> Forward:
        """The next forward, which commits zeros."""
        count = len(self.names)
        num_drafted = np.array([len(self.drafts[name]) for name in self.names])
        num_new = np.maximum(num_drafted, 1)
        for name, new in zip(self.names, num_new.tolist(), strict=True):
            self.lengths[name] += new
        lengths = np.array([self.lengths[name] for name in self.names])
        kept = np.arange(num_drafted.max() + 1)[None] < num_new[:, None]
        tokens, figures = np.where(kept, 0, NO_TOKEN), kept.astype(np.float32)
        drawn = DrawnTokens(tokens, 0 * tokens, figures, figures, figures)
        batch = ForwardBatch(
            names=list(self.names),
            token_ids=np.zeros((count, CONTEXT), np.int32),
            lengths=lengths,
            num_prompt_tokens=np.full(count, PROMPT),
            greedy=np.zeros(count, bool),
            params_of=lambda name: self.params,
        )
        self.drafting.requests.keys(batch)
        starts = np.cumsum(num_drafted + 1) - num_drafted - 1
        spans = np.stack([starts, num_drafted + 1, lengths - num_new - 1], axis=1)
        head_inputs = torch.zeros(int((num_drafted + 1).sum()), 4)
        return Forward(batch, num_new, num_drafted, starts, head_inputs, {}, spans, drawn)

    def step(self, forward: Forward) -> None:
        with self.drafting.recorder.time("forward"):
            time.sleep(1e-4)
        drafts = self.drafting.step(forward)
        self.drafts = {name: [] for name in self.lengths} | dict(zip(forward.batch.names, drafts, strict=True))


def num_calls(function: Callable[[], object]) -> int:
    """Calls that the interpreter makes inside, of Python and of C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("speculates", [False, True])
def test_a_step_makes_no_call_per_request(speculates: bool) -> None:
    def calls(batch: int) -> int:
        engine = Engine(batch, speculates)
        for _ in range(4):  # all enter in the first
            engine.step(engine.forward())
        assert engine.drafts["request 0"] == [0] * (K if speculates else 0)
        forward = engine.forward()
        return num_calls(lambda: engine.step(forward)) + num_calls(lambda: engine.drafting.requests.keys(forward.batch))

    few, many = calls(8), calls(128)
    assert abs(many - few) <= 8, "logarithms at most"


def test_rows_that_move_come_and_go_keep_their_plans() -> None:
    engine = Engine(6, speculates=True)
    engine.step(engine.forward())
    engine.step(engine.forward())
    engine.drafting.learn()
    assert engine.controller.lengths == [[K] * 6]
    engine.names = engine.names[::-1]
    engine.step(engine.forward())  # the same batch in other rows
    engine.drafting.learn()
    assert engine.controller.lengths[1:] == [[K] * 6]
    for name in ("request 1", "request 4"):
        engine.names.remove(name)
    engine.step(engine.forward())  # some pause: nothing is learned of a batch that did not run
    engine.names.append("request 1")
    engine.step(engine.forward())
    engine.drafting.learn()
    assert len(engine.controller.lengths) == 2
    engine.step(engine.forward())
    engine.drafting.learn()
    assert engine.controller.lengths[2:] == [[K] * 5]
    for verified in engine.drafter.observed[1:]:
        assert (verified.num_accepted == np.maximum(verified.num_committed - 1, 0)).all()
    table = engine.drafting.requests.table
    for name, length in engine.lengths.items():
        if name != "request 4":
            assert table.current.lengths[table.request_of[name]] == length


def test_learning_waits_for_the_next_forward_and_nothing_is_lost() -> None:
    engine = Engine(4, speculates=True)
    drafting = engine.drafting
    engine.step(engine.forward())
    engine.step(engine.forward())
    assert engine.controller.lengths == []  # `step` alone learned from the forward before, which had no plan
    assert drafting.recorder.num_forwards == 0
    drafting.learn()  # a device runs the next forward
    drafting.learn()
    assert engine.controller.lengths == [[K] * 4]
    assert drafting.recorder.num_forwards == 1
    engine.step(engine.forward())
    assert drafting.take_report().num_forwards == 2  # whoever asks is told of all


def test_nothing_waits_where_no_forward_follows() -> None:
    """The engine may go to sleep, and its weights with it."""
    engine = Engine(2, speculates=True)
    engine.params.max_tokens = K + 2
    while engine.drafting.requests.table.request_of or not engine.drafter.observed:
        engine.step(engine.forward())
    assert engine.drafting._unlearned is None
    assert engine.drafting.recorder.num_forwards == len(engine.drafter.observed) - 1


@pytest.mark.parametrize(("device", "forward_s"), [("cpu", 2.0), ("meta", 7.0)])
def test_a_forward_took_the_seconds_in_which_something_was_learned_beside_it(device: str, forward_s: float) -> None:
    engine = Engine(4, speculates=True)
    drafting, forward = engine.drafting, engine.forward()
    forward.head_inputs = torch.zeros(4, 4, device=device)
    drafting.recorder.move("other", "forward", 2.0)  # by the host's clock
    drafting._beside_s = 5.0
    assert drafting._forward_s(forward) == pytest.approx(forward_s)
    assert drafting._forward_s(forward) == 0


def test_what_nobody_waited_for_is_dropped_where_something_went_wrong() -> None:
    engine = Engine(4, speculates=True)
    engine.step(engine.forward())
    engine.step(engine.forward())
    engine.drafting.give_up()
    engine.drafting.learn()
    assert engine.controller.lengths == []


@pytest.mark.parametrize("seed", range(20))
def test_passes_do_what_numpy_does(seed: int) -> None:
    """Of rows that are new, unknown, paused, in another order than planned, or ended; batches of one row and of none."""
    rng = np.random.default_rng(seed)
    count, num_requests, width = int(rng.integers(0, 9)), 16, int(rng.integers(1, 5))
    known = rng.permutation(num_requests)[:count]
    known[rng.random(count) < 0.3] = -1
    num_new = rng.integers(0, width + 1, count)
    before, prompts = rng.integers(1, 9, num_requests), rng.integers(1, 9, count)
    lengths = np.where(known >= 0, before[known], rng.integers(1, 9, count)) + num_new
    lengths[rng.random(count) < 0.05] += 1
    arguments = known, num_new, lengths, prompts, before
    found = row_passes.followed(*arguments)
    same(found, row_passes_in_numpy.followed(*arguments))

    rows, requests = found[:2]
    planned = rng.permutation(num_requests)[: rng.integers(0, 9)] if seed % 3 else requests.copy()
    plan = row_passes.PlannedRows(planned, rng.integers(0, width, len(planned))) if seed % 4 else row_passes.NO_PLAN
    figures = (rng.random((count, width)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, VOCAB, (count, width))
    outcome = row_passes.RowOutcomes(
        num_new, rng.integers(0, width, count), rng.integers(0, 99, count), tokens, *figures
    )
    for only_planned in (False, True):
        arguments = rows, requests, plan, num_requests, only_planned, outcome
        same(row_passes.in_order(*arguments), row_passes_in_numpy.in_order(*arguments))

    finished = rng.random(len(rows)) < (0.3 if seed % 5 else 1)
    arguments = requests, rows, finished, before, before + rng.integers(1, 9, num_requests), K
    same(row_passes.going_on(*arguments), row_passes_in_numpy.going_on(*arguments))


@pytest.mark.parametrize("seed", range(12))
def test_one_pass_does_what_they_do_one_after_another(seed: int) -> None:
    """Requests of two ways of sampling, with ending tokens and limits; it changes nothing before it can do everything."""
    rng = np.random.default_rng(seed)
    count, num_requests, width = int(rng.integers(0, 9)), 16, int(rng.integers(1, 5))
    known = rng.permutation(num_requests)[:count]
    known[rng.random(count) < 0.2] = -1
    num_new, before = rng.integers(0, width + 1, count), rng.integers(2, 9, num_requests)
    lengths, prompts = np.where(known >= 0, before[known], 5) + num_new, np.where(rng.random(count) < 0.5, 5, 9)
    figures = (rng.random((count, width)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, 6, (count, width))
    outcome = row_passes.RowOutcomes(
        num_new, rng.integers(0, width, count), rng.integers(0, 99, count), tokens, *figures
    )
    planned = rng.permutation(num_requests)[: rng.integers(0, 9)]
    plan = row_passes.PlannedRows(planned, rng.integers(0, width, len(planned))) if seed % 4 else row_passes.NO_PLAN
    stops, way_of = np.array([[1, -1], [2, 3]]), rng.integers(0, 2, num_requests)
    limits = before + rng.integers(1, 6, num_requests)

    def texts(capacity: int) -> Texts:
        shape = num_requests, capacity
        return Texts(np.zeros(shape, np.int32), before.copy(), limits, np.ones(num_requests, np.int64), NOBODY_WANTS)

    rows, requests, newcomers, _ = row_passes_in_numpy.followed(known, num_new, lengths, prompts, before)
    arguments = rows, requests, plan, num_requests, bool(seed % 2), outcome
    rows, requests, places, settled = row_passes_in_numpy.in_order(*arguments)
    new, drafted, starts, tokens, *figures = settled
    ends = np.array([[token in stops[way_of[r]] for token in row] for r, row in zip(requests, tokens, strict=True)])
    expected, fates = texts(20), Fates.of(len(rows))
    drawn = Settling(requests, tokens, new, drafted, *figures, NOBODY_WANTS, ends.reshape(tokens.shape), stops[0, :0])
    sums = settle_in_numpy(drawn, expected, fates) if len(rows) else (0.0, 0.0, 0)
    going = row_passes_in_numpy.going_on(requests, rows, fates.finished, expected.lengths, limits, K)

    def passed(own: Texts, *, waits: bool = False) -> Any:
        return settle_rows(known, lengths, prompts, outcome, plan, bool(seed % 2), stops, way_of, own, K, waits)

    small = texts(1)
    (state, longest, *_), *_ = passed(small)
    if len(rows):
        assert (state, longest) == (3, np.minimum(before[requests] + new, limits[requests]).max())
        same(tuple(small), tuple(texts(1)))
    if newcomers:
        assert passed(texts(20), waits=True)[0][0] == 1
    found = texts(20)
    (state, _, *sizes), its_sums, columns, its_tokens, finished = passed(found, waits=not newcomers)
    assert (state, sizes) == (0, [len(rows), len(places), len(going[0])])
    same(tuple(found), tuple(expected))
    assert its_sums == pytest.approx(sums)
    settled_columns = (rows, requests, places, starts, *fates[:3], *going)
    same(tuple(c[: len(e)] for c, e in zip(columns, settled_columns, strict=True)), settled_columns)
    same((its_tokens, finished), (tokens, fates.finished))


class InTurns(Noting):
    """Asks only when it is told to."""

    asks = False

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        return super().plan(step) if self.asks else {}


def test_a_drafter_observes_before_it_is_asked_and_else_beside_the_next_forward() -> None:
    engine, controller = Engine(4, speculates=True), InTurns()
    drafting, observed = engine.drafting, engine.drafter.observed
    drafting.use({"constant": engine.drafter}, controller)
    engine.step(engine.forward())
    engine.step(engine.forward())
    assert len(observed) == 1, "of the step before"
    drafting.learn()
    assert len(observed) == 2
    controller.asks = True
    engine.step(engine.forward())
    assert len(observed) == 3, "before it drafted"
    drafting.learn()
    assert len(observed) == 3, "once"


@pytest.mark.parametrize("what", ["update", "report", "forget", "end", "give up"])
def test_what_was_put_off_is_observed_before_requests_or_weights_change(what: str) -> None:
    engine = Engine(4, speculates=True)
    drafting, observed = engine.drafting, engine.drafter.observed
    drafting.use({"constant": engine.drafter}, InTurns())
    engine.step(engine.forward())
    versions: list[int] = []
    engine.drafter.observe = lambda sequences, _: versions.append(sequences.policy_version)  # type: ignore[method-assign]
    if what == "update":
        drafting.policy_updated(5)
    elif what == "report":
        drafting.take_report()
        drafting.learn()
    elif what == "forget":
        drafting.forget({"request 0", "nobody"})
        assert len(versions) == 2, "and that it has ended"
    elif what == "end":
        drafting.end()
    else:
        drafting.give_up()
    drafting.learn()
    assert versions[:1] == ([] if what == "give up" else [0])
    assert observed == []


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_tokens_of_a_request_that_lives_through_an_update_carry_the_version_that_drew_them() -> None:
    engine, seen = Engine(2, speculates=True), []

    def noted(sequences: Sequences, verified: Verified) -> None:
        rows = range(len(verified.requests))
        begins = sequences.lengths[verified.requests] - verified.num_committed
        seen.extend((sequences.policy_version, int(begins[i]), int(verified.num_committed[i])) for i in rows)

    engine.drafter.observe = noted  # type: ignore[method-assign]
    for version in (0, 4, 9):
        if version:
            engine.drafting.policy_updated(version)
        for _ in range(3):
            engine.step(engine.forward())
    tokens = [(position, version) for version, begin, count in seen for position in range(begin, begin + count)]
    assert sorted(position for position, _ in tokens) == sorted(2 * list(range(PROMPT, engine.lengths["request 0"])))
    versions = [version for _, version in sorted(tokens)]
    assert versions == sorted(versions)
    assert set(versions) == {0, 4, 9}


def test_who_paused_is_counted_with_its_own_drafter() -> None:
    engine = Engine(4, speculates=True)
    engine.step(engine.forward())
    assert engine.drafting._planned is not None
    engine.names = ["request 3", "request 0"]
    engine.step(engine.forward())
    unlearned = engine.drafting._unlearned
    assert unlearned is not None
    assert (unlearned.committed.rows.tolist(), unlearned.committed.planned.tolist()) == ([1, 0], [0, 3])
