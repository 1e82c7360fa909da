"""What a run without speculation would take: counted exactly, and estimated on a clock that only forwards move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from atlas_rl.decode import generate as generate_module
from atlas_rl.decode import plain_run
from atlas_rl.decode.plain_run import PlainCosts, PlainForwards, plain_batches
from atlas_rl.decode.room import rows_to_fill
from atlas_rl.policy.in_process import InProcessRunner
from tests.drafters import RandomDrafter
from tests.engines import EOS, MAX_NEW, PROMPTS, VOCAB, engine_of, fixed, generate, parrot, policy, reference

COSTS = {
    "flat": lambda tokens: 0.05,
    "affine": lambda tokens: 0.05 + 0.002 * tokens,
    "in proportion": lambda tokens: 0.005 * tokens,
}


class Clock:
    """Stands still but for the policy's forwards, which take what a cost function says, and `once_s` in some of them."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        self.now, self.once_s, self.sets_up, self._cost = 0.0, 0.0, False, cost
        self._forwards = 0

    def __call__(self) -> float:
        return self.now

    @contextmanager
    def watching(self, model) -> Iterator[None]:
        def tick(module, arguments) -> None:
            self._forwards += 1
            set_up_s = 2.0 if self.sets_up and not self._forwards % 4 else 0.0
            self.now, self.once_s = self.now + self._cost(arguments[0].numel()) + set_up_s, self.once_s + set_up_s

        hook = model.get_input_embeddings().register_forward_pre_hook(tick)
        try:
            yield
        finally:
            hook.remove()


@pytest.fixture
def counted(monkeypatch):
    """What calls count of their plain forwards, in order."""
    found, run = [], PlainCosts.run

    def noting(self, *args, **options):
        found.append(run(self, *args, **options))
        return found[-1]

    monkeypatch.setattr(PlainCosts, "run", noting)
    return found


@pytest.mark.parametrize("num_rows", [None, 1, 3, 16])
@pytest.mark.parametrize("ending", [EOS, list(range(0, VOCAB, 4))])
def test_the_plain_forwards_are_counted_exactly(num_rows, ending, counted):
    """With texts of all lengths, and with many that end with their first token."""
    engine = engine_of(speculation=False, max_batch_size=num_rows)
    for seed in range(4):
        output = generate(engine, num_generations=8, eos_token_ids=ending, seed=seed)
        lengths = np.array([len(row) for row in output.completion_ids])
        assert counted[-1].num_forwards == output.report.num_forwards
        found = plain_batches(lengths, num_rows or len(lengths), rows_to_fill)
        assert sum(found.values()) == output.report.num_forwards
        assert sum(batch * count for batch, count in found.items()) == output.report.num_request_forwards


def test_the_plain_forwards_of_fewer_rows_are_counted_when_memory_allows_no_more(counted, monkeypatch):
    engine = engine_of(speculation=False)
    generate(engine)
    row_bytes = engine._backend.runner.row_bytes(max(map(len, PROMPTS)) + MAX_NEW)
    monkeypatch.setattr(InProcessRunner, "free_bytes", lambda self: 4 * row_bytes)
    output = generate(engine)
    assert max(active for _, active in output.report.active_batch_curve) == 4
    assert counted[-1].num_forwards == output.report.num_forwards


def test_plain_forwards_are_counted_once_per_call(monkeypatch):
    """Packing beside them is estimated from the same count."""
    counts = []
    for module in (plain_run, generate_module):
        monkeypatch.setattr(module, "plain_batches", lambda *arguments: counts.append(1) or plain_batches(*arguments))
    generate(engine_of(speculation=False))
    assert counts == [1]


def test_a_server_fills_every_row_at_once():
    assert plain_batches(np.array([9, 3, 5, 1]), num_rows=2) == {2: 6, 1: 2}


def test_a_lucky_request_does_not_make_plain_decoding_dearer():
    """Scaled from the steps with speculation it did: 40 of two requests and 60 of the other one alone for 99 of both."""
    costs = PlainCosts()
    for batch in [2] * 20 + [1] * 30:
        costs.note(batch, 0.05)
    assert costs.run(plain_batches(np.array([100, 100]), num_rows=2)) == PlainForwards(99, pytest.approx(99 * 0.05))


def test_sizes_that_nobody_measured_have_no_estimate():
    costs = PlainCosts()
    for batch, seconds in ((8, 0.08), (4, None), (2, 0.02)):
        costs.note(batch, seconds)
    assert costs.run(plain_batches(np.array([11] * 4), num_rows=4)).seconds == pytest.approx(10 * 0.04), (
        "between two that were"
    )
    assert costs.run(plain_batches(np.array([11] * 9), num_rows=9)).seconds is None
    assert costs.run(plain_batches(np.array([11]), num_rows=1)).seconds is None
    assert costs.run(plain_batches(np.array([1, 1]), num_rows=2)) == PlainForwards(0, 0.0)
    assert PlainCosts().run(plain_batches(np.array([5]), num_rows=1)).seconds is None


def test_prompts_that_ran_beside_decoding_requests_are_added():
    costs = PlainCosts()
    for batch in (4, 2):
        costs.note(batch, 0.01 * batch)
    costs.note_mixed(2, 100, 0.5)
    costs.note_mixed(12, 100, 0.6)  # with drafts, more tokens than any batch
    alone = 5 * 0.04
    assert costs.run(plain_batches(np.array([6] * 4), num_rows=4)).seconds == pytest.approx(alone + 0.48)
    found = costs.run(plain_batches(np.array([6] * 4), num_rows=4), lambda tokens, context_tokens: 0.01 * tokens)
    assert found.seconds == pytest.approx(alone + 0.48 + 0.48)


@pytest.mark.parametrize("cost", COSTS)
def test_the_estimate_is_what_the_rerun_takes(cost):
    """Texts of many lengths and a drafter that is lucky with some, by every cost of a forward."""
    clock = Clock(COSTS[cost])
    engine = engine_of(speculators=[parrot(0.3)], clock=clock, audit_share=0.0)
    estimated = []
    with clock.watching(policy()):
        for _ in range(6):
            report = generate(engine).report
            plain = generate(engine_of(speculation=False, clock=clock, audit_share=0.0)).report
            estimated.append(report.no_speculation_s)
    assert plain.num_forwards == MAX_NEW - 1
    known = [seconds for seconds in estimated if seconds is not None]
    assert estimated[-1] is not None, "by then every batch size was measured"
    assert report.accepted_length > 1.3 or cost == "in proportion"
    assert known == pytest.approx([plain.generate_s] * len(known), rel=0.1)


def test_work_that_is_done_once_is_no_cost_of_a_forward(monkeypatch):
    """Packing weights in a plain step, or comparing routes, would make all plain steps of its size look as slow."""
    clock = Clock(COSTS["affine"])
    monkeypatch.setattr(InProcessRunner, "once_s", property(lambda self: clock.once_s))
    engine = engine_of(speculators=[parrot(0.3)], clock=clock, audit_share=0.0)
    with clock.watching(policy()):
        clock.sets_up = True
        estimated = [generate(engine).report.no_speculation_s for _ in range(6)][-1]
        clock.sets_up = False
        plain = generate(engine_of(speculation=False, clock=clock)).report
    assert clock.once_s > 20
    assert estimated == pytest.approx(plain.generate_s, rel=0.1)


def test_a_run_that_always_drafts_estimates_nothing():
    report = generate(fixed(RandomDrafter(), 5)).report
    assert report.no_speculation_s is report.speedup_estimate is None
    assert len(reference().completion_ids) == 2 * len(PROMPTS)
