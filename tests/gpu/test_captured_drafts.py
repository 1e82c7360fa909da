"""Drafts of the recurrent head captured on a pretended GPU and replayed: one launch each, the drafts of a CPU."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from atlas_rl.speculators.recurrent import draft_graphs
from atlas_rl.speculators.recurrent.head import FoldedHead
from tests.drafters import recurrent_drafter
from tests.gpu.engines import SAMPLINGS, engine_of, generate, policy, tokens_of
from tests.pretend_cuda import WAITS, PretendCuda

pytestmark = pytest.mark.usefixtures("probed_once")

UNCAPTURED, SHORT = "cannot be captured as CUDA graphs", "no memory was left for the CUDA graph of a draft"
FEW = {"max_vocab": 12}  # fewer tokens than any call uses, so that the vocabulary keeps its size


@dataclass
class Proposed:
    """A draft and what it took.

    Attributes:
        rows: Drafted tokens of every request.
        events: Of the device.
    """

    rows: list
    events: list

    @property
    def is_replayed(self):
        return any(event.what == "graph" for event in self.events)

    def count(self, *kinds):
        return sum(event.count for event in self.events if event.kind in kinds)


class Run:
    """Calls of an engine with a recurrent head that is refreshed after each."""

    def __init__(self, move, events, *, calls=2, drafter=None, dtype=torch.float32, **options):
        self.speculator = recurrent_drafter(**{"budget_share": 4.0} | (drafter or {}))
        self.proposed, self._own, self._events = [], self.speculator.propose, events
        self.speculator.propose = self._propose
        verification = options.pop("verification", "invariant")
        engine = engine_of(move(policy(dtype)), self.speculator, verification=verification)
        options = {"max_new_tokens": 8, "eos_token_ids": ()} | options
        self.outputs, self.graphs, self.captured, self.sizes = [], [], [], []
        for call in range(calls):
            self.outputs += generate(engine, 1, **options | {"seed": call})
            self.graphs.append({key: shape.graph for key, shape in self.speculator._graphs._shapes.items()})
            self.captured.append(self.speculator._graphs.captured)
            self.sizes.append(len(self.speculator.learner.ids))
        assert len(self.speculator.refreshes) == calls

    def _propose(self, sequences, requests, most):
        first = len(self._events)
        draft = self._own(sequences, requests, most)
        rows = [row[:length].tolist() for row, length in zip(draft.token_ids, draft.lengths, strict=True)]
        self.proposed.append(Proposed(rows, self._events[first:]))
        return draft

    @property
    def drafts(self):
        return [each.rows for each in self.proposed]

    @property
    def replayed(self):
        return [each for each in self.proposed if each.is_replayed]


def on_a_gpu(graphs=True, **options):
    with PretendCuda(graphs=graphs) as cuda:
        return Run(cuda.move, cuda.events, **options)


def on_a_cpu(**options):
    return Run(lambda module: module, [], **options)


@pytest.mark.parametrize(("verification", "launches"), [("invariant", 1), ("rejection", 3)])
@pytest.mark.parametrize("sampling", ["sampled", "truncated"])
def test_a_captured_draft_is_one_launch(verification, launches, sampling):
    """Under rejection its probabilities are then laid out over the policy's vocabulary: zeros, and a write."""
    options = {"max_new_tokens": 12, "dtype": torch.bfloat16, "verification": verification} | SAMPLINGS[sampling]
    run = on_a_gpu(**options)
    assert len(run.replayed) >= 4
    for each in run.replayed:
        assert each.count("launch", "triton") == launches
        assert each.count("h2d_async") == 1
        waits = [event for event in each.events if event.kind in WAITS and "policy/captures.py" not in event.where]
        assert [event.kind for event in waits] == ["d2h"]
    plain = [each for each in run.proposed if not each.is_replayed and any(each.rows)]
    assert plain  # the first of its shape
    assert all(each.count("launch", "triton") > 10 for each in plain)


@pytest.mark.parametrize(
    ("verification", "sampling"),
    [
        ("invariant", "sampled"),
        ("invariant", "greedy"),
        ("invariant", "truncated"),
        ("rejection", "sampled"),
        ("rejection", "truncated"),
    ],
)
def test_drafts_are_those_of_a_cpu(verification, sampling):
    """With other keys, positions, requests and tokens in every step, and with the weights of three refreshes."""
    options = {"calls": 3, "verification": verification} | SAMPLINGS[sampling]
    found, expected = on_a_gpu(**options), on_a_cpu(**options)
    assert len(found.replayed) >= 4
    assert found.drafts == expected.drafts
    assert tokens_of(found.outputs) == tokens_of(expected.outputs)


def test_inputs_that_a_graph_had_built_in_would_be_seen(monkeypatch):
    """The comparison above can fail."""
    own, filled = draft_graphs._fill, []

    def fill(target, inputs):
        if not any(target is known for known in filled):
            own(target, inputs)
            filled.append(target)

    monkeypatch.setattr(draft_graphs, "_fill", fill)
    found, expected = on_a_gpu(calls=2), on_a_cpu(calls=2)
    assert found.replayed
    assert found.drafts != expected.drafts
    assert tokens_of(found.outputs) == tokens_of(expected.outputs)  # a draft decides nothing but speed


def test_graphs_outlast_a_refresh_that_leaves_the_vocabulary_its_size():
    found, expected = on_a_gpu(calls=3, drafter=FEW), on_a_cpu(calls=3, drafter=FEW)
    assert found.sizes == [12] * 3
    kept = {key: graph for key, graph in found.graphs[1].items() if graph is not None}
    assert kept
    assert all(found.graphs[2][key] is graph for key, graph in kept.items())
    assert found.drafts == expected.drafts  # by the new weights, which were written in place of the old ones


def test_a_vocabulary_of_another_size_drops_them():
    options = {"calls": 3, "temperature": 2.0}  # so that every call has new tokens
    found = on_a_gpu(**options)
    assert found.sizes[0] != found.sizes[1]
    before, after = ({graph for graph in graphs.values() if graph is not None} for graphs in found.graphs[1:])
    assert before
    assert after
    assert not before & after
    assert found.drafts == on_a_cpu(**options).drafts


@contextmanager
def reserving(num_bytes, *errors):
    """Every capture reserves some bytes; the first ones fail, each with one of the errors. Gives the pools they use."""
    capture, reserved, left, pools = torch.cuda.graph, [0], list(errors), []

    @contextmanager
    def graph(graph, **options):
        pools.append(options["pool"])
        with capture(graph, **options):
            yield
            if left:
                raise left.pop(0)
        reserved[0] += num_bytes

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "graph", graph))
        stack.enter_context(mock.patch.object(torch.cuda, "memory_reserved", side_effect=lambda *_: reserved[0]))
        stack.enter_context(mock.patch.object(torch.cuda, "graph_pool_handle", side_effect=object))
        yield pools


def test_the_report_counts_captures_where_they_are_made_and_bytes_as_long_as_they_are_held():
    with PretendCuda(graphs=True) as cuda, reserving(10) as pools:
        run = Run(cuda.move, cuda.events, calls=3, drafter=FEW)
    reports = [output.report for output in run.outputs]
    assert run.captured[0] == 0 < run.captured[1]
    assert len(pools) == run.captured[2]
    assert len(set(pools)) == 1
    assert [report.graph_bytes for report in reports] == [10 * number for number in run.captured]
    captures = [after - before for before, after in zip([0, *run.captured], run.captured, strict=False)]
    assert [report.capture_s > 0 for report in reports] == [number > 0 for number in captures]


def said_of(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def waiting(self, hidden, own=FoldedHead.begin):
    return own(self, hidden * float(hidden.sum() != 0.5))


FALLBACKS = {
    "AMD": ((torch.version, "hip", "7.0"), "has not been tried on AMD's GPUs"),
    "a head that waits": ((FoldedHead, "begin", waiting), "operation not permitted when stream is capturing"),
    "no graphs": (None, "a pretended device has no graphs"),
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_a_fallback_is_said_once_and_named(why, caplog, monkeypatch):
    patch, words = FALLBACKS[why]
    with monkeypatch.context() as patches:
        if patch is not None:
            patches.setattr(*patch)
        run = on_a_gpu(graphs=patch is not None, calls=3)
    assert not run.replayed
    assert len(said_of(caplog, UNCAPTURED)) == 1
    assert words in said_of(caplog, UNCAPTURED)[0]
    expected = on_a_cpu(calls=3)
    assert run.drafts == expected.drafts
    assert tokens_of(run.outputs) == tokens_of(expected.outputs)


def test_memory_that_ran_out_in_one_call_is_said_and_the_next_call_captures(caplog):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    with PretendCuda(graphs=True) as cuda, reserving(0, error):
        run = Run(cuda.move, cuda.events, calls=3)
    assert not any(run.graphs[1].values())
    assert any(run.graphs[2].values())
    assert len(said_of(caplog, SHORT)) == 1
    assert not said_of(caplog, UNCAPTURED)


def test_a_bound_on_memory_ends_captures_until_the_next_call():
    """Shapes are called plainly then."""
    with PretendCuda(graphs=True) as cuda, reserving(draft_graphs._MOST_BYTES):
        run = Run(cuda.move, cuda.events, calls=3, drafter=FEW)
    assert [sum(graph is not None for graph in graphs.values()) for graphs in run.graphs] == [0, 1, 1]
    assert run.captured == [0, 1, 2]
    assert [output.report.graph_bytes for output in run.outputs] == [0, *2 * [draft_graphs._MOST_BYTES]]
    assert run.drafts == on_a_cpu(calls=3, drafter=FEW).drafts
