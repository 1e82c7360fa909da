"""Generation calls that take turns: the same tokens as alone, and every second charged to the call that spent it."""

from __future__ import annotations

import pytest

pytest.importorskip("greenlet")

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.speculators.history.speculator import HistorySpeculator
from benchmarks.interleave import InTurns, Turns, shell
from tests.models import tiny_llama

PROMPTS = [[1, 2, 3, 1, 2], [4, 5]]


def engine_in(turns, model, controller, speculators=()):
    return AtlasRolloutEngine(
        model=shell(model),
        speculators=list(speculators),
        controller=InTurns(controller, turns),
        clock=turns.clock,
        console=False,
    )


def generate(engine, seed):
    output = engine.generate(PROMPTS, num_generations=3, max_new_tokens=20, eos_token_ids=[0], seed=seed)
    return output.completion_ids


def test_calls_in_turns_generate_what_they_generate_alone():
    model, turns = tiny_llama(), Turns()
    engines = {
        "off": engine_in(turns, model, GoodputController(())),
        "controller": engine_in(turns, model, GoodputController(("history",), explain=True), [HistorySpeculator()]),
        "fixed": engine_in(turns, model, FixedController(("history",), "history", 3), [HistorySpeculator()]),
    }
    outcomes = turns.run(
        {name: lambda engine=engine: generate(engine, seed=5) for name, engine in engines.items()},
        dict.fromkeys(engines, 1.0),
    )
    alone = generate(AtlasRolloutEngine(model=model, speculation=False, console=False), seed=5)
    assert {name: outcome.value for name, outcome in outcomes.items()} == dict.fromkeys(engines, alone)
    for name, engine in engines.items():
        report, trace = engine.reports[-1], engine.config.controller.trace
        assert len(trace) == report.num_forwards
        assert sum(step["tokens"] for step in trace) == report.num_decoded_tokens
        assert report.generate_s <= outcomes[name].seconds
    assert any(step["asked"] for step in engines["fixed"].config.controller.trace)


def test_a_call_is_charged_its_own_seconds_only():
    now, seen = [100.0], {}
    turns = Turns(lambda: now[0])

    def work(name, steps, step_s):
        began = turns.clock()
        for _ in range(steps):
            turns.pass_on()
            now[0] += step_s
        seen[name] = turns.clock() - began

    outcomes = turns.run(
        {"slow": lambda: work("slow", 8, 2.0), "quick": lambda: work("quick", 16, 0.25)}, {"slow": 4, "quick": 1}
    )
    assert seen == {"slow": 16.0, "quick": 4.0}
    assert {name: outcome.seconds for name, outcome in outcomes.items()} == seen
    assert turns.clock() == now[0]


def test_calls_advance_in_proportion_to_what_they_take():
    now, order = [0.0], []
    turns = Turns(lambda: now[0])

    def work(name, steps, step_s):
        for _ in range(steps):
            turns.pass_on()
            now[0] += step_s
            order.append(name)

    turns.run(
        {"slow": lambda: work("slow", 8, 2.0), "quick": lambda: work("quick", 16, 0.25)}, {"slow": 16, "quick": 4}
    )
    for done in range(1, 9):  # two quick steps, a sixteenth of its work each, to every slow one
        at = [i for i, name in enumerate(order) if name == "slow"][done - 1]
        assert abs(order[:at].count("quick") - 2 * done) <= 2


def test_an_error_in_a_call_is_raised():
    def fail():
        turns.pass_on()
        raise KeyError("what went wrong")

    turns = Turns()
    with pytest.raises(KeyError, match="what went wrong"):
        turns.run({"fails": fail, "goes on": turns.pass_on}, {"fails": 1, "goes on": 1})


def test_a_shell_shares_the_weights_and_nothing_that_a_session_changes():
    model = tiny_llama()
    other = shell(model)
    mine = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in other.named_parameters()} == mine
    assert other.config is not model.config
    assert not {id(module) for module in other.modules()} & {id(module) for module in model.modules()}
