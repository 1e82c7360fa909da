"""Steps captured on a pretended GPU and replayed: one launch each, the tokens of a CPU, and fallbacks that are said."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from atlas_kernels.layer import rms_norm
from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import SamplingParams
from atlas_rl.decode import compile_kernels
from atlas_rl.policy import in_process, varlen
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.probe import probe
from atlas_rl.policy.step_graphs import SIZES
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.mtp.speculator import MtpSpeculator
from benchmarks import tiny_policies
from tests.gpu.counts import STEP, sectioned
from tests.gpu.engines import ARMS, autocast, calls_before_drafts, engine_of, generate, policy, tokens_of, waits
from tests.models import FACTORIES, tiny_llama
from tests.mtp import PlainLayer, tiny_policy, write_checkpoint
from tests.pretend_cuda import WAITS, PretendCuda

pytestmark = pytest.mark.usefixtures("probed_once")

SAID = "cannot run as a CUDA graph"
LONG = {"max_new_tokens": 12, "eos_token_ids": ()}


def replays_of(model, arm="plain", calls=1, **options):
    """A pretended device on which an engine has generated, and what came of it."""
    with PretendCuda(graphs=True) as cuda, sectioned(cuda):
        engine = engine_of(cuda.move(model), ARMS[arm](cuda.move))
        outputs = generate(engine, calls, **LONG | options)
    return cuda, outputs


def test_a_captured_forward_is_one_launch():
    cuda, outputs = replays_of(policy(torch.bfloat16))
    target = cuda.of("launch", "triton", section="target")
    replays = [event for event in target if event.what == "graph"]
    steps = cuda.entered["target"]
    assert steps == LONG["max_new_tokens"] - 1
    assert len(replays) == steps - 1  # the first one loads what a capture must not load
    seen = cuda.events.index(replays[0])
    after = [event for event in cuda.events[seen:] if event.section == "target" and event.kind in ("launch", "triton")]
    assert after == replays
    assert not [event for event in cuda.events[seen:] if event.section == "target" and event.kind in WAITS]
    assert outputs[0].report.capture_s > 0


def test_drafting_adds_what_is_tapped():
    cuda, _ = replays_of(policy(torch.bfloat16), "recurrent", calls=2)
    first = next(index for index, event in enumerate(cuda.events) if event.what == "graph")
    target = [event.what for event in cuda.events[first:] if event.section == "target" and event.kind == "launch"]
    replays = target.count("graph")
    assert replays >= 15
    assert target.count("clone") <= cuda.entered["target"]  # the hidden state that it drafts from


@pytest.fixture
def flash_in_float32(monkeypatch):
    """So that tokens can be compared to the bit: the operator is emulated, in any type."""
    monkeypatch.setattr(varlen, "_TYPES", (torch.float32, torch.bfloat16, torch.float16))


def lora():
    torch.manual_seed(0)
    return get_peft_model(policy(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def capped():
    model = FACTORIES["gemma2"](vocab=128, context=128, seed=2)
    model.set_attn_implementation("eager")  # transformers' SDPA path caps nothing
    return model


CASES = {
    "ragged": (policy, "history", {}),
    "waves that retire": (policy, "plain", {"max_batch_size": 2}),
    "windows": (lambda: FACTORIES["mistral"](vocab=128, context=128, seed=2), "plain", {}),
    "capped scores": (capped, "plain", {}),
    "LoRA": (lora, "plain", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_a_cpu(case, flash_in_float32):
    make, arm, options = CASES[case]

    def run(move):
        engine = engine_of(move(make()), ARMS[arm](move), **options)
        return tokens_of(generate(engine, 2, max_new_tokens=8))

    with PretendCuda(graphs=True) as cuda:
        found = run(cuda.move)
    assert any(event.what == "graph" for event in cuda.events) == (case != "capped scores")
    assert found == run(lambda module: module)


def test_tokens_under_autocast_are_those_of_steps_that_are_not_captured():
    def run(graphs):
        with PretendCuda(graphs=graphs) as cuda:
            found = tokens_of(generate(engine_of(cuda.move(autocast(policy()))), 2, max_new_tokens=6))
        return found, any(event.what == "graph" for event in cuda.events)

    (captured, replayed), (plain, launched) = run(True), run(False)
    assert (replayed, launched) == (True, False)
    assert captured == plain


def test_a_step_after_an_optimizer_step_runs_the_new_weights(flash_in_float32):
    def run(move):
        model = move(policy())
        engine, out = engine_of(model), []
        for _ in range(2):
            out += tokens_of(generate(engine, 1, max_new_tokens=6, seed=3))
            with torch.no_grad():
                model.get_output_embeddings().weight.neg_()
        return out

    with PretendCuda(graphs=True) as cuda:
        found = run(cuda.move)
    assert any(event.what == "graph" for event in cuda.events)
    assert found[0] != found[1]
    assert found == run(lambda module: module)


@pytest.mark.parametrize("arm", ARMS)
def test_kernels_are_launched_while_the_policys_device_is_the_current_one(arm, monkeypatch):
    """Of the probe, of compiling, of steps, their captures and drafts, of learning and of the audit."""
    monkeypatch.setattr(in_process, "probe", probe)  # nothing that another test found
    compile_kernels._compiled.clear()
    with PretendCuda(graphs=True, current=1) as cuda, sectioned(cuda):
        engine = engine_of(cuda.move(policy(torch.bfloat16)), ARMS[arm](cuda.move), audit_share=1.0)
        generate(engine, 1 + calls_before_drafts(arm), **LONG | {"max_new_tokens": 4})
        assert torch.cuda.current_device() == 1
    assert not cuda.astray()
    assert cuda.count("triton", section="probe")
    assert cuda.count("triton", section=STEP)
    assert any(event.what == "graph" for event in cuda.events)


def test_so_are_those_of_an_mtp_layer_before_any_call(tmp_path):
    model = tiny_policy("mimo")
    folder = write_checkpoint(tmp_path, model, PlainLayer("mimo", model))
    with PretendCuda(current=1) as cuda:
        speculator = MtpSpeculator(folder)
        speculator.bind(InProcessView(cuda.move(model.bfloat16())), True)
        compile_kernels.compile_drafting([speculator], SamplingParams(max_new_tokens=4), 64, speculator._device)
    assert cuda.count("triton")
    assert not cuda.astray()


def test_the_pretended_device_tells_a_launch_that_went_astray():
    with PretendCuda(current=1) as cuda:
        x = torch.ones(1, 2, 16, device="cuda")
        rms_norm(x, x[0, 0], 1e-6)
        with torch.cuda.device(x.device):
            rms_norm(x, x[0, 0], 1e-6)
    assert cuda.count("triton") == 2
    assert len(cuda.astray()) == 1


def said_of(caplog):
    return [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


FALLBACKS = {
    "a layer that waits": (
        lambda: waits(policy(torch.bfloat16)),
        {},
        "operation not permitted when stream is capturing",
    ),
    "an old GPU": (
        lambda: policy(torch.bfloat16),
        {"capability": (7, 5)},
        "compute capability 8.0, and this one has 7.5",
    ),
    "float32": (policy, {}, "computed in torch.float32"),
    "capped scores": (lambda: capped().bfloat16(), {}, "caps scores"),
    "recurrent layers": (lambda: tiny_policies.build("lfm2").bfloat16(), {}, "recurrent"),
    "heads of twelve numbers": (
        lambda: tiny_llama(vocab=64, hidden=48, context=128).bfloat16(),
        {},
        "keys of 12 and values of 12 numbers",
    ),
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_a_fallback_is_said_once_and_named(why, caplog):
    make, device, words = FALLBACKS[why]
    with PretendCuda(graphs=True, **device) as cuda:
        engine = engine_of(cuda.move(make()))
        outputs = generate(engine, 2, max_new_tokens=5)
    assert not [event for event in cuda.events if event.what == "graph"]
    assert len(said_of(caplog)) == 1, said_of(caplog)
    assert words in said_of(caplog)[0]
    assert all(len(ids) for output in outputs for ids in output.completion_ids)


NO_MEMORY = "no memory left for the CUDA graph"


def failing(patches, *errors):
    """The first captures fail, each with one of the errors."""
    capture, left = torch.cuda.graph, list(errors)

    @contextmanager
    def graph(graph, **options):
        with capture(graph, **options):
            yield
            if left:
                raise left.pop(0)

    patches.setattr(torch.cuda, "graph", graph)


def telling(model, told):
    """An engine whose controller notes what it is told of its forwards."""
    controller = FixedController(["history"], "history", 2)
    own = controller.forwards_are_padded
    controller.forwards_are_padded = lambda sizes: (told.append(tuple(sizes)), own(sizes))
    return AtlasRolloutEngine(
        model=model, speculators=[HistorySpeculator()], controller=controller, console=False, audit_share=0.0
    )


def test_memory_that_ran_out_in_one_call_is_said_and_the_next_call_captures(monkeypatch, caplog):
    told, replays = [], []
    with PretendCuda(graphs=True) as cuda, monkeypatch.context() as patches:
        failing(patches, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
        engine = telling(cuda.move(policy(torch.bfloat16)), told)
        for _ in range(2):
            cuda.events.clear()
            generate(engine, **LONG)
            replays.append(sum(event.what == "graph" for event in cuda.events))
    assert replays[0] == 0
    assert replays[1] > 0
    assert told == [SIZES, (), SIZES]
    assert len([record for record in caplog.records if NO_MEMORY in record.getMessage()]) == 1
    assert not said_of(caplog)


def test_memory_that_ran_out_is_the_cause_whatever_came_of_it(monkeypatch, caplog):
    """Ending a capture that has failed may fail as well."""
    with PretendCuda(graphs=True) as cuda, monkeypatch.context() as patches:
        second = RuntimeError("operation failed due to a previous error during capture")
        second.__context__ = torch.OutOfMemoryError("CUDA out of memory")
        failing(patches, second)
        generate(engine_of(cuda.move(policy(torch.bfloat16))), 2, **LONG)
    assert any(event.what == "graph" for event in cuda.events)
    assert not said_of(caplog)


def test_the_controller_is_told_at_the_next_step_that_steps_are_padded_no_more():
    told = []
    with PretendCuda(graphs=True) as cuda:
        generate(telling(cuda.move(waits(policy(torch.bfloat16))), told), 2, **LONG)
    assert told == [SIZES, (), ()]  # in the first call, and once in the second


def test_memory_of_captures_is_counted_from_what_is_left_when_they_begin(monkeypatch):
    """Beginning one frees what torch holds unused: 100 bytes here. Each capture reserves 10."""
    reserved = [130]
    with PretendCuda(graphs=True) as cuda, monkeypatch.context() as patches:
        capture = torch.cuda.graph

        @contextmanager
        def reserving(graph, **options):
            with capture(graph, **options):
                reserved[0] = min(reserved[0], 30)
                yield
            reserved[0] += 10

        patches.setattr(torch.cuda, "graph", reserving)
        patches.setattr(torch.cuda, "memory_reserved", lambda device=None: reserved[0])
        outputs = generate(engine_of(cuda.move(policy(torch.bfloat16))), **LONG)
    assert outputs[0].report.graph_bytes == 10


def test_graphs_that_are_dropped_leave_their_memory(monkeypatch):
    """A pool outlives its graphs: those of a cache that has moved get a new one."""
    pools = []
    with PretendCuda(graphs=True) as cuda, monkeypatch.context() as patches:
        own = torch.cuda.graph_pool_handle
        patches.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(0) or own())
        runner = InProcessRunner(cuda.move(policy(torch.bfloat16)))
        cache = runner.new_cache(2, 128)
        one = np.ones(1, np.int64)
        with runner.session(cache):
            runner.forward(Segments(one, 0, 0 * one, one), np.zeros(1, np.int64))
            for moves in range(2):
                for place in range(1, 4):
                    runner.forward(Segments(one, 0, place * one, one), np.zeros(1, np.int64))
                assert len(pools) == moves + 1
                cache.generation += 1
    assert cache.steps.captured == 2


def test_a_gpu_of_amd_is_named(monkeypatch, caplog):
    with PretendCuda(graphs=True) as cuda:
        monkeypatch.setattr(torch.version, "hip", "7.0")
        generate(engine_of(cuda.move(policy(torch.bfloat16))), 1, max_new_tokens=4)
    assert len(said_of(caplog)) == 1
    assert "has not been tried on AMD's GPUs" in said_of(caplog)[0]


def test_a_torch_without_the_operator_is_named(monkeypatch, caplog):
    with PretendCuda(graphs=True) as cuda:
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        generate(engine_of(cuda.move(policy(torch.bfloat16))), 1, max_new_tokens=4)
    assert len(said_of(caplog)) == 1
    assert "has no flash attention over rows of any length" in said_of(caplog)[0]


def test_nothing_is_said_where_steps_are_captured_and_on_a_cpu(caplog):
    replays_of(policy(torch.bfloat16), max_new_tokens=4)
    generate(engine_of(policy()), 1, max_new_tokens=4)
    assert not said_of(caplog)
    assert InProcessRunner(policy())._said == set()
