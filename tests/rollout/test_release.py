"""After a call, however it ended, no drafter holds memory that grows with the call: training needs it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from atlas_rl.controller.fixed import FixedController
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy.ragged_attention import RaggedBatch
from atlas_rl.policy.step_graphs import StepGraphs
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.training.eagle3 import TrainSettings, new_head
from tests.dflash import head_for
from tests.drafters import recurrent_drafter, ticking
from tests.engines import VOCAB, draft_model, engine_of, generate
from tests.models import tiny_llama

ENDS = (None, torch.OutOfMemoryError, KeyboardInterrupt)


@cache
def policy():
    return tiny_llama(layers=4, seed=11)


@cache
def eagle3_head():
    return new_head(InProcessView(policy()), TrainSettings(layers=(1, 2, 3)), np.arange(VOCAB)).eval()


STATIC: dict[str, Callable] = {
    "draft_lm": lambda: DraftLM(draft_model(), VOCAB),
    "eagle3": lambda: Eagle3Speculator(eagle3_head()),
    "dflash": lambda: DFlashSpeculator(head_for(policy())),
    "fp4_self": Fp4SelfSpeculator,
}
LEARNING: dict[str, Callable] = {
    "eagle3_adaptive": lambda: AdaptiveEagle3Speculator(eagle3_head(), clock=ticking(), budget_share=4.0),
    "recurrent": recurrent_drafter,
}


def asked(speculator, model=None, **options):
    """An engine whose only speculator drafts three tokens in every step."""
    controller = FixedController([speculator.name], speculator.name, 3)
    return engine_of(model or policy(), speculators=[speculator], controller=controller, **options)


@cache
def wanted(seed, num_generations=2):
    return generate(engine_of(policy(), speculation=False), seed=seed, num_generations=num_generations).completion_ids


def reached(root):
    """Objects that `root` keeps alive; modules of networks, and what is global, count as nobody's."""
    seen, waiting = {}, [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | nn.Module):
            continue
        seen[id(thing)] = thing
        waiting += (thing.__closure__ or ()) if isinstance(thing, FunctionType) else gc.get_referents(thing)
    return list(seen.values())


def of_a_call(speculator):
    """What belongs to a single call, and the speculator holds."""
    return [thing for thing in reached(speculator) if isinstance(thing, RaggedBatch | StepGraphs | DecodeLoop)]


def tensor_bytes(speculator):
    return sum(thing.nbytes for thing in reached(speculator) if isinstance(thing, torch.Tensor))


def watch(engine, speculator, monkeypatch, *, end_with=None, after=4):
    """Let the policy's forward note what the speculator holds, and end the call after some steps."""
    held, forward = [], engine._backend.runner.forward

    def watched(*given):
        held.append(len(of_a_call(speculator)))
        if end_with is not None and len(held) > after:
            raise end_with
        return forward(*given)

    monkeypatch.setattr(engine._backend.runner, "forward", watched)
    return held


@pytest.mark.parametrize("end_with", ENDS, ids=["whole", "error", "interrupt"])
@pytest.mark.parametrize("name", STATIC)
def test_a_static_drafter_holds_nothing_of_a_call(name, end_with, monkeypatch):
    speculator = STATIC[name]()
    engine = asked(speculator)
    generate(engine, num_generations=1, max_new_tokens=4)
    before = tensor_bytes(speculator)
    with monkeypatch.context() as patch:
        held = watch(engine, speculator, patch, end_with=end_with)
        if end_with is None:
            assert generate(engine, num_generations=8, seed=4).completion_ids == wanted(4, 8)
        else:
            with pytest.raises(end_with):
                generate(engine, num_generations=8, seed=4)
    assert max(held) > 0, "it held something during the call"
    assert of_a_call(speculator) == []
    assert tensor_bytes(speculator) == before
    output = generate(engine, seed=5)  # the same version: no refresh came in between
    assert output.completion_ids == wanted(5)
    assert output.report.drafted[speculator.name] > 0
    assert not output.report.drafter_faults
    engine.policy_updated()
    assert generate(engine, seed=6).completion_ids == wanted(6)


@pytest.mark.parametrize("end_with", ENDS, ids=["whole", "error", "interrupt"])
@pytest.mark.parametrize("name", LEARNING)
def test_a_drafter_that_learns_keeps_only_what_it_learns_from(name, end_with, monkeypatch):
    speculator = LEARNING[name]()
    engine = asked(speculator)
    generate(engine, seed=3)
    engine.policy_updated()
    with monkeypatch.context() as patch:
        held = watch(engine, speculator, patch, end_with=end_with)
        if end_with is None:
            generate(engine, seed=4)
        else:
            with pytest.raises(end_with):
                generate(engine, seed=4)
    assert max(held) > 0 or name == "recurrent"
    assert of_a_call(speculator) == []
    assert speculator._put_off is None
    assert getattr(speculator, "_proposed", None) is None
    assert generate(engine, seed=5).completion_ids == wanted(5)
    refreshes = len(speculator.refreshes)
    engine.policy_updated()
    assert len(speculator.refreshes) == refreshes + 1
    output = generate(engine, seed=6)
    assert output.completion_ids == wanted(6)
    assert output.report.drafted[speculator.name] > 0
    assert not output.report.drafter_faults


@pytest.mark.parametrize("name", STATIC)
def test_a_drafter_that_was_turned_off_holds_nothing(name, monkeypatch):
    speculator = STATIC[name]()
    engine, propose, calls = asked(speculator), speculator.propose, iter(range(2))

    def failing(*given):
        draft = propose(*given)
        if next(calls, None) is None:
            raise RuntimeError("boom")
        return draft

    with monkeypatch.context() as patch:
        patch.setattr(speculator, "propose", failing)
        held = watch(engine, speculator, patch)
        output = generate(engine, seed=4)
    assert output.report.drafter_faults == {speculator.name: 1}
    assert max(held) > 0
    assert held[-1] == 0, "it is freed at once: the rest of the call has the memory"
    assert of_a_call(speculator) == []
    engine.policy_updated()
    output = generate(engine, seed=5)
    assert output.completion_ids == wanted(5)
    assert output.report.drafted[speculator.name] > 0


@pytest.mark.parametrize("name", STATIC)
def test_waves_and_two_engines_share_a_drafter(name):
    """Requests come in waves of one call; engines call in turns, and neither needs what the other's call held."""
    speculator = STATIC[name]()
    engines = [asked(speculator, max_batch_size=3), asked(speculator)]
    for seed in (4, 5):
        for engine in engines:
            output = generate(engine, seed=seed)
            assert output.completion_ids == wanted(seed)
            assert output.report.drafted[speculator.name] > 0
            assert not output.report.drafter_faults
            assert of_a_call(speculator) == []


def test_an_error_in_release_costs_no_rollout():
    class Unreleased(DraftLM):
        def release(self):
            raise RuntimeError("boom")

    output = generate(asked(Unreleased(draft_model(), VOCAB)), seed=4)
    assert output.completion_ids == wanted(4)
    assert output.report.drafter_faults == {"draft_lm": 1}
