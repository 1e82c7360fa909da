"""float32 weights under autocast, as TRL trains: nothing is converted twice, and every result is the same to the bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from atlas_rl.controller.fixed import FixedController
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy import autocast, ragged_attention
from atlas_rl.policy.autocast import HalfWeights
from atlas_rl.policy.guise import class_of
from atlas_rl.policy.linear_routes import BUCKETS, PLAIN, TURNED, WIDENED, RouteTable
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.casts import Casts
from tests.engines import engine_of
from tests.models import FACTORIES, tiny_llama

pytestmark = pytest.mark.usefixtures("accelerate_anew")

BF16, FP16 = torch.bfloat16, torch.float16
PROMPTS = [[1, 2, 3] * 10, [4], [5, 9, 2, 7, 7, 1]]


def mixed(model: Any) -> Any:
    """As accelerate prepares it: an autocast region for each forward."""
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    return model


def rollouts(engine: Any, **options: Any) -> Any:
    settings = {"num_generations": 2, "max_new_tokens": 8, "eos_token_ids": [17], "seed": 1, "temperature": 0.8}
    return engine.generate(PROMPTS, **settings | options)


@pytest.fixture
def repeating(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called: from now on autocast repeats itself, as it does without this module."""

    def repeat() -> None:
        monkeypatch.setattr(autocast, "_SHARE", 0)
        monkeypatch.setattr(ragged_attention, "as_attended", lambda *tensors: tensors)

    return repeat


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Casts]:
    """What is converted in every decode step."""
    seen: list[Casts] = []
    step = DecodeLoop.step

    def counted(loop: DecodeLoop) -> None:
        with Casts(loop.runner.model) as casts:
            step(loop)
        seen.append(casts)

    monkeypatch.setattr(DecodeLoop, "step", counted)
    return seen


# ------------------------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("family", FACTORIES)
def test_a_step_converts_activations_only_and_rollouts_are_the_same(
    family: str, steps: list[Casts], repeating: Any
) -> None:
    model = mixed(FACTORIES[family]())
    found = rollouts(engine_of(model, speculation=False, audit_share=0))
    num_steps = len(steps)
    assert {casts.weights for casts in steps} == {0}
    assert max(casts.largest for casts in steps) <= 6 * 128  # rows, and numbers that a layer takes
    halves = sum(m.weight.numel() + (0 if m.bias is None else m.bias.numel()) for m in linears_of(model))
    assert 0 < found.report.packed_bytes <= 2 * halves

    repeating()
    expected = rollouts(engine_of(model, speculation=False, audit_share=0))
    assert min(casts.weights for casts in steps[num_steps:]) >= len(linears_of(model))
    assert found.completion_ids == expected.completion_ids
    assert found.logprobs == expected.logprobs
    assert expected.report.packed_bytes == 0


def linears_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if class_of(module) in (nn.Linear, Conv1D)]


@pytest.mark.parametrize("route", [PLAIN, TURNED, WIDENED, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_large_layers_on_a_cpu_go_by_the_fastest_route(route: str | None, bias: bool, dtype: torch.dtype) -> None:
    """A processor may have no units for half precision; whatever is taken, the result is autocast's up to rounding."""
    torch.manual_seed(0)
    layer, table = nn.Linear(400, 500, bias=bias), RouteTable(None, "nobody's")
    if route is not None:
        for rows in BUCKETS:
            contest = table.contest(layer.weight.to(dtype), bias, rows, may_pack=False)
            contest.seconds = {name: [0.5 if name == route else 0.7] for name in contest.seconds}
            contest.decide()
    for rows in (1, 3, 300):
        x = torch.randn(1, rows, 400)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            expected = layer(x)
            with HalfWeights(layer, lambda: 1 << 40, table).installed(dtype):
                for ours in (layer(x), layer(x.to(dtype)), *(layer(x) for _ in range(16))):
                    assert (ours.dtype, ours.shape) == (dtype, expected.shape)
                    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
    decided = [contest for contest in table.contests.values() if contest.winner]
    assert len(decided) == (len(BUCKETS) if route else 3)
    assert not any("packed" in contest.seconds for contest in decided)


@pytest.mark.parametrize("drafter", [HistorySpeculator, Fp4SelfSpeculator])
def test_drafted_steps_as_well(drafter: Any, steps: list[Casts], repeating: Any) -> None:
    """The four-bit copy's layers draft, in place of those with copies in half precision."""
    model = mixed(tiny_llama(seed=11))

    def run() -> Any:
        speculator = drafter()
        controller = FixedController([speculator.name], speculator.name, 3)
        engine = engine_of(model, speculators=[speculator], controller=controller, audit_share=1)
        return rollouts(engine, max_new_tokens=16)

    found, num_steps = run(), len(steps)
    assert not found.report.warnings
    assert 0 < sum(found.report.accepted.values()) < sum(found.report.drafted.values())
    assert {casts.weights for casts in steps} == {0}
    repeating()
    expected = run()
    assert min(casts.weights for casts in steps[num_steps:]) > 0
    assert (found.completion_ids, found.logprobs) == (expected.completion_ids, expected.logprobs)


def test_frozen_weights_under_adapters(steps: list[Casts], repeating: Any) -> None:
    """Of weights that are not trained autocast remembers nothing, not even within a forward."""
    model = get_peft_model(
        tiny_llama(seed=11),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    engine = engine_of(model, speculation=False, audit_share=0)
    with torch.autocast("cpu", BF16):
        found = rollouts(engine)
        assert {casts.weights for casts in steps} == {0}
        repeating()
        expected = rollouts(engine)
    assert (found.completion_ids, found.logprobs) == (expected.completion_ids, expected.logprobs)


def test_weights_that_were_trained_in_between_are_converted_anew(repeating: Any) -> None:
    model = mixed(tiny_llama(seed=11))
    engine = engine_of(model, speculation=False, audit_share=0)
    before = rollouts(engine)
    for name, change in {
        "in place": lambda weight: weight.mul_(0.5),
        "through .data, which counts no version": lambda weight: weight.data.mul_(3.0),
    }.items():
        with torch.no_grad():
            change(model.model.layers[0].mlp.down_proj.weight)
        engine.policy_updated()
        after = rollouts(engine)
        assert after.logprobs != before.logprobs, name
        before = after
    repeating()
    assert rollouts(engine_of(model, speculation=False, audit_share=0)).logprobs == before.logprobs


# -------------------------------------------------------------------------------------------------------------- layers


def layers() -> list[Any]:
    torch.manual_seed(0)
    conv = Conv1D(70, 20)
    nn.init.normal_(conv.bias)
    return [nn.Linear(20, 70), nn.Linear(20, 70, bias=False), conv]


def halves_of(model: nn.Module, free: int = 1 << 40) -> HalfWeights:
    return HalfWeights(model, lambda: free)


@pytest.mark.parametrize("layer", layers(), ids=["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("inputs", [torch.float32, BF16, FP16])
def test_a_layer_returns_what_it_returns_otherwise(layer: Any, dtype: torch.dtype, inputs: torch.dtype) -> None:
    model, x = nn.Sequential(layer), torch.randn(2, 3, 20).to(inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", dtype):
            expected = model(x)
            with halves_of(model).installed(dtype), Casts(model) as casts:
                found = model(x)
        assert casts.weights == 0
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("region", [(BF16, False), (FP16, True)], ids=["none", "another type"])
def test_where_autocast_is_not_what_it_was_layers_are_as_they_were(region: tuple[torch.dtype, bool]) -> None:
    model, x = nn.Sequential(*layers()[:1]), torch.randn(3, 20)
    with torch.no_grad(), halves_of(model).installed(BF16), torch.autocast("cpu", region[0], enabled=region[1]):
        found = model(x)
    with torch.no_grad(), torch.autocast("cpu", region[0], enabled=region[1]):
        assert torch.equal(found, model(x))


def put_other_numbers(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 2


CHANGES = {
    "weight": lambda layer: layer.weight.mul_(2),
    "bias": lambda layer: layer.bias.add_(1),
    "other memory": put_other_numbers,
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_a_call_is_seen(change: str) -> None:
    model, x = nn.Sequential(*layers()[:1]), torch.randn(3, 20)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        with halves_of(model).installed(BF16):
            before = model(x)
            CHANGES[change](model[0])
            found = model(x)
        assert torch.equal(found, model(x))
        assert not torch.equal(found, before)


def test_copies_take_half_of_the_memory_at_most_and_go_with_the_call() -> None:
    model = nn.Sequential(*layers())
    needed = 3 * 2 * 20 * 70
    with halves_of(model, 2 * needed - 1).installed(BF16), torch.no_grad():
        assert class_of(model[0]) is type(model[0])
    halves = halves_of(model, 2 * needed)
    with halves.installed(BF16):
        assert halves.num_bytes == needed
    assert (halves.num_bytes, halves.most_bytes) == (0, needed)
    assert type(model[0]) is nn.Linear
    with halves.installed(None):
        assert halves.most_bytes == 0


def test_other_layers_stay_as_they_are() -> None:
    hooked = nn.Linear(20, 20)
    hooked.forward = lambda input: input  # what accelerate's hooks do
    model = nn.Sequential(hooked, nn.Linear(20, 20).to(BF16), nn.Embedding(20, 20))
    before = [type(module) for module in model]
    with halves_of(model).installed(BF16):
        assert [type(module) for module in model] == before


def test_other_threads_have_their_own_layers() -> None:
    model, x = nn.Sequential(nn.Linear(20, 20)), torch.randn(3, 20)
    seen: list[int] = []

    def train() -> None:
        with Casts(model) as casts, torch.autocast("cpu", BF16):
            model(x).sum().backward()
        seen.append(casts.weights)

    with halves_of(model).installed(BF16):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert seen == [2]  # weight and bias
    assert model[0].weight.grad is not None
