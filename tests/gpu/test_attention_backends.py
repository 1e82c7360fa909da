"""Nothing in a decode step is planned by cuDNN, whoever attends; and its switch is everybody's own again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy import attention_backends
from atlas_rl.policy.attention_backends import attend, without_cudnn
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from tests.engines import engine_of
from tests.gpu.engines import eagle3_head
from tests.models import tiny_bigram
from tests.pretend_cuda import PretendCuda

VOCAB, CUDNN, MATH = 128, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH


def policy(layers=2):
    return tiny_bigram(vocab=VOCAB, context=128, layers=layers, seed=2).to(torch.bfloat16)


ARMS = {
    "none": lambda move: None,
    "eagle3": lambda move: Eagle3Speculator(move(eagle3_head().to(torch.bfloat16))),
    "draft_lm": lambda move: DraftLM(move(policy(layers=1)), VOCAB),
}


def query(dtype=torch.float32, device="cpu"):
    return torch.ones(1, 2, 4, 8, dtype=dtype, device=device)


@pytest.mark.parametrize("arm", ARMS)
def test_no_attention_goes_to_cudnn(arm):
    with PretendCuda() as cuda:
        speculator = ARMS[arm](cuda.move)
        options = {"speculation": False}
        if speculator is not None:
            names = [speculator.name]
            options = {"speculators": [speculator], "controller": FixedController(names, speculator.name, 3)}
        engine = engine_of(cuda.move(policy()), audit_share=1, **options)
        engine.generate([[5, 9, 2, 7, 7, 1], [3, 8, 1]], max_new_tokens=4, eos_token_ids=[17], temperature=0)
    attended = [event.what for event in cuda.events if event.what.startswith(("sdpa ", "_flash"))]
    assert {"sdpa flash", "_flash_attention_forward"} <= set(attended)  # the audit, and what generates
    assert "sdpa cudnn" not in attended
    assert not [event for event in cuda.events if "cuDNN" in event.what]


@pytest.mark.parametrize("backends", [[CUDNN], [CUDNN, SDPBackend.FLASH_ATTENTION], [MATH], [CUDNN, MATH]], ids=str)
def test_what_the_caller_allows_is_allowed_again_afterwards(backends):
    with sdpa_kernel(backends):
        before = set(_cur_sdpa_kernel_backends())
        with without_cudnn():
            inside = set(_cur_sdpa_kernel_backends())
            with without_cudnn():
                assert set(_cur_sdpa_kernel_backends()) == inside
            assert set(_cur_sdpa_kernel_backends()) == inside
        assert set(_cur_sdpa_kernel_backends()) == before
    assert CUDNN not in inside
    assert MATH in inside  # which takes every input
    if MATH in before:
        assert inside == before - {CUDNN}  # what is forbidden stays so


def test_an_error_leaves_the_switch_as_it_was():
    before = set(_cur_sdpa_kernel_backends())
    with PretendCuda(), pytest.raises(RuntimeError):
        attend(query(device="cuda"), query(device="cuda")[..., :4], query(device="cuda"), scale=None)
    assert set(_cur_sdpa_kernel_backends()) == before


def test_what_another_thread_chooses_meanwhile_stays():
    with sdpa_kernel([CUDNN, MATH]):  # put back at the end, whatever happens here
        with without_cudnn():
            other = sdpa_kernel([CUDNN])
            other.__enter__()
        assert _cur_sdpa_kernel_backends() == [CUDNN]
        other.__exit__(None, None, None)


def test_on_a_cpu_no_switch_is_touched(monkeypatch):
    monkeypatch.setattr(attention_backends, "without_cudnn", lambda: pytest.fail("touched"))
    assert torch.equal(attend(query(), query(), query(), scale=None, causal=True), query())
