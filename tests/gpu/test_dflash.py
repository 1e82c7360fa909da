"""DFlash on a device, pretended or not: the tokens of the CPU, and one wait for each draft."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from tests.dflash import head_for
from tests.gpu.engines import SAMPLINGS, engine_of, generate, num_drafted, tokens_of
from tests.models import tiny_bigram
from tests.pretend_cuda import PretendCuda

SHAPE: dict[str, Any] = {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0]}}
_WAITS = ("sync", "d2h", "d2h_async", "h2d")


def policy() -> Any:
    return tiny_bigram(vocab=128, context=128, seed=2)


def speculator(model: Any) -> DFlashSpeculator:
    return DFlashSpeculator(head_for(model, **SHAPE))


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("sampling", ["sampled", "truncated"])
def test_tokens_are_those_of_the_cpu(sampling: str, verification: str, cuda: PretendCuda) -> None:
    options = {"max_new_tokens": 4, **SAMPLINGS[sampling]}
    model = policy()
    given = speculator(model)  # handed over on the CPU
    found = generate(engine_of(cuda.move(model), given, verification=verification), **options)
    cuda.__exit__(None, None, None)
    try:
        model = policy()
        expected = generate(engine_of(model, speculator(model), verification=verification), **options)
    finally:
        cuda.__enter__()
    assert tokens_of(found) == tokens_of(expected)
    assert num_drafted(found) > 0


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_a_draft_is_fetched_once(verification: str, cuda: PretendCuda, monkeypatch: Any) -> None:
    model = policy().to(torch.bfloat16)
    monkeypatch.setattr(DFlashSpeculator, "propose", cuda.sectioned(DFlashSpeculator.propose, "propose"))
    given = DFlashSpeculator(head_for(model, **SHAPE).to(torch.bfloat16))
    generate(engine_of(cuda.move(model), given, verification=verification), max_new_tokens=6)
    events = [e for e in cuda.of(*_WAITS, section="propose") if "speculators/" in e.where or "download" in e.where]
    assert 0 < len(events) <= cuda.entered["propose"]
    assert {event.where.split(" ")[1] for event in events} == {"download"}
