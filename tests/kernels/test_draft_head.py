"""The draft head kernel: interpreted (or on the GPU, where there is one) it is its reference, and that is the engine's head.

It draws with the numbers of verification, and its reference draws from the head's distribution (chi-square, seeded,
false-alarm rate `FALSE_ALARM`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from atlas_kernels.draft_head import HeadDraft, draft_head
from atlas_kernels.draft_head_reference import absorbed, logits
from atlas_kernels.head_call import DraftHeadWeights, HeadCall
from atlas_kernels.noise import Stream, exponentials, request_keys
from atlas_kernels.truncation import Truncation
from atlas_rl.speculators.drawing import choose_among
from atlas_rl.speculators.recurrent.head import FoldedHead, RecurrentHead
from tests.exact import CERTAIN, FALSE_ALARM

draft_head_triton = pytest.importorskip("atlas_kernels.draft_head_triton", reason="the kernels need Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE, SPLIT = 1 << 40, 0
"""Bytes of weights up to which one launch does everything: always, and never."""


def case(batch: int, tokens: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    """A head whose draws are neither sure nor flat, and rows among which some begin with a token it does not know."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = DraftHeadWeights(
        normal(tokens + 1, 3 * size).to(DEVICE, dtype),
        (normal(3 * size, size) / size**0.5).to(DEVICE, dtype),
        (0.1 * normal(3 * size)).to(DEVICE, dtype),
        (3 * normal(tokens, size) / size**0.5).to(DEVICE, dtype),
        normal(tokens).to(DEVICE, dtype),
        torch.randperm(5 * tokens, generator=generator)[:tokens].to(DEVICE),
    )
    state = torch.tanh(normal(batch, size)).to(DEVICE)
    newest = torch.randint(tokens + 1, (batch,), generator=generator)
    newest[-1:] = tokens
    keys = torch.from_numpy(request_keys(seed, batch).view(np.int64))
    positions = torch.arange(batch) * 1_000_003 % 2**31
    return weights, state, *(tensor.to(DEVICE) for tensor in (newest, keys, positions))


def by_kernel(arguments, num_tokens=3, *, bytes_=SPLIT, temperature=1.0, stream=Stream.TARGET, with_probs=True):
    call = HeadCall(*arguments, num_tokens, temperature, stream, with_probs)
    return HeadDraft(*draft_head_triton.draft_head_triton(call, whole_bytes=bytes_))


def assert_same(arguments, num_tokens=3, *, bytes_=SPLIT, rtol=1e-4, **options) -> HeadDraft:
    """The kernel's draft, once it is found to be the reference's: tokens exactly."""
    kernel = by_kernel(arguments, num_tokens, bytes_=bytes_, **options)
    reference = draft_head(*arguments, num_tokens, implementation="reference", **{"with_probs": True} | options)
    assert torch.equal(kernel.indices, reference.indices)
    # float32 sums in another order.
    torch.testing.assert_close(kernel.confidence, reference.confidence, rtol=rtol, atol=1e-6)
    assert (kernel.probs is None) == (reference.probs is None)
    if kernel.probs is not None:
        torch.testing.assert_close(kernel.probs, reference.probs, rtol=rtol, atol=1e-6)
    return kernel


# ------------------------------------------------------------------------------------------- the kernel is the reference


@pytest.mark.parametrize("bytes_", [WHOLE, SPLIT])
@pytest.mark.parametrize(("batch", "tokens", "size"), [(1, 1, 1), (1, 257, 40), (41, 300, 72), (3, 1500, 300)])
def test_awkward_shapes(bytes_, batch, tokens, size):
    assert_same(case(batch, tokens, size, seed=tokens), 2, bytes_=bytes_)


@pytest.mark.slow
def test_a_large_batch():
    assert_same(case(256, 100, 24), 1, bytes_=WHOLE, with_probs=False)


@pytest.mark.slow
def test_the_largest_head():
    assert_same(case(1, 8192, 1024), 1)


@pytest.mark.slow
def test_many_steps():
    draft = assert_same(case(5, 200, 48), 9)
    assert draft.indices.shape == draft.confidence.shape == (5, 9)
    assert torch.allclose(draft.probs.sum(dim=-1), torch.ones(5, 9, device=DEVICE), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bytes_", [WHOLE, SPLIT])
def test_weights_of_sixteen_bits(dtype, bytes_):
    # The interpreter truncates to bfloat16 where a GPU rounds: states are off by up to a last place, 2**-8.
    rtol = 0.1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1e-4
    assert_same(case(3, 200, 48, dtype), bytes_=bytes_, temperature=0.7, rtol=rtol)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_streams_and_temperatures(temperature):
    drafts = [assert_same(case(8, 200, 48), stream=s, temperature=temperature) for s in (Stream.TARGET, Stream.DRAFT)]
    assert not torch.equal(drafts[0].indices, drafts[1].indices)


@pytest.mark.parametrize("bytes_", [WHOLE, SPLIT])
def test_greedy_takes_the_likeliest_and_says_so(bytes_):
    arguments = case(4, 1200, 48)
    arguments[0].outputs[1100] = arguments[0].outputs[3]  # equal logits, in different splits: the first counts
    arguments[0].bias[[3, 1100]] = 50.0
    draft = assert_same(arguments, temperature=0.0, bytes_=bytes_)
    assert (draft.indices == 3).all()
    assert (draft.probs[:, :, 3] == 1).all()
    assert (draft.probs.sum(dim=-1) == 1).all()


def test_saturated_rows():
    """A point mass, and logits so large that every other weight vanishes."""
    arguments = case(3, 300, 40)
    arguments[0].bias[77] = 1e30
    draft = assert_same(arguments)
    assert (draft.indices == 77).all()
    assert (draft.confidence == 1).all()


@pytest.mark.parametrize("stream", [Stream.TARGET, Stream.DRAFT])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 20), (1, 1), (5, 303)])
def test_truncated_tokens_are_neither_drawn_nor_counted(batch, tokens, stream):
    arguments, options = (
        case(batch, tokens, 24, seed=tokens),
        {"temperature": 0.9, "stream": stream, "with_probs": True},
    )
    truncation = Truncation(top_k=30, top_p=0.8, min_p=0.02)
    kernel, reference = (
        draft_head(*arguments, 3, truncation=truncation, implementation=how, **options)
        for how in ("triton", "reference")
    )
    assert torch.equal(kernel.indices, reference.indices)
    torch.testing.assert_close(kernel.confidence, reference.confidence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kernel.probs, reference.probs, rtol=1e-4, atol=1e-6)
    assert torch.equal(kernel.probs > 0, reference.probs > 0)
    assert ((kernel.probs > 0).sum(dim=-1) <= 30).all()
    assert (kernel.probs.gather(2, kernel.indices[:, :, None]) > 0).all()


def test_greedy_drafts_are_not_truncated():
    with pytest.raises(ValueError, match="truncation goes with a temperature > 0"):
        draft_head(*case(2, 20, 16), 3, temperature=0.0, truncation=Truncation(top_k=3), implementation="reference")


def test_no_rows():
    draft = by_kernel(case(0, 20, 16))
    assert draft.indices.shape == (0, 3)
    assert draft.probs.shape == (0, 3, 20)


def test_the_given_state_is_left_alone():
    arguments = case(3, 50, 16)
    before = arguments[1].clone()
    by_kernel(arguments)
    assert torch.equal(arguments[1], before)


# ------------------------------------------------------------------------------------------------------ the engine's head


def test_the_reference_is_the_engines_head_and_sampler():
    generator = torch.Generator().manual_seed(1)
    head = RecurrentHead(hidden_size=24, state_size=16)
    head.bias.data = torch.randn(90, generator=generator)
    head.set_tables(torch.randn(90, 24, generator=generator), torch.randn(90, 24, generator=generator), torch.zeros(90))
    folded, ids = FoldedHead(head), torch.randperm(500, generator=generator)[:90]
    keys, positions, newest = request_keys(2, 300), np.arange(300) + 7, torch.arange(300) % 91
    with torch.no_grad():
        state = folded.begin(torch.randn(300, 24, generator=generator))
        draft = draft_head(
            folded.packed(ids, torch.float32), state, newest, torch.from_numpy(keys.view(np.int64)),
            torch.from_numpy(positions), 3, temperature=0.8, implementation="reference",
        )  # fmt: skip
        for step in range(3):
            state = folded.absorb(state, newest)
            probs = (folded.logits(state) / torch.tensor(0.8)).softmax(dim=-1)
            chosen = choose_among(probs.numpy(), ids.numpy(), keys, positions + step, int(Stream.TARGET))
            assert np.array_equal(chosen, draft.indices[:, step].numpy())
            newest = torch.from_numpy(chosen)


def test_it_draws_with_the_very_numbers_of_verification():
    """A head that knows the whole vocabulary and has the policy's logits drafts what the policy will choose."""
    weights, state, newest, keys, positions = case(200, 64, 32)
    weights = replace(weights, token_ids=torch.arange(64, device=DEVICE))
    draft = draft_head(weights, state, newest, keys, positions, 1)
    scores = logits(weights, absorbed(weights, state, newest)).double()
    scores -= exponentials(keys, positions, int(Stream.TARGET), 64).double().log()
    assert torch.equal(draft.indices[:, 0], scores.argmax(dim=-1))


@pytest.mark.parametrize("biased", [False, True])
def test_draws_have_the_heads_distribution_and_others_are_caught(biased):
    rows = 20_000
    weights, state, newest, _, _ = case(1, 6, 8)
    keys = torch.from_numpy(request_keys(3, rows).view(np.int64)).to(DEVICE)
    many = (state.expand(rows, -1), newest.expand(rows), keys, torch.full((rows,), 9, device=DEVICE))
    draft = draft_head(weights, *many, 2, with_probs=True, implementation="reference")
    q = draft.probs[0, 0].double().cpu()
    if biased:
        q = q**1.1 / (q**1.1).sum()
    counts = np.bincount(draft.indices[:, 0].cpu(), minlength=6)
    value = stats.chisquare(counts, (q / q.sum() * rows).numpy()).pvalue
    assert value < CERTAIN if biased else value > FALSE_ALARM


# ------------------------------------------------------------------------------------------------------------ refusals


def test_wrong_arguments_are_refused():
    weights, state, newest, keys, positions = case(3, 20, 16)
    for wrong, says in (
        ({"state": state[:, :-1]}, "state must be"),
        ({"newest": newest.int()}, "newest must be"),
        ({"keys": keys[:2]}, "keys must be"),
        ({"positions": positions.float()}, "positions must be"),
        ({"positions": positions.to("meta")}, "positions is on meta and the weights on"),
        ({"num_tokens": 0}, "num_tokens must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"implementation": "cuda"}, "implementation must be"),
    ):
        arguments = {"state": state, "newest": newest, "keys": keys, "positions": positions, "num_tokens": 1}
        with pytest.raises(ValueError, match=says):
            draft_head(weights, **(arguments | wrong))
    for name in ("input_gates", "state_gates", "state_bias", "bias", "token_ids"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            replace(weights, **{name: getattr(weights, name)[:-1]})
    with pytest.raises(ValueError, match="outputs must be"):
        replace(weights, outputs=weights.outputs.double())
