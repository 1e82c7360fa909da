"""The verify kernel: interpreted (or on the GPU, where there is one) it is its reference, and its reference is exact.

The reference's frequencies are tested by chi-square (seeded, false-alarm rate `FALSE_ALARM`); the kernel then has to choose
token for token as the reference does, and as the engine's sampler does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from atlas_kernels.noise import Stream, request_keys
from atlas_kernels.rejection import verify_by_rejection
from atlas_kernels.verify import Verification, verify
from atlas_kernels.verify_reference import noisy_scores, processed_logits
from atlas_rl.sampling.verification import choose
from tests.exact import CERTAIN, FALSE_ALARM

pytest.importorskip("triton", reason="the kernels need Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peaked(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Logits as a trained policy has them: a broad floor and a few likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, vocab, generator=generator)
    few = torch.randint(vocab, (rows, 4), generator=generator)
    return logits.scatter(1, few, 14 + 2 * torch.randn(rows, 4, generator=generator))


def rows_of(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise keys and positions of `rows` rows, among them large ones."""
    keys = torch.from_numpy(request_keys(seed, rows).view(np.int64))
    return keys, torch.arange(rows) * 1_000_003 % 2**31


def run(
    logits: torch.Tensor, implementation: str, drafts=None, row_starts=None, seed: int = 0, **options
) -> Verification:
    rows = len(logits)
    keys, positions = rows_of(rows, seed)
    drafts = torch.full((rows,), -1) if drafts is None else drafts
    row_starts = torch.arange(rows + 1) if row_starts is None else row_starts
    arguments = [tensor.to(DEVICE) for tensor in (logits, drafts, row_starts, keys, positions)]
    return verify(*arguments, implementation=implementation, **options)


def assert_same(logits: torch.Tensor, **options) -> Verification:
    """The kernel's answer, once it is found to be the reference's."""
    kernel, reference = run(logits, "triton", **options), run(logits, "reference", **options)
    assert torch.equal(kernel.token_ids, reference.token_ids)
    assert torch.equal(kernel.num_accepted, reference.num_accepted)
    # float32 sums of up to 152k weights against float64 ones.
    for name in ("logprobs", "entropies", "max_probs"):
        torch.testing.assert_close(getattr(kernel, name), getattr(reference, name), rtol=1e-5, atol=1e-5)
    return kernel


# ------------------------------------------------------------------------------------------- the kernel is the reference


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 257), (41, 257), (3, 8192), (3, 8193)])
def test_awkward_shapes(rows, vocab):
    assert_same(peaked(rows, vocab, seed=vocab))


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "dtype"), [(49_152, "bfloat16"), (128_256, "float32"), (151_936, "bfloat16")])
def test_whole_vocabularies(vocab, dtype):
    assert_same(peaked(1, vocab, seed=vocab).to(getattr(torch, dtype)), temperature=0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_types_and_temperatures(dtype, temperature):
    assert_same(peaked(3, 700, seed=1).to(dtype), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("form", [verify, verify_by_rejection])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_padding_changes_nothing(implementation, form, temperature):
    """Requests of 2, 1 and 3 rows; padded to eight rows of eight requests, three of which have none."""
    logits, starts = peaked(8, 700, seed=4), torch.tensor([0, 2, 3, 6, 7, 8, 8, 8, 8])
    keys, positions = rows_of(8)
    noise = torch.full((6,), -1), torch.arange(7), keys[:6], positions[:6]
    drafts = form(logits[:6], *noise, temperature=temperature).token_ids
    drafts = torch.cat([drafts, drafts[:2]])
    drafts[[1, 2, 5, 6, 7]] = -1
    drafts[4] += 1

    def decided(rows, requests):
        own = [each[:rows].to(DEVICE) for each in (logits, drafts)]
        noise = keys[:rows].to(DEVICE), torch.where(torch.arange(rows) < 6, positions[:rows], -1).to(DEVICE)
        each = form(
            *own, starts[: requests + 1].to(DEVICE), *noise, temperature=temperature, implementation=implementation
        )
        return [
            field.cpu() for field in (each.num_accepted, each.token_ids, each.logprobs, each.entropies, each.max_probs)
        ]

    (accepted, *rows), (padded_accepted, *padded) = decided(6, 3), decided(8, 8)
    assert accepted.tolist() == padded_accepted[:3].tolist()
    assert all(torch.equal(one, other[:6]) for one, other in zip(rows, padded, strict=True))
    if implementation == "triton":
        assert padded[-1][6:].isnan().all()  # nothing was read


def test_flat_rows():
    """Every bound is close to the best score: where a bound that cuts off too early would show."""
    assert_same(torch.zeros(3, 9000))


def test_saturated_rows():
    tokens = [0, 127, 128, 256]
    logits = torch.full((5, 257), -1e30)
    logits[range(4), tokens] = 1e30
    logits[4] = 1e30  # all of the same huge logit: the entropy is that of a uniform row, not NaN
    verified = assert_same(logits)
    assert verified.token_ids[:4].tolist() == tokens
    assert verified.logprobs[:4].tolist() == [0.0] * 4
    assert verified.entropies[4].item() == pytest.approx(np.log(257), rel=1e-6)


def test_one_allowed_token_by_infinities_and_by_the_mask():
    tokens = torch.tensor([0, 300, 8999])
    logits = peaked(3, 9000)
    allowed = torch.zeros(3, 9000, dtype=torch.bool).scatter(1, tokens[:, None], True)
    by_mask = assert_same(logits, allowed=allowed.to(DEVICE))
    by_infinity = assert_same(logits.masked_fill(~allowed, float("-inf")))
    for verified in (by_mask, by_infinity):
        assert verified.token_ids.tolist() == tokens.tolist()
        assert verified.logprobs.tolist() == [0.0] * 3
        assert verified.max_probs.tolist() == [1.0] * 3


def test_the_mask_is_obeyed_and_renormalises():
    allowed = torch.rand(3, 600, generator=torch.Generator().manual_seed(1)) < 0.05
    verified = assert_same(peaked(3, 600), allowed=allowed.to(DEVICE), temperature=1.3)
    assert allowed[torch.arange(3), verified.token_ids.cpu()].all()


def test_a_row_without_an_allowed_token_says_so():
    for implementation in ("triton", "reference"):
        verified = run(torch.full((1, 300), float("-inf")), implementation)
        assert verified.token_ids.tolist() == [0]
        assert verified.logprobs.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_distribution_have_no_figures_and_some_token(value, temperature):
    """An index outside of the vocabulary would end a GPU's process; the rows beside them are as ever."""
    logits = peaked(5, 9000)
    logits[1] = value
    logits[3, 8500:] = value
    none = [1] if value == float("-inf") else [1, 3]
    good = [row for row in range(5) if row not in none]
    expected = run(peaked(5, 9000), "reference", temperature=temperature)
    for implementation in ("triton", "reference"):
        verified = run(logits, implementation, temperature=temperature)
        assert verified.max_probs.isnan().nonzero()[:, 0].tolist() == none
        assert verified.logprobs[none].isnan().all()
        assert verified.entropies[none].isnan().all()
        assert ((verified.token_ids >= 0) & (verified.token_ids < 9000)).all()
        assert verified.entropies[good].isfinite().all()
        assert torch.equal(verified.token_ids[[0, 2, 4]], expected.token_ids[[0, 2, 4]])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.5])
def test_tiles_that_a_policy_masks_with_its_types_least_number(temperature):
    """Finite, so their tiles have weights of one until a likelier tile comes, and sums of such logits overflow."""
    logits = peaked(2, 5 * 8192)
    logits[0, : 2 * 8192] = torch.finfo(torch.float32).min
    logits[1, 100:] = torch.finfo(torch.float32).min
    assert assert_same(logits, temperature=temperature).entropies.isfinite().all()


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.zeros(2, 9000)
    logits[0, [4000, 8500]] = 3.0
    assert assert_same(logits, temperature=0).token_ids.tolist() == [4000, 0]


@pytest.mark.slow
def test_greedy_and_drawn_rows_in_one_batch():
    """A server's requests differ; each row is what it would be alone, and at temperature 0 nobody draws."""
    logits = torch.randn(6, 9000, generator=torch.Generator().manual_seed(2))
    greedy = torch.tensor([True, False, True, False, False, True], device=DEVICE)
    drawn, likeliest = run(logits, "reference", temperature=0.8), run(logits, "reference", temperature=0)
    assert (drawn.token_ids != likeliest.token_ids).all()
    for flags in (greedy, ~greedy, greedy | True, greedy & False):
        mixed = assert_same(logits, greedy=flags, temperature=0.8)
        assert torch.equal(mixed.token_ids, torch.where(flags, likeliest.token_ids, drawn.token_ids))
        torch.testing.assert_close(mixed.entropies, drawn.entropies, rtol=1e-5, atol=1e-5)
    assert torch.equal(assert_same(logits, greedy=greedy, temperature=0).token_ids, likeliest.token_ids)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_greedy_rows_that_are_no_distribution_among_drawn_ones(value):
    logits, greedy = peaked(3, 9000), torch.tensor([False, True, False], device=DEVICE)
    logits[1] = value
    for implementation in ("triton", "reference"):
        verified = run(logits, implementation, greedy=greedy)
        assert verified.max_probs.isnan().tolist() == [False, True, False]
        assert ((verified.token_ids >= 0) & (verified.token_ids < 9000)).all()


def test_logits_with_padding_between_rows():
    logits = peaked(2, 300)
    padded = torch.full((2, 512), 99.0)
    padded[:, :300] = logits
    assert torch.equal(assert_same(padded[:, :300]).token_ids, run(logits, "reference").token_ids)


# ---------------------------------------------------------------------------------------------------- accepted counts


def test_accepted_counts():
    """Requests with no drafts, all accepted, all rejected, one right after a wrong one; and one without rows."""
    logits = peaked(11, 257, seed=3)
    own = run(logits, "reference").token_ids.cpu()
    wrong = (own + 1) % 257
    drafts = torch.tensor([-1, own[1], own[2], -1, wrong[4], wrong[5], -1, own[7], wrong[8], own[9], -1])
    verified = assert_same(logits, drafts=drafts, row_starts=torch.tensor([0, 1, 4, 7, 7, 11]))
    assert verified.num_accepted.tolist() == [0, 2, 0, 0, 1]
    assert torch.equal(verified.token_ids.cpu(), own)  # whatever is drafted


def test_no_rows():
    verified = run(torch.empty(0, 257), "triton", row_starts=torch.zeros(1, dtype=torch.int64))
    assert verified.token_ids.shape == verified.num_accepted.shape == (0,)


# ------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_reference_chooses_as_the_engine_does(temperature):
    logits = torch.cat([peaked(300, 1003, seed=4), torch.randn(300, 1003, generator=torch.Generator().manual_seed(5))])
    keys, positions = rows_of(600)
    probs = (logits / torch.tensor(temperature)).softmax(dim=-1)
    engine = choose(probs, keys.numpy().view(np.uint64), positions.numpy(), Stream.TARGET, greedy=False)
    assert np.array_equal(engine, run(logits, "reference", temperature=temperature).token_ids.cpu().numpy())


def frequencies_p_value(token_ids: torch.Tensor, logits: torch.Tensor) -> float:
    expected = logits.double().softmax(dim=-1) * len(token_ids)
    return float(stats.chisquare(np.bincount(token_ids, minlength=len(logits)), expected.numpy()).pvalue)


def test_the_reference_is_exact_and_a_biased_one_is_caught():
    rows, logits = 40_000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    keys = torch.from_numpy(request_keys(9, 400).view(np.int64)).repeat_interleave(100)
    positions = torch.arange(100).repeat(400)
    drafts, starts = torch.zeros(rows, dtype=torch.int64), torch.arange(rows + 1)
    verified = verify(logits.repeat(rows, 1), drafts, starts, keys, positions, implementation="reference")
    assert frequencies_p_value(verified.token_ids, logits) > FALSE_ALARM
    assert frequencies_p_value(verified.token_ids, 1.05 * logits) < CERTAIN


@pytest.mark.parametrize(("margin", "agree"), [(3e-6, True), (0.0, False)])
def test_the_engines_float32_probabilities_resolve_margins_of_1e_6(margin, agree):
    """The docstring of `atlas_kernels.verify` claims it. Margins are exact up to the last place of a logit."""
    rows = 2000
    logits = torch.randn(rows, 257, generator=torch.Generator().manual_seed(6))
    keys, positions = rows_of(rows)

    def two_best() -> torch.return_types.topk:
        scores = noisy_scores(processed_logits(logits, 1.0, None), keys, positions, Stream.TARGET)
        return scores.topk(2, dim=-1)

    best = two_best()
    gap = best.values[:, 0] - best.values[:, 1]
    logits[torch.arange(rows), best.indices[:, 1]] += (gap - margin).float()
    best = two_best()
    assert (best.values[:, 0] - best.values[:, 1] - margin).abs().max() < 1e-6
    engine = choose(logits.softmax(-1), keys.numpy().view(np.uint64), positions.numpy(), Stream.TARGET, greedy=False)
    assert (torch.from_numpy(engine) == best.indices[:, 0]).all() == agree
    assert (torch.from_numpy(engine)[:, None] == best.indices).any(dim=1).all()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.zeros(2, 5, dtype=torch.float64)}, "logits must be"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, "keys must be"),
        ({"positions": torch.zeros(2)}, "positions must be"),
        ({"row_starts": torch.zeros(2)}, "row_starts must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"allowed": torch.zeros(2, 4, dtype=torch.bool)}, "allowed must be"),
        ({"greedy": torch.zeros(2, dtype=torch.int64)}, "greedy must be bool"),
        ({"greedy": torch.zeros(3, dtype=torch.bool)}, "greedy must be bool"),
        ({"keys": torch.zeros(2, dtype=torch.int64, device="meta")}, "keys is on meta and logits on"),
        ({"implementation": "cuda"}, "implementation must be"),
    ],
)
def test_wrong_arguments_are_refused(change, says):
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = {
        "logits": torch.zeros(2, 5),
        "draft_token_ids": zeros,
        "row_starts": torch.tensor([0, 2]),
        "keys": zeros,
        "positions": zeros,
    }
    with pytest.raises(ValueError, match=says):
        verify(**(arguments | change))
