"""The pretended GPU itself (tests/pretend_cuda): it refuses what CUDA refuses, and records who waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from triton import language as tl

from atlas_kernels.noise import request_keys
from atlas_kernels.verify import verify
from tests.pretend_cuda import CudaTensor, PretendCuda


def test_refuses_what_cuda_refuses():
    with PretendCuda():
        x, host = torch.zeros(3, device="cuda"), torch.ones(3)
        assert isinstance(x, CudaTensor)
        assert x.device.type == "cuda"
        for wrong, message in (
            (lambda: x.numpy(), "can't convert cuda:0"),
            (lambda: np.asarray(x), "can't convert cuda:0"),
            (lambda: x + host, "same device"),
            (lambda: torch.cat([x, host]), "same device"),
            (lambda: host[x.long()], "indices should be either on cpu"),
            (lambda: x.__setitem__(torch.tensor([0, 1]), host[:2]), "same device"),
            (lambda: torch.nn.functional.linear(x, torch.ones(2, 3)), "same device"),
        ):
            with pytest.raises((RuntimeError, TypeError), match=message):
                wrong()
        assert (x + 1.0).cpu().tolist() == [1.0] * 3
        assert x[torch.tensor([0, 1])].shape == (2,)  # indices of the host are copied
        assert (x + torch.tensor(2.0)).sum().item() == 6.0  # a number of the host is no tensor


def staged(x):
    """A copy through a part of a pinned buffer, as a step uploads what changes."""
    buffer = torch.empty(8, pin_memory=True)
    buffer[:4].copy_(torch.arange(4.0))
    return buffer[:4].to("cuda", non_blocking=True)


RECORDED = [
    (lambda x: x.sum().item(), "sync"),
    (lambda x: x[x > 1], "sync"),
    (lambda x: bool((x > 1).any()), "sync"),
    (lambda x: x.cpu(), "d2h"),
    (lambda x: x.tolist(), "d2h"),
    (lambda x: torch.tensor([1.0], device="cuda"), "h2d"),
    (lambda x: torch.ones(2).to("cuda", non_blocking=True), "h2d"),  # pageable memory
    (lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True), "h2d_async"),
    (staged, "h2d_async"),
    (lambda x: x.to("cpu", non_blocking=True), "d2h_async"),
    (lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True), "d2h_async"),
    (lambda x: torch.cuda.Event().synchronize(), "sync"),
    (lambda x: torch.cuda.current_stream().synchronize(), "sync"),
    (lambda x: x.masked_fill(x > 1, 0.0), "launch"),
]


@pytest.mark.parametrize(("what", "kind"), RECORDED)
def test_records_who_waits(what, kind):
    with PretendCuda() as device:
        x = torch.arange(4.0, device="cuda")
        device.events.clear()
        what(x)
        waits = [event.kind for event in device.events if event.kind not in ("launch", "triton")]
        assert waits == ([] if kind == "launch" else [kind])
        assert device.count(kind)


def test_what_is_copied_arrives():
    with PretendCuda():
        x = staged(None)
        assert x.cpu().tolist() == [0, 1, 2, 3]
        back = torch.empty(4, pin_memory=True).copy_(x + 1, non_blocking=True)
        assert back.tolist() == [1, 2, 3, 4]


def test_views_start_nothing_and_waits_can_be_forbidden():
    with PretendCuda() as device:
        x = torch.arange(4.0, device="cuda")
        device.events.clear()
        x[1:].view(3, 1)
        assert not device.events
        with device.forbidding("sync"), pytest.raises(AssertionError, match="sync on the device"):
            x.max().item()


def test_gradients_are_those_of_the_cpu():
    layer, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    layer(x).square().mean().backward()
    with PretendCuda() as device:
        moved = device.move(torch.nn.Linear(3, 2))
        moved.load_state_dict(layer.state_dict())
        moved(x.to("cuda")).square().mean().backward()
        assert torch.equal(moved.weight.grad.cpu(), layer.weight.grad)


@triton.jit
def fill(first, second):
    """Two pointers."""
    tl.store(first, 1.0)


def verified(**options):
    with PretendCuda(**options) as device:
        logits = 3 * torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
        drafts, starts = torch.tensor([3, -1, 7, -1]), torch.tensor([0, 2, 4])
        keys, positions = torch.from_numpy(request_keys(0, 4).view(np.int64)), torch.arange(4)
        found = verify(*(tensor.to("cuda") for tensor in (logits, drafts, starts, keys, positions)))
        names = ("token_ids", "num_accepted", "logprobs", "entropies", "max_probs")
        return [getattr(found, name).cpu() for name in names], [(e.kind, e.what, e.count) for e in device.events]


def test_kernels_are_launched_as_if_they_were_interpreted():
    """What stands for a kernel computes as it does and is recorded like it."""
    values, events = verified()
    interpreted, same = verified(kernels="interpreted")
    assert events == same
    assert ("triton", "choose_splits", 1) in events
    for value, other in zip(values, interpreted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_kernels_refuse_tensors_of_the_host():
    with PretendCuda():
        fill[(1,)](torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda"))
        with pytest.raises(ValueError, match="cannot be accessed from Triton"):
            fill[(1,)](torch.zeros(2, device="cuda"), torch.zeros(2))


def test_nothing_is_left_behind():
    before = torch.cuda.synchronize, torch.cuda.is_available(), torch.cuda.Event
    with PretendCuda():
        pass
    assert (torch.cuda.synchronize, torch.cuda.is_available(), torch.cuda.Event) == before
    assert torch.ones(2).numpy().sum() == 2
