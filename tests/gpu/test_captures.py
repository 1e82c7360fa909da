"""What a capture leaves behind, on a pretended GPU that does what torch does around captures, faults included."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import contextmanager

import pytest
import torch

from atlas_rl.policy.captures import Captures
from tests.gpu.engines import ARMS, engine_of, generate, policy, tokens_of, waits
from tests.pretend_cuda import PretendCuda
from tests.pretend_cuda.graphs import NUM_STREAMS

pytestmark = pytest.mark.usefixtures("probed_once")

LONG = {"max_new_tokens": 12, "eos_token_ids": ()}
NO_MEMORY = "no memory left for the CUDA graph"
SAID = "cannot run as a CUDA graph"


def said_of(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def replays(cuda):
    return sum(event.what == "graph" for event in cuda.events)


def test_a_capture_that_failed_leaves_nothing_behind(caplog):
    """Else a trainer would go on beside its own stream, its allocator would free nothing for others, and dropout fail."""
    with PretendCuda(graphs=True) as cuda:
        before = torch.cuda.current_stream()
        generate(engine_of(cuda.move(waits(policy(torch.bfloat16)))), 2, **LONG)
        assert torch.cuda.current_stream() is before
        assert not cuda.graphs.underway
        assert cuda.graphs.draws
    (said,) = said_of(caplog, SAID)
    assert "operation not permitted when stream is capturing" in said  # not what came of it


def test_the_pretended_device_does_what_torch_does_if_a_capture_fails():
    with PretendCuda(graphs=True) as cuda:
        before = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match="previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(1, device="cuda").item()
        assert torch.cuda.current_stream() is not before
        assert cuda.graphs.underway
        assert not cuda.graphs.draws


def another_captures(cuda, index):
    """Somebody else's graph of a product, captured while a device was current, on torch's own stream for captures."""
    x, graph = torch.ones(2, 2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.device(index), torch.cuda.graph(graph):
        x @ x
    return graph


def test_a_capture_takes_place_on_the_device_of_its_tensors(flash_in_float32):
    """Whichever device captured first: torch keeps one stream for captures, on that device."""
    with PretendCuda(graphs=True, current=1) as cuda:
        assert not another_captures(cuda, 1).operations
        found = tokens_of(generate(engine_of(cuda.move(policy())), 2, **LONG))
        assert replays(cuda)
        assert torch.cuda.current_device() == 1
    assert found == tokens_of(generate(engine_of(policy()), 2, **LONG))


def test_graphs_write_to_nothing_that_goes_with_others(flash_in_float32):
    """Those of drafts outlast the policy's, and somebody else's outlast both."""

    def run(move, drafter):
        return generate(engine_of(move(policy()), drafter), 4, **LONG)

    with PretendCuda(graphs=True) as cuda:
        theirs, drafter = another_captures(cuda, 0), ARMS["recurrent"](cuda.move)
        found = run(cuda.move, drafter)
        assert theirs.workspaces
        theirs.replay()
        kept = [shape.graph for shape in drafter._graphs._shapes.values() if shape.graph is not None]
        assert any(graph.workspaces for graph in kept)
        for graph in kept:
            graph.replay()
    assert tokens_of(found) == tokens_of(run(lambda module: module, ARMS["recurrent"](None)))


def test_an_owner_that_drops_its_graphs_takes_no_memory_from_another():
    """As a draft LM does in the middle of a call, when its cache grows."""
    with PretendCuda(graphs=True):
        x, owners = torch.ones(2, 2, device="cuda"), [Captures(capture=True) for _ in "ab"]
        first, second = (owner._graph_of(lambda: x @ x) for owner in owners)
        streams = [owner._pool.stream for owner in owners]
        assert streams[0] != streams[1]
        del first
        owners[0]._free_pool()
        second.replay()
        again = owners[0]._graph_of(lambda: x @ x)
        again.replay()
        assert owners[0]._pool.stream is streams[0]  # torch has not many


def test_a_pool_has_no_stream_of_another_whoever_took_streams_meanwhile():
    """torch hands out the same ones again. An owner that finds all of them taken is told."""
    with PretendCuda(graphs=True):
        x, owners, graphs = torch.ones(2, 2, device="cuda"), [], []
        for _ in range(NUM_STREAMS):
            owners.append(Captures(capture=True))
            graphs.append(owners[-1]._graph_of(lambda: x @ x))
            for _ in range(NUM_STREAMS - 1):
                torch.cuda.Stream()
        assert len({owner._pool.stream for owner in owners}) == NUM_STREAMS
        late = Captures(capture=True)
        assert late._graph_of(lambda: x @ x) is None
        assert late.refused.startswith("all of torch's streams on this device are taken")
        graphs.pop()
        freed = owners[-1]._pool.stream
        owners.pop()._free_pool()
        again = Captures(capture=True)
        again._graph_of(lambda: x @ x)
        assert (again.captured, again.refused) == (1, None)
        assert again._pool.stream == freed


def test_the_pretended_device_tells_who_writes_to_memory_that_is_gone():
    with PretendCuda(graphs=True) as cuda:
        first, second = another_captures(cuda, 0), another_captures(cuda, 0)
        assert second.workspaces == first.workspaces
        del first
        with pytest.raises(RuntimeError, match="illegal memory access"):
            second.replay()


@contextmanager
def failing(patches, *errors, at_replay=False):
    """The first captures, or first replays, fail, each with one of the errors."""
    capture, left = torch.cuda.graph, list(errors)

    @contextmanager
    def graph(graph, **options):
        with capture(graph, **options):
            yield
            if left and not at_replay:
                raise left.pop(0)
        if left:
            error, own = left.pop(0), graph.replay

            def replay():
                graph.replay = own
                raise error

            graph.replay = replay

    with patches.context() as patches:
        patches.setattr(torch.cuda, "graph", graph)
        yield


LACKS = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "driver": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("at_replay", [False, True])
@pytest.mark.parametrize("who", LACKS)
def test_memory_may_run_out_anywhere(who, at_replay, monkeypatch, caplog):
    """In the capture, where its graph is made, and where that is launched for the first time."""
    with PretendCuda(graphs=True) as cuda, failing(monkeypatch, LACKS[who], at_replay=at_replay):
        model = cuda.move(policy(torch.bfloat16))
        engine = engine_of(model)
        first = generate(engine, **LONG)
        assert not replays(cuda) or at_replay
        before = replays(cuda)
        generate(engine, **LONG)
        assert replays(cuda) > before
    with PretendCuda(graphs=False) as cuda:
        expected = generate(engine_of(cuda.move(policy(torch.bfloat16))), **LONG)
    assert tokens_of(first) == tokens_of(expected)
    assert len(said_of(caplog, NO_MEMORY)) == 1
    assert len(said_of(caplog, SAID)) == 1  # of the second device, which has no graphs


def test_an_error_that_the_caller_handles_is_no_cause(caplog):
    with PretendCuda(graphs=True) as cuda:
        engine = engine_of(cuda.move(waits(policy(torch.bfloat16))))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            generate(engine, **LONG)
    assert len(said_of(caplog, SAID)) == 1
    assert not said_of(caplog, NO_MEMORY)


def test_the_place_of_an_error_is_named():
    def work():
        raise RuntimeError("CUDA error: operation not permitted\nCompile with `TORCH_USE_CUDA_DSA`")

    with PretendCuda(graphs=True):
        owner = Captures(capture=True)
        assert owner._graph_of(work) is None
    line = work.__code__.co_firstlineno + 1
    assert owner.refused == f"CUDA error: operation not permitted, in work of test_captures.py:{line}"


def test_after_an_interrupt_in_its_first_capture_an_owner_captures_again(monkeypatch):
    """torch takes no pool whose graphs are all gone."""
    with PretendCuda(graphs=True):
        x, owner = torch.ones(2, 2, device="cuda"), Captures(capture=True)
        with failing(monkeypatch, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            owner._graph_of(lambda: x.mul_(2))
        graph, before = owner._graph_of(lambda: x.mul_(2)), x.cpu()
        graph.replay()
        assert torch.equal(x.cpu(), 2 * before)
        assert owner.refused is None
        assert owner.captured == 1


@pytest.mark.parametrize("raised", ["new", "handled"])
def test_what_a_failed_capture_held_is_free_at_once(raised):
    """Not when Python next looks for cycles: the memory may be what was lacking."""

    def failed(owner):
        held = torch.ones(1)
        alive.append(weakref.ref(held))

        def work():
            mine = torch.ones(1)
            alive.append(weakref.ref(mine))
            raise sys.exception() or RuntimeError("CUDA error: out of memory")

        assert owner._graph_of(work) is None

    alive: list[weakref.ref] = []
    with PretendCuda(graphs=True):
        owner = Captures(capture=True)
        gc.disable()
        try:
            if raised == "new":
                failed(owner)
            else:
                try:
                    raise RuntimeError("of the caller")
                except RuntimeError:
                    failed(owner)
            assert [each() for each in alive] == [None, None]
        finally:
            gc.enable()
    assert owner.refused.startswith("CUDA error: out of memory" if raised == "new" else "of the caller")
