"""The history index learns which of its sources to believe, and drawing with the policy's noise pays."""

from __future__ import annotations

import numpy as np
import pytest

from atlas_kernels.noise import request_keys
from atlas_rl.speculators.history.match import RECALLED, SIBLING
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.speculators.history.calls import EOS, Branching, archive, call, commit, one_hot, run_epochs, speculator


def test_acceptance_rises_with_repetition():
    _, results = run_epochs([Branching(seed) for seed in range(4)], 4)
    lengths = [length for length, _ in results]
    assert lengths[0] < lengths[1] < lengths[3]
    assert lengths[3] > 2 * lengths[0]


def at_branch_points(coupled):
    """Share of branch points where a single drafted token is the one the policy takes, after many rollouts.

    Also the mean 1 - TV and its floor (1 - TV) / (1 + TV), which drawing with common noise guarantees,
    where TV is between the policy and the counts of what followed the same phrase in the archive.
    """
    source = Branching(7, nodes=16)
    spec = speculator(coupled=coupled, max_tokens=100_000)
    history = [source.complete(key) for key in request_keys(5, 128)]
    archive(spec, source.prompt, history, seed=5)
    sequences = call([source.prompt] * 24, seed=6)
    completions = [source.complete(key) for key in sequences.noise_keys]
    spec.start(sequences, np.arange(24))
    right, variation = [], []
    for at in range(len(completions[0])):
        result = spec.propose(sequences, np.arange(24), np.ones(24, np.int64))
        if at in source.branch_points():
            firsts = [phrase[0] for phrase in source.phrases[at // 4]]
            for i, completion in enumerate(completions):
                right.append(bool(result.lengths[i]) and result.token_ids[i, 0] == completion[at])
                seen = [h[at] for h in history if at == 0 or h[at - 1] == completion[at - 1]]
                variation.append(0.5 * sum(abs(seen.count(f) / len(seen) - 0.25) for f in firsts))
        commit(spec, sequences, {i: [completions[i][at]] for i in range(24)})
    variation = np.array(variation)
    return float(np.mean(right)), float((1 - variation).mean()), float(((1 - variation) / (1 + variation)).mean())


def test_coupled_drafts_are_accepted_near_one_minus_tv_and_argmax_near_max_p():
    coupled, optimum, floor = at_branch_points(coupled=True)
    argmax, _, _ = at_branch_points(coupled=False)
    # 384 branch points: three standard errors are 0.06 for the coupled draft and 0.07 for the argmax of 1/4.
    assert argmax < 0.25 + 0.07
    assert floor - 0.06 < coupled < optimum + 0.06
    assert coupled > argmax + 0.4


def test_one_hot_drafts_do_not_depend_on_the_noise():
    spec, _ = run_epochs([Branching(3)], 2, coupled=False)
    state = spec.state_dict()
    results = []
    for seed in (1, 2):
        other = one_hot(max_tokens=100_000)
        other.load_state_dict(state)
        sequences = call([Branching(3).prompt], seed=seed)
        other.start(sequences, np.array([0]))
        results.append(other.propose(sequences, np.array([0]), np.array([8])))
    assert results[0].lengths[0] == 8
    np.testing.assert_array_equal(results[0].token_ids, results[1].token_ids)
    np.testing.assert_array_equal(results[0].confidence, results[1].confidence)


def test_coupled_drafts_do_depend_on_the_noise():
    spec, _ = run_epochs([Branching(3)], 3)
    sequences = call([Branching(3).prompt] * 16, seed=9)
    spec.start(sequences, np.arange(16))
    firsts = spec.propose(sequences, np.arange(16), np.ones(16, np.int64)).token_ids[:, 0]
    assert len(set(firsts.tolist())) > 1


def test_greedy_sampling_drafts_the_likeliest_token():
    spec = HistorySpeculator()
    archive(spec, [10, 11, 12], [[20, 21, EOS]] * 6 + [[30, 31, EOS]])
    sequences = call([[10, 11, 12]] * 32, temperature=0.0)
    spec.start(sequences, np.arange(32))
    assert set(spec.propose(sequences, np.arange(32), np.ones(32, np.int64)).token_ids[:, 0].tolist()) == {20}


@pytest.mark.parametrize("coupled", [True, False])
def test_confidence_ranks_and_matches_acceptance(coupled):
    _, results = run_epochs([Branching(seed) for seed in range(5)], 5, coupled=coupled)
    confidence, accepted = np.array([o for _, outcomes in results[1:] for o in outcomes]).T
    assert (confidence > 0).all()
    assert (confidence < 1).all()
    rates = [
        accepted[(confidence >= low) & (confidence < high)].mean() for low, high in ((0, 0.4), (0.4, 0.8), (0.8, 1))
    ]
    assert rates[0] < rates[1] < rates[2]
    # Brier score against the best constant: a useful confidence explains a good part of the variance.
    assert ((confidence - accepted) ** 2).mean() < 0.75 * accepted.var()
    assert abs(confidence.mean() - accepted.mean()) < 0.05


def test_the_source_that_proves_right_gains_weight():
    """The archive and a sibling contradict each other after every other token, and the sibling is always right."""
    rng = np.random.default_rng(0)
    spec = one_hot()
    for _ in range(20):
        prompt = rng.integers(100, 9_000, 6).tolist()
        shared, old, new = rng.integers(100, 9_000, (3, 12)).tolist()
        archive(spec, prompt, [[t for pair in zip(shared, old, strict=True) for t in pair]])
        sequences = call([prompt] * 2)
        spec.start(sequences, np.arange(2))
        for request in range(2):
            for pair in zip(shared, new, strict=True):
                commit(spec, sequences, {request: list(pair)})
    weights = spec._model.log_weights - HistorySpeculator()._model.log_weights
    assert weights[SIBLING].max() > 0.1
    assert weights[RECALLED].min() < -0.1
    assert weights[SIBLING].sum() > 0 > weights[RECALLED].sum()
