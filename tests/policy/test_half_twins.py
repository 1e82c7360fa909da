"""Experts and routers under autocast: twins with weights of half the size return the same to the bit, or there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy import autocast
from atlas_rl.policy.autocast import HalfWeights
from atlas_rl.policy.guise import class_of
from atlas_rl.speculators.history.speculator import HistorySpeculator
from benchmarks import tiny_policies
from tests.casts import Casts
from tests.engines import engine_of

BF16 = torch.bfloat16
EXPERTS, WIDTH = 4, 32


class Experts(nn.Module):
    """Weights of all experts in one tensor, of which a forward takes some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.calls = 0

    def forward(self, x: torch.Tensor, cache: list[int] | None = None) -> torch.Tensor:
        self.calls += 1
        if cache is not None:
            cache.append(len(x))
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight[1])


class Gathered(Experts):
    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.weight[torch.arange(len(x)) % EXPERTS], x[..., None])[..., 0]


class InFloat32(Experts):
    """Autocast is off inside, as in some routers."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return functional.linear(x.float(), self.weight[1].float())


class Scaled(Experts):
    """No product: autocast converts nothing."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[1, 0]


class InPlace(Experts):
    """Writes into what it is given."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.mul_(2), self.weight[1])


def halves_of(model: nn.Module, free: int = 1 << 40) -> HalfWeights:
    return HalfWeights(model, lambda: free)


def run(model: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad(), torch.autocast("cpu", BF16):
        return [model(x.clone()) for x in inputs]


def inputs() -> list[torch.Tensor]:
    return list(torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", [Experts, Gathered, InPlace, InFloat32, Scaled])
def test_a_layer_returns_what_it_returns_otherwise(kind: type[Experts]) -> None:
    layer = kind()
    model = nn.Sequential(layer)
    expected = run(model, inputs())
    halves = halves_of(model)
    with halves.installed(BF16):
        found = run(model, inputs()[:1])  # also where a layer is tried
        with Casts(model) as casts:
            found += run(model, inputs()[1:])
        has_twin = kind not in (InFloat32, Scaled)
        assert casts.weights == 0
        assert casts.largest <= 3 * WIDTH
    assert all(map(torch.equal, found, expected))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert layer.calls == 3 + (1 if has_twin else 3)  # a twin counts for itself
    assert type(layer) is kind
    assert (halves.num_bytes, halves.most_bytes) == (0, 2 * layer.weight.numel())


def test_what_is_converted_otherwise() -> None:
    for kind in (Experts, Gathered):
        with Casts(kind()) as casts:
            run(kind(), inputs())
        assert casts.largest >= WIDTH * WIDTH


def test_a_forward_with_a_cache_runs_once() -> None:
    layer, cache = Experts(), []
    with torch.no_grad(), torch.autocast("cpu", BF16), halves_of(nn.Sequential(layer)).installed(BF16):
        layer(inputs()[0], cache)
    assert cache == [3]


CHANGES: dict[str, Callable[[Experts], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_a_call_is_seen(change: str) -> None:
    layer = Experts()
    model = nn.Sequential(layer)
    with halves_of(model).installed(BF16):
        run(model, inputs())
        with torch.no_grad():
            CHANGES[change](layer)
        found = run(model, inputs())
    assert all(map(torch.equal, found, run(model, inputs())))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("first", [False, True])
def test_weights_that_an_adapter_computes_are_left_alone(first: bool) -> None:
    """PEFT's adapters of parameters put theirs in place of a layer's for the time of a forward."""
    layer = Experts()
    model = nn.Sequential(layer)
    with halves_of(model).installed(BF16):
        if not first:
            run(model, inputs())
        parametrize.register_parametrization(layer, "weight", Doubled())
        found = run(model, inputs())
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        found += run(model, inputs())
    expected = run(model, inputs())
    with torch.no_grad():
        layer.weight.mul_(2)
    assert all(map(torch.equal, found, run(model, inputs()) + expected))


def test_copies_that_do_not_fit_are_not_made_and_autocast_of_another_type_makes_none() -> None:
    layer = Experts()
    model, needed = nn.Sequential(layer), 2 * 2 * layer.weight.numel()
    for halves, dtype in ((halves_of(model, needed - 1), BF16), (halves_of(model, needed), torch.float16)):
        with halves.installed(dtype):
            run(model, inputs())
        assert halves.most_bytes == 0
    assert layer.calls == 6


def test_other_threads_have_their_own_layers() -> None:
    layer = Experts()
    model = nn.Sequential(layer)
    with halves_of(model).installed(BF16):
        run(model, inputs())
        assert class_of(layer) is Experts

        def train() -> None:
            with torch.autocast("cpu", BF16):
                model(inputs()[0]).sum().backward()

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("mixtral", "batched_mm"),
        ("qwen3_moe", "eager"),
        ("olmoe", "grouped_mm"),
        ("llama4_text", "eager"),
        ("jetmoe", "eager"),
    ],
)
def test_rollouts_are_the_same(kind: str, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_policies.build(kind, num_hidden_layers=2)
    model.set_experts_implementation(experts)

    def rollouts() -> Any:
        controller = FixedController(["history"], "history", 3)
        engine = engine_of(model, speculators=[HistorySpeculator()], controller=controller, audit_share=1)
        with torch.autocast("cpu", BF16):
            return engine.generate(
                [[5, 9, 2, 7, 7, 1], [3, 8, 1]], num_generations=2, max_new_tokens=10, eos_token_ids=[17], seed=1
            )

    found = rollouts()
    monkeypatch.setattr(autocast, "_SHARE", 0)
    expected = rollouts()
    assert (found.completion_ids, found.logprobs) == (expected.completion_ids, expected.logprobs)
    assert found.report.packed_bytes > expected.report.packed_bytes == 0
    assert not found.report.warnings
