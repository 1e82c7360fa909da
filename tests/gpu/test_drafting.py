"""Drafting on a pretended GPU: few launches, one download per draft, and the tokens that a CPU draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.core import SamplingParams
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.speculators.drawing import Drawing
from tests.gpu.test_pretend_cuda import ARMS, engine, generate, policy
from tests.pretend_cuda import PretendCuda
from tests.verification import VOCAB, case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAUNCHES = {"history": 40, "recurrent": 40, "eagle3": 150, "draft_lm": 400, "fp4_self": 400}
"""Most launches per decode step beside the policy's forward, at three drafted tokens, averaged over a short call."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pretended GPU, and how often steps were taken and drafts made; events of them are in sections of that name."""
    calls: Counter[str] = Counter()

    def count(device: PretendCuda, owner: type, method: str, name: str) -> None:
        inner = device.sectioned(getattr(owner, method), name)

        def called(self: Any, *args: Any) -> Any:
            calls[name] += 1
            return inner(self, *args)

        monkeypatch.setattr(owner, method, called)

    with PretendCuda() as device:
        count(device, DecodeLoop, "step", "step")
        count(device, DecodeLoop, "forward", "forward")
        for arm in ARMS.values():
            count(device, type(arm(lambda module: module)), "propose", "propose")
        yield device, calls


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("arm", LAUNCHES)
def test_a_step_has_its_budget(arm: str, verification: str, counted: Any) -> None:
    device, calls = counted
    own = engine(device.move(policy()), ARMS[arm](device.move), audit_share=0, verification=verification)
    if arm == "recurrent":  # which drafts nothing before its first refresh
        generate(own, calls=1, temperature=0.8)
        device.events.clear()
        calls.clear()
    generate(own, calls=1, temperature=0.8)
    launches = sum(device.count("launch", "triton", section=name) for name in ("step", "propose"))
    # Probabilities of drafts that are kept for rejection are written, merged and gathered.
    budget = LAUNCHES[arm] * (1.1 if verification == "rejection" else 1)
    assert launches <= budget * calls["step"], device.table("launch", section="propose", per=calls["step"])
    assert not [event for event in device.events if event.kind == "launch" and "noise.py" in event.where]
    # However many tokens a draft has, it is fetched at once. A copy looks at its weights once per policy update.
    drafting = [
        event for event in device.events if event.section == "propose" and "atlas_rl/speculators/" in event.where
    ]
    waits = [e for e in drafting if e.kind in ("sync", "d2h", "d2h_async") and "fp4_self/copy.py" not in e.where]
    assert len(waits) <= calls["propose"]
    assert len(waits) == 0 if arm == "history" else waits
    assert not [event for event in drafting if event.kind == "h2d" and "fp4_self/copy.py" not in event.where]


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "truncated": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.2},
    "penalty": {"repetition_penalty": 1.4, "temperature": 0.8},
}


def drawn(
    device: torch.device, form: str, *, couples_noise: bool, reduced: bool, depths: np.ndarray, argmax: bool
) -> Any:
    sampling = SamplingParams(max_new_tokens=9, **FORMS[form])
    _, _, sequences, requests = case([0] * len(depths), sampling, with_probs=False)
    token_ids = torch.arange(1, VOCAB, 3) if reduced else None
    drawing = Drawing(
        "a",
        sequences,
        requests,
        depths,
        device,
        couples_noise=couples_noise,
        token_ids=None if token_ids is None else token_ids.to(device),
        argmax=argmax,
    )
    for position, rows in enumerate(drawing.rows):
        generator = torch.Generator().manual_seed(position)
        logits = 3 * torch.randn(len(depths), VOCAB if token_ids is None else len(token_ids), generator=generator)
        going_on = drawing.draw(logits[torch.from_numpy(rows)].to(device))
        assert going_on.device.type == device.type
    return drawing.finish(depths)


@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize("depths", [[3, 3, 3], [1, 4, 0, 2]])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("couples_noise", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_draws_what_a_cpu_draws(
    form: str, couples_noise: bool, reduced: bool, depths: list[int], argmax: bool
) -> None:
    options = {"couples_noise": couples_noise, "reduced": reduced, "depths": np.array(depths), "argmax": argmax}
    here = drawn(CPU, form, **options)
    with PretendCuda() as device:
        there = drawn(CUDA, form, **options)
        # One upload of the noise, one of the prefixes, neither waited for; token ids of the test itself.
        assert device.count("h2d") <= reduced + len(here.token_ids[0])
        assert device.count("d2h", "sync") == 1
        probs = None if there.draft_probs is None else there.draft_probs.cpu()
    assert np.array_equal(here.lengths, there.lengths)
    for row, length in enumerate(depths):
        assert here.token_ids[row, :length].tolist() == there.token_ids[row, :length].tolist()
    np.testing.assert_allclose(here.confidence, there.confidence, rtol=1e-5)
    assert (probs is None) == couples_noise
    if probs is not None:
        torch.testing.assert_close(probs, here.draft_probs, rtol=1e-5, atol=1e-7)
        for row, length in enumerate(depths):
            torch.testing.assert_close(probs[row, :length].sum(dim=-1), torch.ones(length), rtol=1e-4, atol=1e-4)
            assert (probs[row, range(length), here.token_ids[row, :length]] > 0).all()


def test_the_interpreted_kernels_draw_it_too() -> None:
    for reduced in (False, True):
        options = {"couples_noise": True, "reduced": reduced, "depths": np.array([2, 1]), "argmax": False}
        here = drawn(CPU, "cold", **options)
        with PretendCuda(interpret=True) as device:
            there = drawn(CUDA, "cold", **options)
            assert device.count("triton") == 4
        assert here.token_ids.tolist() == there.token_ids.tolist()
