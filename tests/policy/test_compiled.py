"""Policies under torch.compile: rollouts run the modules' own code, and training what is compiled."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from atlas_rl.policy.compiled import uncompiled
from tests.models import tiny_llama
from tests.policy.texts import generate, plain


class Counted:
    """A backend of torch.compile that counts what it compiles and what it runs."""

    def __init__(self) -> None:
        self.compiled, self.runs = 0, 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def layers_in_place(model: Any, backend: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def layers_wrapped(model: Any, backend: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend=backend)
    return model


WAYS = {
    "in place": in_place,
    "wrapped": lambda model, backend: torch.compile(model, backend=backend),
    "layers in place": layers_in_place,
    "layers wrapped": layers_wrapped,
    "in a parallel wrapper": lambda model, backend: nn.DataParallel(torch.compile(model, backend=backend)),
}


@pytest.fixture(autouse=True)
def compiled_anew() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_rollouts_run_what_was_compiled_uncompiled(way: str, training: bool) -> None:
    backend, expected = Counted(), plain(tiny_llama(seed=3))
    model = WAYS[way](tiny_llama(seed=3).train(training), backend)
    assert generate(model, speculation=True, audit_share=1) == expected
    assert not backend.compiled
    if way != "in a parallel wrapper":  # which wants a GPU
        model(input_ids=torch.tensor([[3, 5, 7]]))
        assert backend.runs


def test_other_threads_run_what_is_compiled() -> None:
    backend = Counted()
    model = layers_wrapped(in_place(tiny_llama(seed=3), backend), backend)
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad(), uncompiled(model):
        model(input_ids=ids)
        assert not backend.runs
        other = threading.Thread(target=lambda: model(input_ids=ids))
        other.start()
        other.join()
        assert backend.runs


def test_a_hook_on_the_wrapper_is_refused() -> None:
    model = torch.compile(tiny_llama(seed=3), backend="eager")
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hook"):
        generate(model)
