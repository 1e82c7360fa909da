"""Kernels are compiled for the types that calls have, whatever type and device a process makes its tensors with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from atlas_kernels.draft_head import draft_head
from atlas_rl.core import SamplingParams
from atlas_rl.decode import compile_kernels
from atlas_rl.policy import linear_routes
from atlas_rl.policy.view import InProcessView
from atlas_rl.sampling import by_kernels
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.verification import DrafterInvariant, RejectionSampling, Verifier
from atlas_rl.speculators import head_sampling
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.recurrent import speculator as recurrent
from tests.drafters import recurrent_drafter
from tests.models import tiny_bigram
from tests.speculators.eagle3_adaptive.engines import policy, static_head

CPU, VOCAB = torch.device("cpu"), 64
SAMPLINGS = {
    "plain": SamplingParams(max_new_tokens=8),
    "truncated": SamplingParams(max_new_tokens=8, temperature=0.8, top_k=5, top_p=0.9),
}
DRAFTERS: dict[str, Callable[[], Speculator]] = {
    "recurrent": recurrent_drafter,
    "draft_lm": lambda: DraftLM(tiny_bigram(layers=1, seed=12), VOCAB),
    "eagle3": lambda: Eagle3Speculator(static_head()),
    "fp4_self": Fp4SelfSpeculator,
}


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def of_another_type(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def on_another_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_kernels_of_a_cpu(of_another_type: torch.dtype) -> None:
    torch.set_default_dtype(of_another_type)
    compile_kernels._run_all()


@pytest.mark.usefixtures("on_another_device")
def test_kernels_of_a_cpu_beside_another_device() -> None:
    compile_kernels._run_all()
    assert linear_routes._can_pack.__wrapped__(torch.float32) == linear_routes._can_pack(torch.float32)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("form", [DrafterInvariant, RejectionSampling])
def test_kernels_of_verification(
    form: type[Verifier], sampling: str, of_another_type: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    seen = []
    for name in ("verify", "verify_by_rejection"):
        kernel = getattr(by_kernels, name)

        def called(*rows: torch.Tensor, kernel: Callable = kernel, **options: object) -> object:
            probs = options.get("draft_probs")
            seen.extend(rows[:1] if probs is None else [rows[0], probs])
            return kernel(*rows, **options)

        monkeypatch.setattr(by_kernels, name, called)
    torch.set_default_dtype(of_another_type)
    FusedVerifier(form(), implementation="triton").compile_for(SAMPLINGS[sampling], VOCAB, CPU)
    assert {tensor.dtype for tensor in seen} == {torch.float32}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_kernels_of_drafters(
    name: str, sampling: str, of_another_type: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    seen = []

    def called(weights: object, state: torch.Tensor, *rest: object, **options: object) -> object:
        drafted = draft_head(weights, state, *rest, implementation="triton", **options)
        seen.extend([state.dtype, drafted.confidence.dtype])
        return drafted

    monkeypatch.setattr(head_sampling, "draft_head", called)
    monkeypatch.setattr(recurrent, "kernels_run_on", lambda device: True)
    speculator, model = DRAFTERS[name](), policy()
    torch.set_default_dtype(of_another_type)
    speculator.bind(InProcessView(model), couples_noise=True)
    speculator.compile_for(SAMPLINGS[sampling])
    assert set(seen) == ({torch.float32} if name == "recurrent" else set())
