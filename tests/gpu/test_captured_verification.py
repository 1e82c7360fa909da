"""Verification in the graph of a step, on a pretended GPU: what a step costs, its tokens, and what if it cannot be there."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.sampling.queued import QueuedVerification
from atlas_rl.sampling.verification import VERIFIERS
from tests.gpu.engines import ARMS, SAMPLINGS, autocast, engine_of, generate, policy, tokens_of
from tests.pretend_cuda import PretendCuda

pytestmark = pytest.mark.usefixtures("probed_once")

APART = "verification cannot be part of them"
LONG = {"max_new_tokens": 14, "eos_token_ids": ()}
ONE_STEP = Counter(h2d_async=1, launch=1, d2h_async=1, sync=2)  # waits: for the forward's end, and for the results


def events_of_steps(monkeypatch, arm, verification, calls=1, model=None, **options):
    """Events of every decode step that replays a graph, by kind, and the outputs."""
    steps, own = [], DecodeLoop.step
    with PretendCuda(graphs=True) as cuda, monkeypatch.context() as patches:

        def step(loop):
            seen = len(cuda.events)
            own(loop)
            events = [event for event in cuda.events[seen:] if "policy/captures.py" not in event.where]  # that waits
            if any(event.what == "graph" for event in events):
                steps.append(events)

        patches.setattr(DecodeLoop, "step", step)
        moved = cuda.move(policy(torch.bfloat16) if model is None else model)
        outputs = generate(engine_of(moved, ARMS[arm](cuda.move), verification=verification), calls, **LONG | options)
    return steps, outputs


def kinds_of(events):
    counts = Counter()
    for event in events:
        counts[event.kind] += event.count
    return counts


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("verification", VERIFIERS)
def test_a_captured_step_is_one_copy_one_launch_and_one_copy(verification, sampling, monkeypatch):
    """Behind the forward it would be two copies, four launches and one copy."""
    steps, _ = events_of_steps(monkeypatch, "plain", verification, **SAMPLINGS[sampling])
    assert len(steps) >= LONG["max_new_tokens"] - 3
    assert all(kinds_of(events) == ONE_STEP for events in steps)


def test_under_autocast_as_well(monkeypatch):
    steps, _ = events_of_steps(monkeypatch, "plain", "invariant", 2, autocast(policy()))
    assert kinds_of(steps[-1]) == ONE_STEP


@pytest.mark.parametrize("verification", VERIFIERS)
def test_so_is_one_that_verifies_drafts(verification, monkeypatch):
    """Unless rows move, or a size is new."""
    steps, outputs = events_of_steps(monkeypatch, "history", verification, 3, max_new_tokens=20)
    assert sum(output.report.drafted["history"] for output in outputs) > 20
    assert Counter(kinds_of(events) == ONE_STEP for events in steps)[True] > 0.7 * len(steps) > 10
    assert not any(event.kind == "triton" for events in steps for event in events)


@pytest.mark.parametrize("sampling", ["truncated", "penalty"])
def test_what_is_processed_first_is_launched_behind_the_step(sampling, monkeypatch):
    steps, _ = events_of_steps(monkeypatch, "plain", "invariant", **SAMPLINGS[sampling])
    assert all(kinds_of(events)["triton"] >= 2 for events in steps)


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("arm", ["history", "draft_lm"])
@pytest.mark.parametrize("verification", VERIFIERS)
def test_tokens_and_figures_are_those_of_a_cpu(verification, arm, sampling, flash_in_float32):
    """Of requests that end at different steps, in waves, with drafts accepted and rejected; twice."""

    def run(move):
        engine = engine_of(move(policy()), ARMS[arm](move), verification=verification, max_batch_size=4)
        return generate(engine, 2, max_new_tokens=9, **SAMPLINGS[sampling])

    with PretendCuda(graphs=True) as cuda:
        found = run(cuda.move)
    assert any(event.what == "graph" for event in cuda.events)
    expected = run(lambda module: module)
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.report.accepted == other.report.accepted
        assert one.report.entropy == pytest.approx(other.report.entropy, abs=1e-4)
        for logprobs, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert logprobs == pytest.approx(theirs, abs=1e-4)


def test_steps_are_captured_alone_where_verification_cannot_be(monkeypatch, caplog):
    """Named once, in two calls; the tokens are the same."""
    _, expected = events_of_steps(monkeypatch, "history", "invariant", 2)
    own = QueuedVerification.run

    def waiting(tail, logits, inputs):
        logits[0, 0].item()
        return own(tail, logits, inputs)

    monkeypatch.setattr(QueuedVerification, "run", waiting)
    steps, found = events_of_steps(monkeypatch, "history", "invariant", 2)
    assert tokens_of(found) == tokens_of(expected)
    assert len(steps) > 10
    assert all(kinds_of(events)["triton"] == 2 for events in steps)
    said = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(said) == 1
    assert APART in said[0]
    assert "operation not permitted when stream is capturing" in said[0]
