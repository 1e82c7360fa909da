"""The noise is Philox, the same on every path, exponential, independent, and drawn from exactly.

Statistical tests use fixed seeds; over fresh seeds each would raise a false alarm with probability `FALSE_ALARM`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from atlas_kernels import noise
from atlas_kernels.noise import BLOCK, Stream, draft_keys, mix64, request_keys
from atlas_rl.sampling.processing import block_maxima
from atlas_rl.speculators.drawing import choose_among
from tests.exact import CERTAIN, FALSE_ALARM

MASK = 0xFFFFFFFF
VOCABS = [257, 1003, 49152]


def philox(counter, key):
    """Philox4x32-10 from the paper, in Python's integers: what the kernels are compared with."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & MASK, (p0 >> 32) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return x0, x1, x2, x3


def as_int64(keys):
    return torch.from_numpy(keys.view(np.int64))


def dense(keys, positions, stream, vocab):
    return noise.exponentials(as_int64(keys), torch.from_numpy(positions), stream, vocab).numpy()


def choose(probs, keys, positions, stream=Stream.TARGET):
    return noise.choose_rows(probs.numpy(), block_maxima(probs).numpy(), keys, positions, int(stream))


# ------------------------------------------------------------------------------------------------- Philox and the keys


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_python_reference_gives_the_known_answers_of_random123(counter, key, words):
    assert philox(counter, key) == words


def test_both_kernels_are_philox():
    rng = np.random.default_rng(0)
    counters = rng.integers(2**32, size=(40, 3))
    counters[:3] = [[0, 0, 0], [MASK, MASK, MASK], [MASK, 0, 7]]
    keys = rng.integers(2**64, size=40, dtype=np.uint64)
    keys[:3] = [0, 2**64 - 1, 2**63]
    for (c0, c1, c2), key in zip(counters.tolist(), keys, strict=True):
        expected = philox((c0, c1, c2, 0), (int(key) & MASK, int(key) >> 32))
        assert tuple(int(word) for word in noise.philox4x32(key, c0, c1, c2)) == expected
        words = noise.philox_words(as_int64(np.array([key])), torch.tensor([c0]), torch.tensor([c1]), c2)
        assert tuple(words[0, 0].tolist()) == expected


def test_keys_of_different_seeds_and_requests_are_distinct():
    seeds = [*range(100), *(1 << bit for bit in range(7, 62)), 2**63 - 1]
    keys = np.concatenate([request_keys(seed, 300) for seed in seeds])
    assert len(np.unique(keys)) == len(keys)
    assert keys.dtype == np.uint64


def test_a_request_keeps_its_key_however_many_others_there_are():
    assert np.array_equal(request_keys(7, 3), request_keys(7, 50)[:3])


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_keys_mix_rows_as_single_numbers_are_mixed(seed):
    keys, lengths = request_keys(seed, 50), np.random.default_rng(seed).integers(0, 2**40, 50)
    assert keys.tolist() == [mix64(mix64(seed) ^ request) for request in range(50)]
    drafts = draft_keys(keys, lengths)
    assert drafts.dtype == np.uint64
    assert drafts.tolist() == [key ^ mix64(length) for key, length in zip(keys.tolist(), lengths.tolist(), strict=True)]
    assert len(request_keys(seed, 0)) == len(draft_keys(keys[:0], lengths[:0])) == 0


def test_mixing_spreads_every_input_bit():
    flips = [bin(mix64(x) ^ mix64(x ^ (1 << bit))).count("1") for x in range(200) for bit in range(64)]
    assert 31 < np.mean(flips) < 33
    assert min(flips) > 8


# ---------------------------------------------------------------------------------------------- numba equals torch


@pytest.mark.parametrize("vocab", VOCABS)
def test_numba_and_torch_draw_the_same_exponentials(vocab):
    cases = [(0, 0, Stream.TARGET), (5, 1, Stream.RECOVER), (2**40 + 3, 100_000, Stream.DRAFT)]
    for seed, position, stream in cases:
        keys = request_keys(seed, 2)
        tokens = range(vocab) if vocab < 2000 else [*range(300), *range(0, vocab, 97), vocab - 1]
        own = [noise.exponential(keys[1], position, token, int(stream)) for token in tokens]
        reference = dense(keys, np.full(2, position), stream, vocab)[1, list(tokens)]
        # A wrong word would be off by the number itself; the libraries' log1p differ in a last place at most.
        np.testing.assert_allclose(own, reference, rtol=3e-7)


def test_the_noise_of_some_tokens_is_that_of_all():
    keys, positions = request_keys(5, 3), np.array([4, 90, 7])
    ids = torch.tensor([0, 3, 127, 128, 700, 1002])
    some = noise.exponentials_of(as_int64(keys), torch.from_numpy(positions), Stream.TARGET, ids).numpy()
    assert np.array_equal(some, dense(keys, positions, Stream.TARGET, 1003)[:, ids.numpy()])


def test_a_choice_among_some_tokens_is_the_dense_argmax():
    keys, positions = request_keys(6, 40), np.arange(40)
    ids = np.array([2, 5, 130, 131, 900])
    probs = np.random.default_rng(0).dirichlet(np.ones(5), size=40).astype(np.float32)
    scores = probs / dense(keys, positions, Stream.TARGET, 1003)[:, ids]
    assert np.array_equal(choose_among(probs, ids, keys, positions, int(Stream.TARGET)), scores.argmax(axis=1))


def test_noise_is_a_function_of_the_token_not_of_the_vocabulary():
    keys, positions = request_keys(1, 2), np.array([3, 9])
    large = dense(keys, positions, Stream.TARGET, 1003)
    assert np.array_equal(dense(keys, positions, Stream.TARGET, 257), large[:, :257])


def test_each_row_draws_what_it_draws_alone():
    keys, positions = request_keys(2, 5), np.array([4, 0, 77, 4, 1_000_000])
    together = dense(keys, positions, Stream.TARGET, 300)
    for row in range(5):
        assert np.array_equal(
            dense(keys[row : row + 1], positions[row : row + 1], Stream.TARGET, 300)[0], together[row]
        )


# ------------------------------------------------------------------------------------------- the lazy argmax is exact


def sharp(rng, rows, vocab, scale):
    return torch.from_numpy(rng.normal(scale=scale, size=(rows, vocab))).float().softmax(-1)


@pytest.mark.parametrize("scale", [0.0, 2.0, 12.0])
@pytest.mark.parametrize("vocab", [1, 2, 5, 127, 128, 129, 1003, 5000])
def test_choose_rows_is_the_dense_argmax(vocab, scale):
    rng = np.random.default_rng(vocab + int(scale))
    rows = 20
    keys, positions = request_keys(vocab, rows), rng.integers(1000, size=rows)
    probs = sharp(rng, rows, vocab, scale)
    for stream in (Stream.TARGET, Stream.RECOVER):
        expected = (probs.numpy() / dense(keys, positions, stream, vocab)).argmax(axis=1)
        assert np.array_equal(choose(probs, keys, positions, stream), expected)


def test_choose_rows_over_a_whole_vocabulary():
    rng = np.random.default_rng(1)
    keys, positions = request_keys(3, 12), np.arange(12)
    probs = torch.cat([sharp(rng, 4, 49152, scale) for scale in (0.1, 2.0, 6.0)])
    expected = (probs.numpy() / dense(keys, positions, Stream.TARGET, 49152)).argmax(axis=1)
    assert np.array_equal(choose(probs, keys, positions), expected)


def test_excluded_tokens_are_never_chosen():
    rng = np.random.default_rng(2)
    rows, vocab = 400, 700
    logits = torch.from_numpy(rng.normal(size=(rows, vocab))).float()
    kept = torch.from_numpy(rng.random((rows, vocab)) < 0.01)
    kept[:, 3] = True
    kept[:100, BLOCK : 2 * BLOCK] = False  # whole blocks without a token
    probs = logits.masked_fill(~kept, float("-inf")).softmax(-1)
    keys, positions = request_keys(4, rows), np.arange(rows)
    chosen = choose(probs, keys, positions)
    assert kept.numpy()[np.arange(rows), chosen].all()
    with np.errstate(divide="ignore"):
        expected = (probs.numpy() / dense(keys, positions, Stream.TARGET, vocab)).argmax(axis=1)
    assert np.array_equal(chosen, expected)
    assert len(set(chosen.tolist())) > 50


def test_a_point_mass_is_chosen_wherever_it_stands():
    tokens = np.array([0, 1, 127, 128, 129, 255, 256, 999])
    probs = torch.zeros(len(tokens), 1000)
    probs[torch.arange(len(tokens)), torch.from_numpy(tokens)] = 1
    assert np.array_equal(choose(probs, request_keys(5, len(tokens)), np.arange(len(tokens))), tokens)


def test_scaling_a_row_changes_nothing():
    rng = np.random.default_rng(3)
    probs, keys, positions = sharp(rng, 64, 900, 2.0), request_keys(6, 64), np.arange(64)
    chosen = choose(probs, keys, positions)
    for factor in (2.0**-20, 0.5, 1024.0):  # powers of two: no rounding
        assert np.array_equal(choose(probs * factor, keys, positions), chosen)


def test_a_row_without_probability_gives_the_first_token():
    chosen = choose(torch.zeros(2, 300), request_keys(7, 2), np.arange(2))
    assert chosen.tolist() == [0, 0]


def test_one_row_is_chosen_as_among_many():
    rng = np.random.default_rng(4)
    probs, keys, positions = sharp(rng, 9, 500, 2.0), request_keys(8, 9), np.arange(9)
    alone = [int(choose(probs[r : r + 1], keys[r : r + 1], positions[r : r + 1])[0]) for r in range(9)]
    assert choose(probs, keys, positions).tolist() == alone


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 1000, 1024])
def test_block_maxima(vocab):
    probs = torch.rand(3, vocab, generator=torch.Generator().manual_seed(vocab))
    expected = torch.stack([probs[:, i : i + BLOCK].amax(-1) for i in range(0, vocab, BLOCK)], dim=1)
    assert torch.equal(block_maxima(probs), expected)


# ------------------------------------------------------------------------------------------------------- distributions


@cache
def table(seed=0, requests=8, positions=32, stream=Stream.TARGET, vocab=500):
    """E of many tokens: float32 `[requests, positions, vocab]`."""
    keys = np.repeat(request_keys(seed, requests), positions)
    return dense(keys, np.tile(np.arange(positions), requests), stream, vocab).reshape(requests, positions, vocab)


@pytest.mark.parametrize("stream", list(Stream))
def test_every_token_draws_an_exponential(stream):
    e = table(seed=10 + stream, stream=stream)
    assert (e > 0).all()
    assert stats.kstest(e.ravel(), "expon").pvalue > FALSE_ALARM
    for token in (0, 1, 127, 128, 499):
        assert stats.kstest(e[:, :, token].ravel(), "expon").pvalue > FALSE_ALARM


def test_the_test_itself_catches_a_wrong_rate():
    assert stats.kstest(table(seed=10).ravel() * 1.05, "expon").pvalue < CERTAIN


def test_order_statistics_of_a_block_are_those_of_independent_exponentials():
    """The blocks are drawn from their minimum inwards: minimum, gap to the second, and who has the minimum."""
    e = table(seed=20, vocab=4 * BLOCK).reshape(-1, BLOCK).astype(np.float64)
    ordered = np.sort(e, axis=1)
    assert stats.kstest(ordered[:, 0] * BLOCK, "expon").pvalue > FALSE_ALARM
    assert stats.kstest((ordered[:, 1] - ordered[:, 0]) * (BLOCK - 1), "expon").pvalue > FALSE_ALARM
    assert stats.kstest(ordered[:, -1], lambda x: (1 - np.exp(-x)) ** BLOCK).pvalue > FALSE_ALARM
    first = np.bincount(e.argmin(axis=1), minlength=BLOCK)
    assert stats.chisquare(first).pvalue > FALSE_ALARM


def independence(a, b):
    """p-value of independence of two samples of exponentials, over the 8 x 8 octants of their quantiles."""
    cells = [np.minimum((8 * -np.expm1(-x.ravel().astype(np.float64))).astype(int), 7) for x in (a, b)]
    counts = np.bincount(8 * cells[0] + cells[1], minlength=64).reshape(8, 8)
    return stats.chi2_contingency(counts).pvalue


def test_draws_are_independent_across_everything_that_keys_them():
    e = table(seed=30)
    pairs = {
        "next token": (e[..., :-1], e[..., 1:]),
        "next Philox block": (e[..., :-4], e[..., 4:]),
        "next noise block": (e[..., :-BLOCK], e[..., BLOCK:]),
        "next position": (e[:, :-1], e[:, 1:]),
        "next position and token": (e[:, :-1, :-1], e[:, 1:, 1:]),
        "next request": (e[:-1], e[1:]),
        "next seed": (e, table(seed=31)),
        "accept stream": (e, table(seed=30, stream=Stream.ACCEPT)),
        "recover stream": (e, table(seed=30, stream=Stream.RECOVER)),
        "draft stream": (e, table(seed=30, stream=Stream.DRAFT)),
    }
    p_values = {name: independence(a[..., ::2], b[..., ::2]) for name, (a, b) in pairs.items()}
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_the_test_itself_catches_dependence():
    e = table(seed=30)
    assert independence(e[:-1], 0.9 * e[:-1] + 0.1 * e[1:]) < CERTAIN


def test_uniforms_are_uniform_and_independent_of_what_is_recovered():
    keys, positions = np.repeat(request_keys(40, 80), 100), np.tile(np.arange(100), 80)
    u = noise.uniforms(as_int64(keys), torch.from_numpy(positions), Stream.ACCEPT).numpy()
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > FALSE_ALARM
    for token in (0, 5):
        recovered = dense(keys, positions, Stream.RECOVER, 8)[:, token]
        assert independence(-np.log1p(-u), recovered) > FALSE_ALARM


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_choices_have_the_frequencies_of_the_probabilities(scale):
    draws, vocab = 30_000, 300
    row = sharp(np.random.default_rng(5), 1, vocab, scale)
    keys, positions = np.repeat(request_keys(50, 300), 100), np.tile(np.arange(100), 300)
    chosen = choose((7 * row).expand(draws, vocab).contiguous(), keys, positions)
    counts = np.bincount(chosen, minlength=vocab)
    p = row[0].double().numpy()
    assert chi_square(counts, p) > FALSE_ALARM
    biased = p**0.9
    assert chi_square(counts, biased / biased.sum()) < CERTAIN


def chi_square(counts, p):
    expected = p / p.sum() * counts.sum()
    common = expected >= 5
    pool = [counts[~common].sum()], [expected[~common].sum()]
    if pool[1][0] < 5:
        pool = [], []
        expected = expected / expected[common].sum() * counts[common].sum()
    return stats.chisquare([*counts[common], *pool[0]], [*expected[common], *pool[1]]).pvalue
