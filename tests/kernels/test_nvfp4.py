"""NVFP4: the formats bit for bit against their definitions, kernel and reference alike, and the linear layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels.nvfp4 import NVFP4Weight, dequantize, linear, quantize, tensor_scale_for
from atlas_kernels.nvfp4_reference import e2m1_codes

triton = pytest.importorskip("triton", reason="the kernels need Triton")
tl = pytest.importorskip("triton.language")
nvfp4_triton = pytest.importorskip("atlas_kernels.nvfp4_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ONE = torch.ones((), device=DEVICE)


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, as trained layers have them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(shape[0], 1, generator=generator).exp()
    return (0.02 * sizes * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def assert_same(weight: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> NVFP4Weight:
    """The kernel's quantized weight, once it is found to be the reference's, bit for bit."""
    kernel = quantize(weight, tensor_scale, implementation="triton")
    reference = quantize(weight, tensor_scale, implementation="reference")
    assert torch.equal(kernel.packed, reference.packed)
    assert torch.equal(kernel.scales.view(torch.uint8), reference.scales.view(torch.uint8))
    assert torch.equal(kernel.amax, reference.amax)
    return kernel


def nearest_even(value: float) -> float:
    """The nearest E2M1 magnitude by its definition: at a tie the one whose last bit is zero."""
    return min(E2M1, key=lambda x: (abs(x - value), E2M1.index(x) % 2))


# ----------------------------------------------------------------------------------------------------------- formats


def test_e2m1_codes_round_to_nearest_even_and_saturate():
    values = np.concatenate([np.arange(0, 8, 1 / 64), np.nextafter(np.array([0.25, 0.75, 5.0], np.float32), 9)])
    codes = e2m1_codes(torch.from_numpy(values).float()).tolist()
    assert [E2M1[code] for code in codes] == [nearest_even(value) for value in values.astype(np.float32)]
    assert e2m1_codes(torch.tensor([-0.6, -100.0, -0.0, -0.1])).tolist() == [9, 15, 0, 8]


@triton.jit
def convert(x, codes, values, N: tl.constexpr):
    i = tl.arange(0, N)
    code = nvfp4_triton.e4m3_code(tl.load(x + i))
    tl.store(codes + i, code)
    tl.store(values + i, nvfp4_triton.e4m3_value(code.to(tl.int16)).to(tl.float32) * 256.0)


def test_e4m3_by_integers_is_torchs_conversion():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    middles = (every[1:] + every[:-1]) / 2
    around = [torch.nextafter(middles, torch.tensor(bound)) for bound in (0.0, 1e9)]
    x = torch.cat([every, middles, *around])
    x = torch.nn.functional.pad(x, (0, 512 - len(x))).to(DEVICE)
    codes, values = torch.empty(512, dtype=torch.int32, device=DEVICE), torch.empty(512, device=DEVICE)
    convert[(1,)](x, codes, values, N=512)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(codes.to(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(values, expected.float())


def test_every_representable_weight_survives():
    """All products of an E2M1 value and an E4M3 scale, each block with a six, so that its scale is found again."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.tensor([*E2M1, *(-x for x in E2M1)])
    weight = (scales[:, None] * values).to(DEVICE)
    quantized = assert_same(weight, ONE)
    assert torch.equal(dequantize(quantized), weight)
    assert torch.equal(quantized.scales.float()[:, 0].cpu(), scales)
    assert not quantized.saturated


def test_the_low_four_bits_are_the_even_input():
    quantized = assert_same(torch.tensor([[6.0, -0.5, *[0.0] * 14]], device=DEVICE), ONE)
    assert quantized.packed[0].tolist() == [0x97, *[0] * 7]


# ---------------------------------------------------------------------------------------------------------- quantizer


@pytest.mark.parametrize("shape", [(1, 1), (1, 15), (3, 16), (7, 17), (9, 529), (41, 401)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_are_the_reference_bit_for_bit(shape, dtype):
    weight = random_weight(shape, dtype, seed=shape[1])
    quantized = assert_same(weight)
    restored = dequantize(quantized)
    assert restored.shape == weight.shape
    # Half the widest step (4 to 6) in units of the block's largest magnitude, and the scale's own rounding (1/16).
    blocks = torch.nn.functional.pad(weight.float(), (0, -shape[1] % 16)).view(shape[0], -1, 16).abs().amax(-1)
    bound = blocks.repeat_interleave(16, dim=1)[:, : shape[1]] * (1 / 6 * 1.0625 + 1 / 16)
    assert ((restored - weight.float()).abs() <= bound + quantized.tensor_scale * 2**-9 * 6).all()


def test_blocks_of_zeros_and_a_weight_of_zeros():
    weight = random_weight((4, 64))
    weight[1:3, 16:48] = 0
    restored = dequantize(assert_same(weight))
    assert (restored[1:3, 16:48] == 0).all()
    assert torch.equal(dequantize(assert_same(torch.zeros(3, 20, device=DEVICE))), torch.zeros(3, 20, device=DEVICE))


@pytest.mark.parametrize("size", [3e38, 1e-34, 1e-45])
def test_extreme_magnitudes_stay_finite(size):
    weight = torch.zeros(2, 32, device=DEVICE)
    weight[0, 3], weight[1, 20] = size, -size
    restored = dequantize(assert_same(weight))
    assert restored.isfinite().all()
    assert (restored[weight == 0] == 0).all()
    if size > 1e-40:  # below, steps are float32 numbers without all their bits
        torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)


def test_a_block_far_below_the_largest_vanishes_and_one_above_saturates():
    weight = torch.zeros(1, 32, device=DEVICE)
    weight[0, 0], weight[0, 16] = 6 * 448.0, 6 * 2.0**-11  # below half of E4M3's least number
    assert dequantize(assert_same(weight, ONE))[0, 16] == 0
    weight[0, 0] = 1e6
    quantized = assert_same(weight, ONE)
    assert quantized.saturated
    assert dequantize(quantized)[0, 0] == 6 * 448


def test_a_former_scale_serves_a_policy_that_moved():
    weight = random_weight((16, 128))
    scale = tensor_scale_for(weight, headroom=2)
    moved = weight * 1.5
    quantized = assert_same(moved, scale)
    assert not quantized.saturated
    own = (dequantize(quantize(moved, implementation="reference")) - moved).norm()
    assert (dequantize(quantized) - moved).norm() < 1.1 * own
    assert quantize(weight * 3, scale, implementation="reference").saturated


def test_size():
    quantized = quantize(random_weight((64, 256)), implementation="reference")
    assert quantized.num_bytes == 64 * 256 * 9 // 16 + 4


# ------------------------------------------------------------------------------------------------------------- linear


def test_the_linear_layer_unpacks_exactly():
    """Each output of a row of the identity is one weight: nothing is summed, so nothing may differ."""
    weight = quantize(random_weight((35, 40), seed=2), implementation="reference")
    products = linear(torch.eye(40, device=DEVICE), weight, implementation="triton")
    assert torch.equal(products, dequantize(weight).T)


@pytest.mark.parametrize(("rows", "shape"), [(1, (257, 300)), (41, (33, 17)), (3, (1, 129))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_linear_layer_is_its_reference(rows, shape, dtype):
    weight = quantize(random_weight(shape, seed=3), implementation="reference")
    inputs = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(4)).to(dtype).to(DEVICE)
    kernel = linear(inputs, weight, implementation="triton")
    reference = linear(inputs, weight, implementation="reference")
    assert kernel.dtype == reference.dtype == dtype
    # float32 sums in another order, then one rounding to the type: at most a last place of it.
    last_place = torch.finfo(dtype).eps
    scale = inputs.float().abs() @ dequantize(weight).abs().T
    difference = (kernel.float() - reference.float()).abs()
    assert (difference <= last_place * reference.float().abs() + 2e-6 * scale).all()


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 10,
    reason="Triton's interpreter reads E4M3 scales as E8M0",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_native_path_is_the_reference_too(dtype):
    weight = quantize(random_weight((35, 150), seed=5), implementation="reference")
    inputs = torch.randn(3, 150, generator=torch.Generator().manual_seed(6)).to(dtype).to(DEVICE)
    kernel = nvfp4_triton.linear_triton(inputs, weight.packed, weight.scales, weight.tensor_scale, native=True)
    reference = linear(inputs, weight, implementation="reference")
    scale = inputs.float().abs() @ dequantize(weight).abs().T
    difference = (kernel.float() - reference.float()).abs()
    assert (difference <= torch.finfo(dtype).eps * reference.float().abs() + 2e-6 * scale).all()


def test_no_rows_and_no_outputs():
    weight = quantize(random_weight((5, 20)), implementation="reference")
    assert linear(torch.empty(0, 20, device=DEVICE), weight, implementation="triton").shape == (0, 5)
    empty = quantize(torch.empty(0, 20, device=DEVICE), implementation="triton")
    assert linear(torch.ones(2, 20, device=DEVICE), empty, implementation="triton").shape == (2, 0)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_wrong_arguments_are_refused():
    weight = torch.ones(2, 16)
    for bad in (torch.ones(16), torch.ones(2, 0), torch.ones(2, 16, dtype=torch.int64)):
        with pytest.raises(ValueError, match="weight must be"):
            quantize(bad)
    for scale in (torch.ones(1), torch.ones((), dtype=torch.float64)):
        with pytest.raises(ValueError, match="tensor_scale must be"):
            quantize(weight, scale)
    quantized = quantize(weight, implementation="reference")
    for bad in (torch.ones(16), torch.ones(1, 15), torch.ones(1, 16, dtype=torch.int64)):
        with pytest.raises(ValueError, match="inputs must be"):
            linear(bad, quantized)
    with pytest.raises(ValueError, match="inputs are on meta and the weight on"):
        linear(torch.ones(1, 16, device="meta"), quantized)
    for headroom in (0.5, float("inf")):
        with pytest.raises(ValueError, match="headroom must be"):
            tensor_scale_for(weight, headroom=headroom)
