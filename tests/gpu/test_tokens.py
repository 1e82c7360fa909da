"""On a GPU, here a pretended one, every arm gives the tokens that it gives on a CPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.gpu.engines import (
    ARMS,
    SAMPLINGS,
    autocast,
    calls_before_drafts,
    engine_of,
    generate,
    num_drafted,
    policy,
    tokens_of,
)
from tests.models import FACTORIES
from tests.pretend_cuda import PretendCuda


def same(module):
    return module


def assert_same_tokens(cuda, make, calls=1, **options):
    """`make(move)` is an engine whose modules went through `move`."""
    found = generate(make(cuda.move), calls, max_new_tokens=4, **options)
    cuda.__exit__(None, None, None)
    try:
        expected = generate(make(same), calls, max_new_tokens=4, **options)
    finally:
        cuda.__enter__()
    assert tokens_of(found) == tokens_of(expected)
    return found


CASES = [
    *((arm, "invariant", "sampled") for arm in ARMS),
    *((arm, "rejection", "sampled") for arm in ("history", "recurrent", "eagle3", "draft_lm")),
    ("history", "invariant", "penalty"),
    ("recurrent", "invariant", "truncated"),
    ("eagle3", "rejection", "truncated"),
    ("draft_lm", "invariant", "penalty"),
    ("fp4_self", "rejection", "greedy"),
]


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize(("arm", "verification", "sampling"), CASES)
def test_of_every_arm(arm, verification, sampling, cuda):
    def make(move):
        return engine_of(move(policy()), ARMS[arm](move), verification=verification, max_batch_size=4)

    found = assert_same_tokens(cuda, make, 1 + calls_before_drafts(arm), **SAMPLINGS[sampling])
    assert cuda.count("triton", section="step")
    assert (num_drafted(found) > 0) == (arm != "plain")


@pytest.mark.parametrize("family", FACTORIES)
def test_of_every_family(family, cuda):
    assert_same_tokens(cuda, lambda move: engine_of(move(FACTORIES[family](vocab=128))))


def lora():
    torch.manual_seed(1)
    model = get_peft_model(policy(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.eval()


POLICIES = {
    "bf16": lambda: policy(torch.bfloat16),
    "LoRA": lora,
    "autocast": lambda: autocast(policy()),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_of_policies_as_they_are_trained(kind, cuda):
    assert_same_tokens(cuda, lambda move: engine_of(move(POLICIES[kind]()), ARMS["fp4_self"](move)))


def test_the_audit_agrees(cuda):
    outputs = generate(engine_of(cuda.move(policy()), ARMS["history"](cuda.move), audit_share=1.0), max_new_tokens=3)
    report = outputs[0].report
    assert report.num_audited_tokens > 0
    assert not report.warnings


def test_interpreted_kernels_give_them_too():
    """Elsewhere in these tests their references stand for them."""
    with PretendCuda(kernels="interpreted") as cuda:
        cuda_engine = engine_of(cuda.move(policy()), ARMS["eagle3"](cuda.move))
        found = tokens_of(generate(cuda_engine, max_new_tokens=2))
    assert found == tokens_of(generate(engine_of(policy(), ARMS["eagle3"](same)), max_new_tokens=2))
