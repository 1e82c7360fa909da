"""The rejection kernels: they are their reference, the reference is the engine's rejection sampling, and it is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from atlas_kernels.noise import Stream, request_keys
from atlas_kernels.rejection import verify_by_rejection
from atlas_kernels.verify import Verification, verify
from atlas_rl.core import SamplingParams
from atlas_rl.sampling.verification import Positions, RejectionSampling, choose
from tests.exact import CERTAIN, FALSE_ALARM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(rows: int, vocab: int, reduced: int | None, seed: int = 0, sharpness: float = 3.0) -> dict[str, torch.Tensor]:
    """Logits, and drafts drawn from a disturbed copy of them: one request that ends with a row without a draft."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(rows, vocab, generator=generator)
    keys = torch.from_numpy(request_keys(seed, rows).view(np.int64))
    positions = torch.arange(rows) * 1_000_003 % 2**31
    arguments = {"logits": logits, "row_starts": torch.tensor([0, rows]), "keys": keys, "positions": positions}
    ids = torch.arange(vocab) if reduced is None else torch.randperm(vocab, generator=generator)[:reduced]
    q = (logits[:, ids] + torch.randn(rows, len(ids), generator=generator)).softmax(dim=-1)
    drafts = ids[q.multinomial(1, generator=generator)[:, 0]]
    drafts[-1] = -1
    arguments["draft_token_ids"] = drafts
    if reduced is not None:
        arguments |= {"draft_probs": q, "draft_vocab": ids}
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


def assert_same(arguments: dict[str, torch.Tensor], **options) -> Verification:
    """The kernel's answer, once it is found to be the reference's."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    kernel = verify_by_rejection(**arguments, implementation="triton", **options)
    reference = verify_by_rejection(**arguments, implementation="reference", **options)
    assert torch.equal(kernel.token_ids, reference.token_ids)
    assert torch.equal(kernel.num_accepted, reference.num_accepted)
    for name in ("logprobs", "entropies", "max_probs"):
        torch.testing.assert_close(getattr(kernel, name), getattr(reference, name), rtol=1e-5, atol=1e-5)
    return kernel


# ------------------------------------------------------------------------------------------- the kernel is the reference


@pytest.mark.parametrize(
    ("rows", "vocab", "reduced"), [(1, 257, None), (21, 257, None), (21, 257, 40), (2, 9000, 1500)]
)
def test_the_kernel_is_its_reference(rows, vocab, reduced):
    assert_same(case(rows, vocab, reduced, seed=vocab))


@pytest.mark.parametrize("reduced", [None, 100])
def test_temperature_mask_and_bfloat16(reduced):
    arguments = case(4, 600, reduced, seed=1)
    arguments["logits"] = arguments["logits"].bfloat16()
    arguments["allowed"] = torch.rand(4, 600, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.5
    arguments["allowed"][:, 7] = True
    verified = assert_same(arguments, temperature=0.8)
    assert arguments["allowed"].gather(1, verified.token_ids[:, None]).all()


def test_the_reduced_vocabulary_misses_the_sampled_token():
    """The policy's mass lies outside of what the drafter knows: everything is rejected, and recovered from outside."""
    arguments = case(4, 700, 50, seed=3)
    outside = torch.ones(700, dtype=torch.bool, device=DEVICE)
    outside[arguments["draft_vocab"]] = False
    arguments["logits"] = torch.where(outside, arguments["logits"] + 90, arguments["logits"])
    verified = assert_same(arguments)
    assert verified.num_accepted.tolist() == [0]
    assert outside[verified.token_ids].all()


@pytest.mark.parametrize("reduced", [None, 5])
def test_a_sure_policy_accepts_what_it_would_say_and_rejects_the_rest(reduced):
    arguments = case(4, 300, reduced, seed=4)
    ids = torch.arange(5, device=DEVICE)
    arguments["logits"] = torch.full((4, 300), float("-inf"), device=DEVICE)
    arguments["logits"][torch.arange(4), ids[:4]] = 1.0
    arguments["draft_token_ids"] = torch.tensor([0, 1, 4, -1], device=DEVICE)
    if reduced is not None:
        arguments |= {"draft_vocab": ids, "draft_probs": torch.full((4, 5), 0.2, device=DEVICE)}
    verified = assert_same(arguments)
    assert verified.token_ids.tolist() == [0, 1, 2, 3]
    assert verified.num_accepted.tolist() == [2]


def test_drafts_from_the_policy_itself_all_stand():
    arguments = case(8, 200, 200, seed=5)
    arguments["draft_probs"] = arguments["logits"].softmax(dim=-1)[:, arguments["draft_vocab"]]
    assert assert_same(arguments).num_accepted.tolist() == [7]


@pytest.mark.parametrize("reduced", [None, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_distribution_have_no_figures_and_some_token(reduced, value):
    pytest.importorskip("triton", reason="the kernels need Triton")
    arguments = case(4, 300, reduced, seed=6)
    arguments["logits"][2] = value
    for implementation in ("triton", "reference"):
        verified = verify_by_rejection(**arguments, implementation=implementation)
        assert verified.max_probs.isnan().tolist() == [False, False, True, False]
        assert verified.entropies.isnan().tolist() == [False, False, True, False]
        assert ((verified.token_ids >= 0) & (verified.token_ids < 300)).all()


def test_greedy_is_the_other_form():
    arguments = case(3, 300, None)
    by_rejection, invariant = verify_by_rejection(**arguments, temperature=0), verify(**arguments, temperature=0)
    for name in Verification.__slots__:
        assert torch.equal(getattr(by_rejection, name), getattr(invariant, name)), name


# ------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("reduced", [None, 60])
def test_the_reference_decides_as_the_engine_does(reduced):
    arguments = case(500, 301, reduced, seed=6)
    arguments["row_starts"] = torch.arange(501, device=DEVICE)  # a request each, so that every row's decision shows
    cpu = {name: tensor.cpu() for name, tensor in arguments.items()}
    q = None
    if reduced is not None:
        q = torch.zeros(500, 301).index_copy(1, cpu["draft_vocab"], cpu["draft_probs"])
    positions = Positions(
        cpu["logits"].softmax(dim=-1),
        cpu["keys"].numpy().view(np.uint64),
        cpu["positions"].numpy(),
        cpu["draft_token_ids"].numpy(),
        q,
    )
    tokens, accepted = RejectionSampling().decide(positions, SamplingParams(max_new_tokens=1))
    verified = verify_by_rejection(**arguments, implementation="reference")
    assert np.array_equal(tokens, verified.token_ids.cpu().numpy())
    assert np.array_equal(accepted, verified.num_accepted.cpu().numpy())
    assert 0.1 < accepted.mean() < 0.9


@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_is_exact_and_wrong_draft_probabilities_are_caught(biased):
    rows, ids = 40_000, torch.tensor([3, 0, 4])
    logits = torch.tensor([1.5, 1.0, 0.5, 0.0, -1.0])
    q = torch.tensor([0.2, 0.7, 0.1])
    keys = torch.from_numpy(request_keys(8, rows).view(np.int64))
    at = torch.full((rows,), 5)
    drafts = ids[choose(q.repeat(rows, 1), keys.numpy().view(np.uint64), at.numpy(), Stream.DRAFT, greedy=False)]
    claimed = torch.tensor([0.4, 0.4, 0.2]) if biased else q
    verified = verify_by_rejection(
        logits.repeat(rows, 1),
        drafts,
        torch.arange(rows + 1),
        keys,
        at,
        draft_probs=claimed.repeat(rows, 1),
        draft_vocab=ids,
    )
    p = logits.double().softmax(dim=-1).numpy()
    value = stats.chisquare(np.bincount(verified.token_ids, minlength=5), p / p.sum() * rows).pvalue
    assert value < CERTAIN if biased else value > FALSE_ALARM


def test_wrong_arguments_are_refused():
    arguments = case(3, 50, 10)
    with pytest.raises(ValueError, match="draft_probs must be"):
        verify_by_rejection(**(arguments | {"draft_probs": torch.zeros(3, 11, device=DEVICE)}))
    with pytest.raises(ValueError, match="draft_probs must be"):
        verify_by_rejection(**(arguments | {"draft_probs": arguments["draft_probs"].double()}))
    with pytest.raises(ValueError, match="draft_vocab must be"):
        verify_by_rejection(**(arguments | {"draft_vocab": torch.zeros(10, device=DEVICE)}))
    with pytest.raises(ValueError, match="pass both"):
        verify_by_rejection(**(arguments | {"draft_probs": None}))
