"""Norms, rotations and stores in one pass: kernels and compiled loops against torch's operations, rounding included."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels.layer import gated, rms_norm, rotate, store
from atlas_kernels.layer_cpu import add_and_norm, rotate_in_place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_close(kernel, reference, rounded_to):
    """The same up to the order of a sum, and what is in half precision: few numbers may be rounded the other way.

    Triton's interpreter cuts bfloat16 off where a GPU rounds it. There float16 has to show that rounding is in its place.
    """
    assert kernel.dtype == reference.dtype
    assert kernel.shape == reference.shape
    cut_off, reference = rounded_to == torch.bfloat16 and DEVICE == "cpu", reference.float()
    apart = (kernel.float() - reference).abs()
    size = reference.abs().max() if cut_off else reference.abs()
    assert (apart <= 2 * torch.finfo(rounded_to).eps * size + 1e-7).all()
    if rounded_to != torch.float32 and not cut_off:
        assert (apart > 0).float().mean() < 0.02


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("adds_one", "rounds_first"), [(False, True), (False, False), (True, False)])
def test_norm_kernel_is_the_reference(dtype, weight_type, adds_one, rounds_first):
    pytest.importorskip("triton", reason="the kernels need Triton")
    x, weight = 3 * numbers(2, 5, 200, dtype=dtype), 1 + numbers(200, dtype=weight_type, seed=1)
    form = {"adds_one": adds_one, "rounds_first": rounds_first}
    kernel, reference = (rms_norm(x, weight, 1e-5, **form, implementation=i) for i in ("triton", "reference"))
    assert_close(kernel, reference, dtype)


def test_norm_rounds_where_llama_rounds():
    """The two ways differ in bfloat16, so that the comparison above can fail."""
    x, weight = 3 * numbers(40, 256, dtype=torch.bfloat16), 1 + numbers(256, dtype=torch.bfloat16, seed=1)
    first, last = (rms_norm(x, weight, 1e-5, rounds_first=each, implementation="reference") for each in (True, False))
    assert (first != last).float().mean() > 0.1


@pytest.mark.parametrize(("dtype", "angles"), [*zip(TYPES, TYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 20)])
def test_rotation_kernel_is_the_reference(dtype, angles, heads, kv_heads, dim):
    pytest.importorskip("triton", reason="the kernels need Triton")
    query, key = numbers(3, heads, dim, dtype=dtype), numbers(3, kv_heads, dim, dtype=dtype, seed=1)
    cos, sin = (numbers(3, dim, dtype=angles, seed=seed).clamp(-1, 1) for seed in (2, 3))
    kernel, reference = (rotate(query, key, cos, sin, implementation=i) for i in ("triton", "reference"))
    for ours, theirs in zip(kernel, reference, strict=True):
        assert_close(ours, theirs, ours.dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TYPES)
def test_gate_kernel_is_the_reference(dtype, activation):
    """Near 0 torch's own `gelu` loses what a sum of 1 and nearly -1 loses: so it is compared by the size of the largest."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    gate, up = 3 * numbers(2, 7, 130, dtype=dtype), numbers(2, 7, 130, dtype=dtype, seed=1)
    kernel, reference = (gated(gate, up, activation, implementation=i) for i in ("triton", "reference"))
    assert (kernel.dtype, kernel.shape) == (dtype, gate.shape)
    apart, size = (kernel.float() - reference.float()).abs(), reference.float().abs()
    cut_off = dtype == torch.bfloat16 and DEVICE == "cpu"
    bound = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (apart <= bound * (size.max() if cut_off or dtype == torch.float32 else size) + 1e-5).all()


def test_the_activations_differ():
    """So that the comparison above can fail."""
    gate, up = numbers(4, 64), numbers(4, 64, seed=1)
    assert (gated(gate, up, "silu") - gated(gate, up, "gelu_tanh")).abs().max() > 0.05


@pytest.mark.parametrize("dtype", TYPES)
def test_store_kernel_is_the_reference(dtype):
    pytest.importorskip("triton", reason="the kernels need Triton")
    rows, cells = torch.tensor([2, 0, 2], device=DEVICE), torch.tensor([1, 4, 0], device=DEVICE)
    key, value = numbers(3, 2, 6, dtype=dtype), numbers(3, 2, 700, dtype=dtype, seed=1)
    caches = []
    for implementation in ("triton", "reference"):
        keys = torch.zeros(3, 5, *key.shape[1:], dtype=dtype, device=DEVICE)
        values = torch.zeros(3, 7, *value.shape[1:], dtype=dtype, device=DEVICE)
        store(keys, values, key, value, rows, cells, implementation)
        caches.append((keys, values))
    assert torch.equal(caches[0][0], caches[1][0])
    assert torch.equal(caches[0][1], caches[1][1])
    assert torch.equal(caches[0][1][0, 4], value[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
@pytest.mark.parametrize("adds_one", [False, True])
def test_norm_on_a_cpu_is_the_reference(adds_one):
    x, weight = 3 * numbers(1, 9, 576), 1 + numbers(576, seed=1)
    compiled, reference = (
        rms_norm(x, weight, 1e-5, adds_one=adds_one, implementation=i) for i in ("auto", "reference")
    )
    assert_close(compiled, reference, torch.float32)


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
def test_a_norm_on_a_cpu_leaves_the_weights_storage_to_its_owner():
    """FSDP frees what it gathered by resizing it to nothing."""
    weight = torch.ones(16)
    rms_norm(torch.ones(3, 16), weight, 1e-6)
    weight.untyped_storage().resize_(0)


def test_rotation_on_a_cpu_is_the_reference_to_the_bit():
    query, key, cos, sin = numbers(5, 9, 64), numbers(5, 3, 64, seed=1), numbers(5, 64, seed=2), numbers(5, 64, seed=3)
    compiled, reference = (rotate(query, key, cos, sin, implementation=i) for i in ("auto", "reference"))
    assert torch.equal(compiled[0], reference[0])
    assert torch.equal(compiled[1], reference[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "tokens"), [(9, 3, 64, 5), (4, 4, 20, 1), (2, 1, 6, 0)])
def test_a_rotation_in_place_is_the_reference_to_the_bit(heads, kv_heads, dim, tokens):
    query, key = numbers(tokens, heads, dim).cpu(), numbers(tokens, kv_heads, dim, seed=1).cpu()
    cos, sin = (numbers(tokens, dim, seed=seed).cpu().clamp(-1, 1) for seed in (2, 3))
    expected = rotate(query, key, cos, sin, implementation="reference")
    rotate_in_place(query.view(tokens, heads * dim), key.view(tokens, kv_heads * dim), cos, sin, dim)
    assert torch.equal(query, expected[0])
    assert torch.equal(key, expected[1])


@pytest.mark.parametrize("adds_one", [False, True])
def test_a_norm_of_a_sum_adds_and_is_the_norm_of_the_result(adds_one):
    x, to, weight = numbers(7, 33).cpu(), numbers(7, 33, seed=1).cpu(), numbers(33, seed=2).cpu()
    total = x + to
    out = add_and_norm(x, to, weight, 1e-5, adds_one)
    assert torch.equal(to, total)
    assert torch.equal(out, rms_norm(total, weight, 1e-5, adds_one=adds_one))
    assert torch.equal(x, numbers(7, 33).cpu())


def test_a_row_does_not_depend_on_the_others():
    """A token's numbers are the same in a plain step and among verified drafts."""
    x, weight = numbers(33, 576), numbers(576, seed=1)
    whole = rms_norm(x, weight, 1e-5)
    assert all(torch.equal(whole[row], rms_norm(x[row : row + 1], weight, 1e-5)[0]) for row in range(33))


@pytest.mark.parametrize("broken", ["columns", "strides", "type"])
def test_a_norm_that_does_not_fit_is_refused(broken):
    x, weight = numbers(4, 8), numbers(8)
    x, weight = {"columns": (x, weight[:7]), "strides": (x.t(), weight[:4]), "type": (x.double(), weight)}[broken]
    with pytest.raises(ValueError, match="one number per column"):
        rms_norm(x, weight, 1e-5)


def test_a_rotation_that_does_not_fit_is_refused():
    query, angles = numbers(3, 2, 8), numbers(3, 8)
    for key, cos in ((query[:2], angles), (query[..., :6], angles), (query, angles[:, :4]), (query.half(), angles)):
        with pytest.raises(ValueError, match="query and key must be"):
            rotate(query, key, cos, cos)


def test_a_store_that_does_not_fit_is_refused():
    cache, new, places = numbers(2, 4, 1, 8), numbers(3, 1, 8), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for keys, key in ((cache, new[:2]), (cache, new[..., :4]), (cache, new.half()), (cache.transpose(0, 1), new)):
        with pytest.raises(ValueError, match="keys and values must be"):
            store(keys, cache, key, new, places, places)


def test_a_gate_that_does_not_fit_is_refused():
    gate = numbers(3, 8)
    for up, activation in ((gate[:2], "silu"), (gate.half(), "silu"), (numbers(8, 3).t(), "silu"), (gate, "relu")):
        with pytest.raises(ValueError, match="gate and up must be"):
            gated(gate, up, activation)
