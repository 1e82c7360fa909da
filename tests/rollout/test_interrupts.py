"""Calls that are interrupted: engine, drafters and policy are ready for the next one, which gives the same tokens."""

from __future__ import annotations

import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.policy.threads import GENERATING
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import recurrent_drafter
from tests.engines import VOCAB, engine_of, generate, state_of
from tests.models import tiny_gpt2, tiny_llama

METHODS = ["start", "backlog", "propose", "observe"]


def interrupting(thing, method, after):
    """Let `method` raise KeyboardInterrupt after `after` more calls; for an odd number, when it has done its work."""
    original, calls = getattr(thing, method), iter(range(after))

    def interrupted(*args, **kwargs):
        if next(calls, None) is not None:
            return original(*args, **kwargs)
        if after % 2:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    setattr(thing, method, interrupted)
    return lambda: delattr(thing, method)


def training_policy():
    model = tiny_gpt2(seed=17).train()
    model.transformer.h[0].eval()
    return model


def engine_with_all(model, drafter=None):
    """Drafters of every kind; one of them drafts in every step, or the controller decides."""
    drafters = [HistorySpeculator(), recurrent_drafter(), DraftLM(tiny_llama(seed=12), VOCAB)]
    names = [each.name for each in drafters]
    controller = FixedController(names, drafter, 3) if drafter else GoodputController(tuple(names))
    engine = engine_of(model, speculators=drafters, controller=controller)
    generate(engine, seed=1)
    engine.policy_updated()  # the recurrent drafter drafts from here on
    return engine


def generate_until_interrupted(engine, seed):
    """How many calls ended first: the controller decides by the clock whether there is something to plan."""
    for num_ended in range(50):
        try:
            generate(engine, seed=seed)
        except KeyboardInterrupt:
            return num_ended
    raise AssertionError("no interrupt came")


@pytest.mark.parametrize("where", ["history", "recurrent", "draft_lm", "controller", "runner"])
def test_an_interrupt_leaves_no_half_state(where):
    model = training_policy()
    before = state_of(model)
    wanted = [generate(engine_of(model, speculation=False), seed=seed).completion_ids for seed in range(4)]
    engine = engine_with_all(model, {"controller": None, "runner": "history"}.get(where, where))
    things = {"controller": engine._controller.unguarded, "runner": engine._backend.runner}
    thing = (things | {name: each.unguarded for name, each in engine._speculators.items()})[where]
    methods = {"controller": ["plan", "admit", "observe"], "runner": ["forward", "copy_rows"]}.get(where, METHODS)
    for method in methods:
        for seed, after in enumerate((0, 3)):
            undo = interrupting(thing, method, after if method != "start" else 0)
            reports, num_ended = len(engine.reports), generate_until_interrupted(engine, seed)
            undo()
            assert len(engine.reports) == reports + num_ended
            assert state_of(model) == before
            assert torch.is_grad_enabled()
            assert engine._backend.runner._cache is None
            output = generate(engine, seed=seed)
            assert output.completion_ids == wanted[seed]
            assert not output.report.drafter_faults
            assert sum(output.report.drafted.values()) > 0 or where == "controller"
    engine.policy_updated()
    output = generate(engine, seed=3)
    assert output.completion_ids == wanted[3]
    assert sum(output.report.accepted.values()) > 0 or where == "controller"
    assert state_of(model) == before


@pytest.mark.parametrize("part", ["lm_head", "layer"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupt_inside_of_the_policys_own_modules(part, after):
    model = tiny_llama(seed=17).train()
    before = state_of(model)
    wanted = generate(engine_of(model, speculation=False)).completion_ids
    engine = engine_of(model)
    calls = iter(range(after))

    def interrupt(*_):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    handle = (model.lm_head if part == "lm_head" else model.model.layers[1]).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(engine)
    handle.remove()
    assert state_of(model) == before
    assert generate(engine).completion_ids == wanted
    assert GENERATING.acquire(blocking=False)
    GENERATING.release()
