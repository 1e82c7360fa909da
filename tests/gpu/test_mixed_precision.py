"""float32 weights under bf16 autocast on a GPU: a decode step converts neither weights nor caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy import autocast, ragged_attention
from atlas_rl.policy.captures import Captures
from atlas_rl.speculators.draft_lm import DraftLM
from benchmarks import tiny_policies
from tests.casts import Casts
from tests.engines import engine_of
from tests.gpu.engines import ARMS, VOCAB, calls_before_drafts, draft_lm, generate, num_drafted, policy, tokens_of
from tests.gpu.engines import autocast as under_autocast
from tests.gpu.engines import engine_of as engine_with
from tests.models import FACTORIES
from tests.pretend_cuda import PretendCuda


def casts_of_steps(
    model: Any, device: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int], list[int]]:
    """Weights that each decode step converts, caches, and numbers of the largest other tensor that it converts."""
    weights, caches, largest, step = [], [], [], DecodeLoop.step

    def counted(loop: DecodeLoop) -> None:
        num_events = len(device.events)
        with Casts(model) as casts:
            step(loop)
        weights.append(casts.weights)
        largest.append(casts.largest)
        caches.append(sum(event.what == "sdpa autocast" for event in device.events[num_events:]))

    model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)  # for each forward, as accelerate does it
    monkeypatch.setattr(DecodeLoop, "step", counted)
    engine = engine_of(model, speculation=False, audit_share=0)
    engine.generate([[5, 9, 2, 7, 7, 1], [3, 8, 1]], max_new_tokens=4, eos_token_ids=[17], temperature=0)
    return weights, caches, largest


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("arm", ARMS)
def test_drafters_draft_within_a_callers_autocast(arm: str) -> None:
    """Around the whole call, where networks of drafters run under it as well."""

    def run(graphs: bool) -> list[Any]:
        with PretendCuda(graphs=graphs) as device:
            engine = engine_with(device.move(policy()), ARMS[arm](device.move))
            with torch.autocast("cuda", torch.bfloat16):
                outputs = generate(engine, 1 + calls_before_drafts(arm), max_new_tokens=6)
        assert any(event.what == "graph" for event in device.events) == graphs
        assert arm == "plain" or num_drafted(outputs) > 0
        return tokens_of(outputs)

    assert run(True) == run(False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_step_converts_neither_weights_nor_caches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with PretendCuda() as device:
        weights, caches, _ = casts_of_steps(device.move(FACTORIES[family]()), device, monkeypatch)
    assert weights == caches == [0, 0, 0]


def moe(kind: str, experts: str) -> Any:
    """A tiny policy with experts, which multiply in one of the ways that transformers knows."""
    model = tiny_policies.build(kind, num_hidden_layers=2)
    model.set_experts_implementation(experts)
    return model


EXPERT = 2 * 32 * 64  # numbers of one: the least that is converted where it is not kept


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("mixtral", "eager"),
        ("mixtral", "batched_mm"),
        ("mixtral", "grouped_mm"),
        ("qwen3_moe", "batched_mm"),
        ("olmoe", "eager"),
    ],
)
def test_nor_experts_and_routers(kind: str, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts lie in one tensor: what would be converted is a slice of it, or what was gathered from it."""
    with PretendCuda() as device:
        weights, caches, largest = casts_of_steps(device.move(moe(kind, experts)), device, monkeypatch)
    assert weights == caches == [0, 0, 0]
    assert max(largest) < EXPERT / 4


def test_what_autocast_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts above can be other than 0: 7 weights in each of 2 layers, the head, and keys and queries of each layer."""
    monkeypatch.setattr(autocast, "_SHARE", 0)
    monkeypatch.setattr(ragged_attention, "as_attended", lambda *tensors: tensors)
    with PretendCuda() as device:
        weights, caches, _ = casts_of_steps(device.move(FACTORIES["llama"]()), device, monkeypatch)
    assert weights == [15] * 3
    assert caches == [4] * 3


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_what_autocast_does_with_experts(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast, "_SHARE", 0)
    with PretendCuda() as device:
        weights, _, largest = casts_of_steps(device.move(moe("mixtral", experts)), device, monkeypatch)
    assert min(weights) >= 2  # of routers alone
    assert min(largest) >= EXPERT / 2  # of an expert's weights the smaller one


def test_a_draft_lm_converts_its_weights_once_per_call_and_is_captured_once_per_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a session for every draft: without what these share, each would make eight copies, and capture anew."""
    captures: list[Any] = []
    halves: list[Any] = []
    capture, convert = Captures._graph_of, autocast._Half.__init__
    monkeypatch.setattr(Captures, "_graph_of", lambda owner, work: captures.append(owner) or capture(owner, work))
    monkeypatch.setattr(autocast._Half, "__init__", lambda half, *of: halves.append(half) or convert(half, *of))
    with PretendCuda(graphs=True) as device:
        drafter = DraftLM(under_autocast(device.move(draft_lm())), VOCAB)
        engine = engine_with(device.move(policy(torch.bfloat16)), drafter)
        generate(engine, 1, max_new_tokens=4, eos_token_ids=())  # tells what autocast computes in
        captures.clear()
        halves.clear()
        (output,) = generate(engine, 1, max_new_tokens=24, eos_token_ids=())
    assert output.report.num_forwards > 20
    assert sum(output.report.drafted.values()) > 100
    assert 2 <= len(captures) <= 6  # of the policy and the drafter
    assert len(halves) == 8  # seven of its layer, and the head's
