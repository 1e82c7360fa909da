"""Interrupts at any line of a session's begin and end: the next session puts right what is left."""

from __future__ import annotations

import itertools
import linecache
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from atlas_rl.policy import guise, in_process, threads
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.threads import GENERATING, evaluation_mode, replaced_forwards
from tests.models import tiny_gpt2, tiny_llama


def session(model, runner):
    return runner.session(runner.new_cache(4, 64))


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def interrupted_at(line, work, files=(threads.__file__, guise.__file__, in_process.__file__)):
    """Let `work` end by a KeyboardInterrupt at the n-th line that it comes to in some files; False if it ended before.

    Not where it takes or gives back the lock, and not at a `try`: an interrupt never comes there, only a tracer does.
    """
    seen = itertools.count()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and source.strip() not in ("with GENERATING:", "try:") and next(seen) == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def stand_in(layer, x):
    return torch.nn.functional.linear(x, layer.weight)


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_begin_and_end_is_put_right_by_the_next_session():
    model = tiny_llama(layers=1, seed=3).train()
    runner = InProcessRunner(model)
    things = [*model.modules(), model.config]
    with session(model, runner):
        pass  # probed
    kinds, names = [type(each) for each in things], [set(vars(each)) for each in things]
    head, healed = model.lm_head, 0

    def work():
        with session(model, runner), replaced_forwards({head: type(head).forward}), runner.attention("eager"):
            pass

    for line in itertools.count():
        if not interrupted_at(line, work):
            break
        torch.set_grad_enabled(True)  # a tracer also interrupts between a block and the exit of its `no_grad`
        healed += [type(each) for each in things] == kinds
        with session(model, runner), replaced_forwards({head: stand_in}):
            assert not model.training
            assert head.forward.__func__ is stand_in
        assert [type(each) for each in things] == kinds
        assert [set(vars(each)) for each in things] == names
        assert model.training
        assert in_a_thread(lambda: GENERATING.acquire(blocking=False) and (GENERATING.release(), True)[1])
    assert line > 500
    assert healed > 0.9 * line  # nothing has to wait for the next session, but where the last step is interrupted


@pytest.mark.parametrize("after", [0, 1, 5, 40])
def test_a_class_that_cannot_be_put_back_at_once_is_put_back_later(after, monkeypatch):
    model = tiny_gpt2(seed=3).train()
    put, calls = threads.put_class, itertools.count()

    def interrupt(thing, new):
        if next(calls) >= after:
            raise KeyboardInterrupt
        put(thing, new)

    monkeypatch.setattr(threads, "put_class", interrupt)
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        pass
    monkeypatch.undo()
    assert model.training  # guises do nothing any more
    with evaluation_mode(tiny_llama()):  # of any policy
        assert all(type(module) is class_of(module) for module in model.modules())
