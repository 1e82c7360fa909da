"""Truncation: the kernel keeps the very tokens that its reference keeps, and both keep what `transformers` keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from atlas_kernels.draw import draw
from atlas_kernels.noise import request_keys
from atlas_kernels.truncate import truncate
from atlas_kernels.truncate_reference import share_of, weights
from atlas_kernels.truncation import Truncation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INFINITY = float("inf")
VOCAB = 700
TRUNCATIONS = [
    Truncation(top_k=40, top_p=0.9, min_p=0.01),
    Truncation(top_k=VOCAB - 1, top_p=0.999),
    Truncation(top_p=1e-9),
    Truncation(min_p=1.0),
    Truncation(top_k=1),
    Truncation(top_k=40),
    Truncation(top_p=0.9),
    Truncation(min_p=0.05),
]


def logits_of(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def awkward_rows() -> torch.Tensor:
    """Equal numbers of every kind, and distributions with hardly a token."""
    rows = logits_of(8, VOCAB)
    rows[1] = rows[1].bfloat16().float()
    rows[2] = rows[2].round()
    rows[3] = 0
    rows[3, ::2] = -0.0  # the same number
    rows[3, 600:] = -1.0  # so that no sum is at the boundary but for rounding
    rows[4, : VOCAB - 5] = -INFINITY
    rows[5, 1:] = -INFINITY
    rows[6] = torch.finfo(torch.float32).min  # how some policies mask
    rows[6, 3:9] = 2.0
    rows[7] = -1e30 * torch.arange(VOCAB)
    return rows


def kept(logits: torch.Tensor) -> torch.Tensor:
    return logits > -INFINITY


def by_kernel(logits: torch.Tensor, truncation: Truncation, **options: Any) -> torch.Tensor:
    """The kernel's answer, once it is found to be the reference's, bit for bit."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    before = logits.clone()
    kernel = truncate(logits.to(DEVICE), truncation, implementation="triton", **options).cpu()
    reference = truncate(logits, truncation, implementation="reference", **options)
    assert torch.equal(kernel.view(torch.int32), reference.view(torch.int32)) or torch.equal(
        kernel.nan_to_num(9.5), reference.nan_to_num(9.5)
    )
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS[:4], ids=str)
def test_the_kernel_keeps_what_the_reference_keeps(truncation: Truncation) -> None:
    truncated = by_kernel(awkward_rows(), truncation, temperature=0.8)
    assert kept(truncated).any(dim=-1).all()
    assert not kept(truncated)[:3].all(dim=-1).any()


@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (1, 1), (1, 257), (3, 1025), (1, 3000)])
def test_awkward_shapes(rows: int, vocab: int) -> None:
    by_kernel(logits_of(rows, vocab), Truncation(top_k=min(50, vocab), top_p=0.8, min_p=0.001))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    logits = logits_of(2, VOCAB).to(dtype)
    truncated = by_kernel(logits, Truncation(top_p=0.7), temperature=1.3)
    assert truncated.dtype == torch.float32
    assert torch.equal(truncated, truncate(logits.float(), Truncation(top_p=0.7), temperature=1.3))


def test_rows_that_are_no_distribution_lose_nothing() -> None:
    """So that whoever draws from them notices."""
    rows = logits_of(4, VOCAB)
    rows[0, 7], rows[1, 7], rows[2] = float("nan"), INFINITY, -INFINITY
    truncated = by_kernel(rows, TRUNCATIONS[0])
    assert torch.equal(truncated[:3].nan_to_num(9.5), rows[:3].nan_to_num(9.5))
    assert 0 < kept(truncated[3]).sum() < 40


def test_it_writes_where_it_is_told() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    wide = torch.full((3, 2 * VOCAB), 5.0, device=DEVICE)
    wide[:, :VOCAB] = logits_of(3, VOCAB).to(DEVICE)
    expected = truncate(wide[:, :VOCAB].clone(), TRUNCATIONS[0], implementation="reference")
    part = wide[:, :VOCAB]
    assert truncate(part, TRUNCATIONS[0], out=part, implementation="triton") is part
    assert torch.equal(part, expected)
    assert (wide[:, VOCAB:] == 5).all()


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_transformers_keeps_the_same(truncation: Truncation) -> None:
    """But for which of equal tokens: its sort is not stable."""
    rows = awkward_rows()[:6]
    expected = rows
    if truncation.top_k:
        expected = TopKLogitsWarper(truncation.top_k)(None, expected)
    if truncation.top_p < 1:
        expected = TopPLogitsWarper(truncation.top_p)(None, expected)
    if truncation.min_p:
        expected = MinPLogitsWarper(truncation.min_p)(None, expected)
    ours = truncate(rows, truncation)
    assert torch.equal(ours.sort(dim=-1).values, expected.sort(dim=-1).values)
    tied = (kept(ours) != kept(expected)).any(dim=-1)
    assert not tied[[0, 4, 5]].any(), "rows without equal numbers keep the same ids"


def test_of_equal_tokens_the_highest_ids_stay() -> None:
    row = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    # Each 0 weighs 0.1, each 1 0.27: 0.25 is reached by two tokens of the four.
    assert kept(by_kernel(row, Truncation(top_p=0.75)))[0].tolist() == [True, False, True, False, True, True]
    assert kept(by_kernel(row, Truncation(top_k=3)))[0].all()  # all that equal the third stay


def test_weights_are_exponentials_that_never_rise() -> None:
    distances = torch.cat([torch.linspace(0, 30, 200_001), torch.tensor([1e9, INFINITY])])
    weighed = weights(-distances, torch.zeros(1))
    assert weighed[0] == 2**40
    assert weighed[-2:].tolist() == [0, 0]
    assert (weighed.diff() <= 0).all()
    # The product with 2**24 / log 2 is rounded to float32, once.
    exact = 2.0**40 * (-distances.double()).exp()
    assert ((weighed - exact).abs() <= 2 + 3e-6 * exact).all()
    near = distances < 1
    assert ((weighed - exact).abs() <= 2 + 2e-7 * exact)[near].all()


def test_shares_are_those_of_whole_numbers() -> None:
    totals = [0, 1, 2**31 - 1, 2**31, 2**58 + 12_345, 2**57 - 1]
    for share in (0, 1, 214_748_365, 2**31 - 1):
        assert share_of(torch.tensor(totals), share).tolist() == [total * share // 2**31 for total in totals]


def test_draws_have_the_truncated_distribution() -> None:
    """Chi-square against probabilities of float64, the kept tokens found by sorting them."""
    truncation, temperature, draws = Truncation(top_k=12, top_p=0.85, min_p=0.02), 1.3, 4_000
    row = logits_of(1, 60, seed=5) / 2
    probs = (row[0].double() / temperature).softmax(dim=-1).numpy()
    order = np.argsort(-probs)[:12]
    inside = order[np.cumsum(probs[order] / probs[order].sum()) - probs[order] / probs[order].sum() < 0.85]
    inside = inside[probs[inside] >= 0.02 * probs.max()]
    rows = by_kernel(row, truncation, temperature=temperature).expand(draws, -1)
    assert set(np.flatnonzero(kept(rows[0]).numpy())) == set(inside)
    assert len(inside) > 5
    keys = torch.from_numpy(request_keys(0, 1).view(np.int64)).expand(draws).contiguous()
    drawn = draw(rows, keys, torch.arange(draws), implementation="reference").indices
    counts = np.bincount(drawn.numpy(), minlength=60)
    assert counts.sum() == counts[inside].sum()
    expected = draws * probs[inside] / probs[inside].sum()
    assert stats.chisquare(counts[inside], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("logits", "options", "says"),
    [
        (torch.zeros(3), {}, r"logits must be .* \[rows, vocab\]"),
        (torch.zeros(3, 0), {}, "logits must be"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "logits must be"),
        (torch.zeros(3, 4), {"temperature": 0.0}, "temperature must be a finite number > 0"),
        (torch.zeros(3, 4), {"temperature": math.nan}, "temperature"),
        (torch.zeros(3, 4), {"out": torch.zeros(3, 5)}, "out must be"),
        (torch.zeros(3, 4), {"out": torch.zeros(4, 3).T}, "out must be"),
        (torch.zeros(3, 4), {"out": torch.zeros(3, 4).half()}, "out must be"),
        (torch.zeros(3, 4), {"implementation": "cuda"}, "implementation must be"),
    ],
)
def test_bad_arguments_are_named(logits: torch.Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        truncate(logits, Truncation(top_k=2), **options)


@pytest.mark.parametrize(
    "numbers", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": math.nan}]
)
def test_a_truncation_is_in_range(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(numbers))} must be"):
        Truncation(**numbers)
