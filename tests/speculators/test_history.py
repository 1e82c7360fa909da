"""The history index: what it finds, what it learns, that it stays bounded, and that coupling pays.

Every case is seeded and deterministic. Acceptance thresholds sit far from both the expected value and the failure they
guard against; the margins are stated where they are used.
"""

import numpy as np
import pytest

from atlas_kernels.noise import exponential, request_keys
from atlas_rl.core import Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.speculators.history.match import NEXT, RECALLED, SIBLING
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.history.store import MAX_MATCH, Archive

EOS = 1


def one_hot(**options):
    """A speculator that drafts the likeliest token: what it finds does not depend on a draw."""
    spec = HistorySpeculator(**options)
    spec.couples_noise = False
    return spec


def call(prompts, *, keys=None, seed=0, capacity=256, temperature=1.0):
    """A generation call whose requests stand at the end of their prompts."""
    lengths = np.array([len(p) for p in prompts], np.int64)
    tokens = np.full((len(prompts), capacity), 77_777, np.int32)  # garbage past the length must not matter
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    sampling = SamplingParams(max_new_tokens=capacity, temperature=temperature, eos_token_ids=(EOS,))
    keys = np.array([hash(tuple(p)) for p in prompts] if keys is None else keys, np.int64)
    return Sequences(
        tokens, lengths.copy(), lengths.copy(), keys, request_keys(seed, len(prompts)), sampling, 50_000, 0
    )


def commit(spec, sequences, rows, *, finished=False, num_accepted=0, num_drafted=0):
    """Append `rows` (request -> tokens) and let the speculator observe it."""
    requests = np.array(list(rows), np.int64)
    longest = max(len(tokens) for tokens in rows.values())
    ids = np.zeros((len(rows), longest), np.int64)
    for i, (request, tokens) in enumerate(rows.items()):
        begin = sequences.lengths[request]
        ids[i, : len(tokens)] = tokens
        sequences.token_ids[request, begin : begin + len(tokens)] = tokens
        sequences.lengths[request] += len(tokens)
    counts = np.array([len(tokens) for tokens in rows.values()], np.int64)
    zeros = np.zeros(len(rows), np.int64)
    done = np.full(len(rows), finished)
    spec.observe(sequences, Verified(requests, ids, counts, zeros + num_accepted, zeros + num_drafted, done))


def draft(spec, sequences, request, most):
    """Tokens drafted for one request."""
    result = spec.propose(sequences, np.array([request]), np.array([most]))
    return result.token_ids[0, : result.lengths[0]].tolist()


def archive(spec, prompt, completions, **options):
    """One finished call: `completions` of `prompt`, one after the other."""
    sequences = call([prompt] * len(completions), **options)
    spec.start(sequences, np.arange(len(completions)))
    for request, completion in enumerate(completions):
        commit(spec, sequences, {request: completion}, finished=True)
    spec.refresh(Rollouts(sequences), 1)


def decode(spec, sequences, completions, most=8):
    """Decode known completions; returns tokens per step, and per verified draft position (confidence, accepted)."""
    requests = np.arange(len(completions))
    ends = sequences.prompt_lengths + [len(c) for c in completions]
    spec.start(sequences, requests)
    steps, outcomes = 0, []
    while len(requests):
        result = spec.propose(sequences, requests, np.minimum(most, ends[requests] - sequences.lengths[requests] - 1))
        rows = {}
        for i, request in enumerate(requests):
            truth = completions[request][sequences.lengths[request] - sequences.prompt_lengths[request] :]
            accepted = 0
            for j in range(result.lengths[i]):
                outcomes.append((float(result.confidence[i, j]), bool(result.token_ids[i, j] == truth[j])))
                if not outcomes[-1][1]:
                    break
                accepted += 1
            rows[int(request)] = truth[: accepted + 1]
        steps += len(requests)
        over = [r for r, tokens in rows.items() if sequences.lengths[r] + len(tokens) == ends[r]]
        for finished in (False, True):
            group = {r: tokens for r, tokens in rows.items() if (r in over) == finished}
            if group:
                commit(spec, sequences, group, finished=finished)
        requests = np.array([r for r in requests if r not in over], np.int64)
    return sum(len(c) for c in completions) / steps, outcomes


class Branching:
    """A policy that chooses uniformly among `branches` phrasings at every node, with the noise of its request."""

    def __init__(self, seed, nodes=12, branches=4, phrase=4):
        rng = np.random.default_rng(seed)
        self.prompt = rng.integers(20_000, 30_000, 10).tolist()
        self.phrases = rng.integers(10, 20_000, (nodes, branches, phrase)).tolist()

    def complete(self, key):
        tokens = []
        for phrases in self.phrases:
            at = len(self.prompt) + len(tokens)
            tokens += min(phrases, key=lambda p: exponential(key, at, p[0], 0))
        return [*tokens, EOS]

    def branch_points(self):
        return [i * len(self.phrases[0][0]) for i in range(len(self.phrases))]


def run_epochs(sources, epochs, *, coupled=True, group=6):
    """Decode `epochs` calls of all sources; returns the speculator and per epoch what `decode` returned."""
    spec = HistorySpeculator(max_tokens=100_000)
    spec.couples_noise = coupled
    results = []
    for epoch in range(epochs):
        members = [s for s in sources for _ in range(group)]
        sequences = call([s.prompt for s in members], seed=100 + epoch)
        completions = [s.complete(key) for s, key in zip(members, sequences.noise_keys, strict=True)]
        results.append(decode(spec, sequences, completions))
        spec.refresh(Rollouts(sequences), epoch + 1)
    return spec, results


# -------------------------------------------------------------------------------------------------------- what it finds


def test_continues_a_repetition_of_the_request_itself():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, 22, 23, 24, 25, 30, 20, 21, 22]})
    assert draft(spec, sequences, 0, 3) == [23, 24, 25]


def test_a_periodic_text_is_drafted_beyond_what_has_been_written():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [5, 6, 7, 5, 6, 7, 5, 6]})
    assert draft(spec, sequences, 0, 8) == [7, 5, 6, 7, 5, 6, 7, 5]


def test_copies_from_its_own_prompt():
    prompt = [40, 41, 42, 43, 44, 45, 46, 47]
    spec = one_hot()
    sequences = call([prompt, prompt])  # the second request's prompt is indexed through the first
    spec.start(sequences, np.array([0, 1]))
    commit(spec, sequences, {1: [90, 41, 42, 43]})
    assert draft(spec, sequences, 1, 4) == [44, 45, 46, 47]


def test_a_running_sibling_teaches_within_the_call():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 2)
    spec.start(sequences, np.array([0, 1]))
    assert draft(spec, sequences, 1, 4) == []
    commit(spec, sequences, {0: [20, 21, 22, 23]})
    assert draft(spec, sequences, 1, 4) == [20, 21, 22, 23]


def test_a_finished_sibling_teaches_within_the_call():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 2)
    spec.start(sequences, np.array([0, 1]))
    commit(spec, sequences, {0: [20, 21, 22, EOS]}, finished=True)
    assert draft(spec, sequences, 1, 8) == [20, 21, 22, EOS]


def test_recalls_an_earlier_call():
    spec = one_hot()
    archive(spec, [10, 11, 12], [[20, 21, 22, 23, EOS]])
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    assert draft(spec, sequences, 0, 8) == [20, 21, 22, 23, EOS]


def test_learns_from_other_prompts_by_longer_contexts():
    spec = one_hot()
    archive(spec, [10, 11, 12], [[20, 21, 22, 23, 24, 25, EOS]])
    sequences = call([[50, 51, 52]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, 22, 23]})
    assert draft(spec, sequences, 0, 2) == [24, 25]


@pytest.mark.parametrize("coupled", [True, False])
def test_prefers_the_longest_match(coupled):
    spec = HistorySpeculator()
    spec.couples_noise = coupled
    long, short = [30, 31, 32, 33, 34, 35, 36, 37, 100, EOS], [90, 36, 37, 200, EOS]
    archive(spec, [10, 11, 12], [long, short, short])
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: long[:8]})
    assert draft(spec, sequences, 0, 1) == [100]


def test_no_match_runs_across_two_rollouts():
    spec = one_hot()
    archive(spec, [10, 11, 12, 13], [[20, 21, 22, 23]])
    archive(spec, [60, 61, 62, 63], [[70, 71]])
    sequences = call([[20, 21, 22, 23]])  # an archived rollout ends so; what lies behind it is another's
    spec.start(sequences, np.array([0]))
    assert draft(spec, sequences, 0, 4) == []


def test_a_draft_ends_with_the_token_that_ends_the_request():
    prompt = [30, 31, EOS, 32, 33, 34]
    spec = one_hot()
    sequences = call([prompt])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [30, 31]})
    assert draft(spec, sequences, 0, 6) == [EOS]


# ------------------------------------------------------------------------------------------------------- what it learns


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
    spec = HistorySpeculator(max_tokens=100_000)
    spec.couples_noise = coupled
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
        other = HistorySpeculator(max_tokens=100_000)
        other.load_state_dict(state)
        other.couples_noise = False
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


# ------------------------------------------------------------------------------------------------------------- the seam


def test_at_most_the_wanted_number_per_row():
    spec = one_hot()
    archive(spec, [10, 11, 12], [list(range(20, 60))])
    sequences = call([[10, 11, 12]] * 4)
    spec.start(sequences, np.arange(4))
    result = spec.propose(sequences, np.arange(4), np.array([3, 0, 40, 1]))
    assert result.lengths.tolist() == [3, 0, 40, 1]
    assert result.token_ids.shape == result.confidence.shape == (4, 40)
    assert result.token_ids[2].tolist() == list(range(20, 60))
    assert spec.propose(sequences, np.arange(4), np.zeros(4, np.int64)).lengths.tolist() == [0] * 4
    assert spec.propose(sequences, np.arange(0), np.zeros(0, np.int64)).lengths.tolist() == []


def test_rows_follow_the_order_of_requests():
    spec = one_hot()
    prompts = [[10, 11, 12], [40, 41, 42], [70, 71, 72]]
    for prompt in prompts:
        archive(spec, prompt, [[prompt[0] + 5, prompt[0] + 6, EOS]])
    sequences = call(prompts)
    spec.start(sequences, np.array([2, 0]))
    spec.start(sequences, np.array([1]))  # joins the batch later
    result = spec.propose(sequences, np.array([1, 2, 0]), np.array([1, 1, 1]))
    assert result.token_ids[:, 0].tolist() == [45, 75, 15]


def test_proposing_twice_changes_nothing():
    spec, _ = run_epochs([Branching(2)], 2)
    sequences = call([Branching(2).prompt] * 3, seed=4)
    spec.start(sequences, np.arange(3))
    first, second = (spec.propose(sequences, np.arange(3), np.array([8, 5, 2])) for _ in range(2))
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    assert (sequences.token_ids[:, len(Branching(2).prompt) :] == 77_777).all()  # speculators read, never write


@pytest.mark.parametrize("prompt", [[5], [5, 6]])
def test_prompts_shorter_than_a_context(prompt):
    spec = one_hot()
    for _ in range(2):
        sequences = call([prompt])
        spec.start(sequences, np.array([0]))
        assert len(draft(spec, sequences, 0, 4)) <= 4
        commit(spec, sequences, {0: [7, 8, 9, EOS]}, finished=True)
        spec.refresh(Rollouts(sequences), 1)


def test_a_sibling_that_fills_its_row_does_not_run_into_the_next():
    spec = one_hot()
    prompt = [10, 11, 12]
    sequences = call([prompt] * 3, capacity=7)
    spec.start(sequences, np.arange(3))
    commit(spec, sequences, {0: [20, 21, 22, 23]}, finished=True)
    assert draft(spec, sequences, 2, 4) == [20, 21, 22, 23]
    assert draft(spec, sequences, 1, 8)[:4] == [20, 21, 22, 23]


def test_sequences_that_were_not_started_are_refused():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    with pytest.raises(RuntimeError, match="not started"):
        draft(spec, sequences, 0, 1)


def test_an_abandoned_call_leaves_no_trace_but_its_finished_requests():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 3)
    spec.start(sequences, np.arange(3))
    commit(spec, sequences, {0: [20, 21, 22, EOS]}, finished=True)
    commit(spec, sequences, {1: [30, 31, 32, 33]})
    sequences.token_ids[2, 3:9] = 31  # half appended, never observed
    sequences.lengths[2] = 9
    after = call([[10, 11, 12], [30, 31, 32, 33]])
    spec.start(after, np.arange(2))
    assert draft(spec, after, 0, 8) == [20, 21, 22, EOS]
    assert draft(spec, after, 1, 8) == []
    assert spec.num_archived_tokens == 3 + 4 + 1  # prompt, completion, separator


def test_a_call_is_archived_once():
    spec = one_hot()
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    commit(spec, sequences, {0: [20, 21, EOS]}, finished=True)
    spec.state_dict()
    stored = spec.num_archived_tokens
    for version in (1, 2):
        spec.refresh(Rollouts(sequences), version)
    assert stored == spec.num_archived_tokens == 7
    assert spec.policy_version == 2


def test_rollouts_made_elsewhere_are_adopted():
    spec = one_hot()
    foreign = call([[10, 11, 12, 20, 21, 22, EOS]])
    foreign.prompt_lengths[:] = 3
    foreign.prompt_keys[:] = hash((10, 11, 12))
    spec.refresh(Rollouts(foreign), 5)
    sequences = call([[10, 11, 12]])
    spec.start(sequences, np.array([0]))
    assert draft(spec, sequences, 0, 8) == [20, 21, 22, EOS]


# --------------------------------------------------------------------------------------------------------------- memory


def rollout(rng, length=50):
    return rng.integers(10, 30_000, length).astype(np.int32)


def test_the_ring_forgets_the_oldest_and_keeps_the_newest():
    rng = np.random.default_rng(0)
    spec = one_hot(max_tokens=1_000)
    prompts = [rollout(rng, 6).tolist() for _ in range(60)]
    completions = [[*rollout(rng, 40).tolist(), EOS] for _ in range(60)]
    for prompt, completion in zip(prompts, completions, strict=True):
        archive(spec, prompt, [completion])
    assert spec.num_archived_tokens == 1_000
    sequences = call(prompts)
    spec.start(sequences, np.arange(60))
    known = spec.propose(sequences, np.arange(60), np.full(60, 41)).lengths == 41
    fits = 1_000 // (6 + 41 + 1)
    assert known[-fits:].all()
    assert not known[: -fits - 1].any()


def test_a_ring_that_wraps_never_links_out_of_order_or_out_of_bounds():
    rng = np.random.default_rng(1)
    ring = Archive(300)
    for i in range(200):
        # Few different tokens: chains are long, and heads and links to overwritten nodes abound.
        tokens = rng.integers(0, 3, rng.integers(1, 90)).astype(np.int32)
        ring.append(tokens, min(4, len(tokens)), i % 3, index_prompt=bool(i % 2), policy_version=i)
        nodes, heads, (write, stored) = ring.view.nodes, ring.view.heads, ring.view.cursor.tolist()
        assert 0 <= write < 300
        assert stored <= 300
        assert nodes[:, 1:3].min() >= 0
        assert max(nodes[:, 1:3].max(), heads.max()) <= 300
    tokens, infos = ring.oldest_first()
    assert tokens[-1] == -1
    assert infos[-1] == 199
    assert ring.oldest_policy_version() > 150


def test_decoding_against_a_wrapping_ring_of_few_tokens():
    """Every kind of stale link is met; drafts must stay tokens that were really written."""
    rng = np.random.default_rng(2)
    spec = HistorySpeculator(max_tokens=200)
    for seed in range(12):
        completions = [[*rng.integers(10, 14, 60).tolist(), EOS] for _ in range(3)]
        sequences = call([[10, 11]] * 3, seed=seed)
        decode(spec, sequences, completions)
        ids = spec._cursors[0, : spec._counts[0], NEXT]
        assert np.isin(ids, [10, 11, 12, 13, EOS]).all()
        spec.refresh(Rollouts(sequences), seed)
    assert spec.num_archived_tokens == 200


def test_a_rollout_longer_than_the_ring_keeps_its_end():
    ring = Archive(2 * MAX_MATCH)
    ring.append(np.arange(500, dtype=np.int32), 3, 1, index_prompt=True, policy_version=0)
    assert ring.oldest_first()[0].tolist() == [*range(500 - 2 * MAX_MATCH + 1, 500), -1]


@pytest.mark.parametrize("num_tokens", [10_000, 1_000_000])
def test_bytes_per_token_stay_under_the_bar(num_tokens):
    rng = np.random.default_rng(0)
    ring = Archive(4_000_000)
    worst = 0.0
    while len(ring) < num_tokens:
        ring.append(rollout(rng, 400), 40, 1, index_prompt=True, policy_version=0)
        if len(ring) > 9_000:
            worst = max(worst, ring.nbytes / len(ring))
    assert worst <= 40


def test_a_bound_too_small_is_refused():
    with pytest.raises(ValueError, match="max_tokens"):
        HistorySpeculator(max_tokens=10)


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("max_tokens", [600, 100_000])  # a ring that has wrapped, and one that has not
def test_a_restored_speculator_drafts_identically(max_tokens):
    source = Branching(11)
    spec = HistorySpeculator(max_tokens=max_tokens)
    for epoch in range(3):
        sequences = call([source.prompt] * 6, seed=epoch)
        decode(spec, sequences, [source.complete(key) for key in sequences.noise_keys])
    restored = HistorySpeculator(max_tokens=max_tokens)
    restored.load_state_dict(spec.state_dict())
    assert restored.num_archived_tokens == spec.num_archived_tokens
    results = []
    for each in (spec, restored):
        sequences = call([source.prompt] * 6, seed=50)
        results.append(decode(each, sequences, [source.complete(key) for key in sequences.noise_keys]))
    assert results[0][0] > 2
    assert results[0] == results[1]


def test_a_state_may_be_taken_while_a_call_runs():
    spec = one_hot()
    sequences = call([[10, 11, 12]] * 2)
    spec.start(sequences, np.arange(2))
    commit(spec, sequences, {0: [20, 21, 22, EOS]}, finished=True)
    spec.state_dict()
    assert draft(spec, sequences, 1, 8) == [20, 21, 22, EOS]


@pytest.mark.parametrize("change", [{"kind": "draft_lm"}, {"version": 999}, {"model": {}}])
def test_a_state_of_another_kind_is_refused(change):
    spec = one_hot()
    with pytest.raises(ValueError, match="history index"):
        spec.load_state_dict({**spec.state_dict(), **change})
