"""Drafting on a pretended GPU: few launches, one download per draft, and the tokens that a CPU draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.core import SamplingParams
from atlas_rl.speculators.drawing import Drawing
from tests.gpu.counts import counts_of
from tests.gpu.engines import ARMS, calls_before_drafts, engine_of, generate, policy
from tests.pretend_cuda import PretendCuda
from tests.verification import VOCAB, case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
_WAITS = ("sync", "d2h", "d2h_async", "h2d")
# Launches per step beside the policy's forward: no more than where noise is shared, though probabilities are kept.
LAUNCHES_OF = {"recurrent": 40, "eagle3": 150, "draft_lm": 400, "fp4_self": 400}
WAITS = 3  # the policy's forward, the step's outcome and the draft


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("arm", LAUNCHES_OF)
def test_launches_and_waits_under_rejection(arm: str) -> None:
    counts = counts_of(arm, verification="rejection", max_new_tokens=6, temperature=0.8)
    assert counts.beside <= LAUNCHES_OF[arm]
    assert counts.waits <= WAITS, counts.table


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("arm", LAUNCHES_OF)
def test_a_draft_is_fetched_once(arm: str, verification: str, cuda: PretendCuda, monkeypatch: Any) -> None:
    """However many tokens it has, and whatever else is known beforehand goes up without a wait."""
    speculator = ARMS[arm](cuda.move)
    assert speculator is not None
    monkeypatch.setattr(type(speculator), "propose", cuda.sectioned(type(speculator).propose, "propose"))
    own = engine_of(cuda.move(policy()), speculator, verification=verification)
    generate(own, calls_before_drafts(arm) + 1, max_new_tokens=6)
    events = [e for e in cuda.of(*_WAITS, section="propose") if "speculators/" in e.where or "download" in e.where]
    drafts = cuda.entered["propose"]
    assert 0 < len(events) <= drafts
    assert {event.where.split(" ")[1] for event in events} == {"download"}


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
        with PretendCuda(kernels="interpreted") as device:
            there = drawn(CUDA, "cold", **options)
            assert device.count("triton") == 4
        assert here.token_ids.tolist() == there.token_ids.tolist()
