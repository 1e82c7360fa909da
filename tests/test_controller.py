"""The controller in synthetic worlds: known costs, known acceptance, times that are told, never a real clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from atlas_rl.rollout.acceptance import AcceptanceModel
from atlas_rl.rollout.controller import Admission, Controller, FixedController, Step
from atlas_rl.rollout.cost import CostModel, DraftCost, _bucket
from atlas_rl.rollout.depth_search import search
from atlas_rl.rollout.goodput import GoodputController
from atlas_rl.speculators.base import Draft, Verified

RIGHT, WRONG = 1, 0
ROOM = 64
CONTEXT = 100  # tokens per request


@dataclass
class Arm:
    """A speculator of a synthetic world.

    `confidence` gives `[batch, depth]`, `truth` the probability that a position of that confidence is accepted, and
    `draft_s` the seconds of a call of that depth.
    """

    confidence: Callable[[int, int], np.ndarray]
    truth: Callable[[np.ndarray], np.ndarray]
    draft_s: Callable[[int], float] = lambda depth: 1e-5 * depth
    per_request_s: float = 0.0  # on top, for every request and position


def sure(confidence: float, truth: float | None = None, **options) -> Arm:
    """Every draft has the same confidence, which is right or not."""
    wanted = confidence if truth is None else truth
    return Arm(lambda batch, depth: np.full((batch, depth), confidence), lambda c: np.full(c.shape, wanted), **options)


@dataclass
class World:
    """Runs a controller against known costs and acceptance, and keeps what it did."""

    controller: Controller
    cost: Callable[[int], float]
    arms: dict[str, Arm]
    noise: float = 0.02
    draft_probs: torch.Tensor | None = None  # as drafts have them that rejection verifies
    drafting_costs_s: float = 0.0  # seconds of a drafting step that neither forward nor drafter shows
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    asked: list[dict[str, np.ndarray]] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    records: list[dict | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def step(self, batch: int, room: int = ROOM) -> None:
        step = Step(np.full(batch, room), batch * CONTEXT, list(self.arms))
        right = {}
        while plan := self.controller.plan(step):
            for name, most in plan.items():
                depth, arm = int(most.max(initial=0)), self.arms[name]
                confidence = arm.confidence(batch, depth).astype(np.float32)
                right[name] = self.rng.random((batch, depth)) < arm.truth(confidence)
                step.asked[name] = most
                step.drafts[name] = Draft(
                    np.where(right[name], RIGHT, WRONG), most.copy(), confidence, self.draft_probs
                )
                step.draft_s[name] = arm.draft_s(depth) + arm.per_request_s * depth * int((most > 0).sum())
        admission = self.controller.admit(step)
        accepted = np.zeros(batch, np.int64)
        for row, (arm, length) in enumerate(zip(admission.arms, admission.lengths, strict=True)):
            if length:
                stands = right[list(self.arms)[arm]][row, :length]
                accepted[row] = length if stands.all() else stands.argmin()
        forward_s = self.cost(batch + int(admission.lengths.sum())) * (1 + self.noise * abs(self.rng.normal()))
        tokens = np.full((batch, int(accepted.max()) + 1), RIGHT)
        verified = Verified(
            np.arange(batch), tokens, accepted + 1, accepted, admission.lengths.copy(), np.zeros(batch, bool)
        )
        draft_s = sum(step.draft_s.values())
        step_s = forward_s + draft_s + (self.drafting_costs_s if admission.lengths.any() else 0.0)
        self.records.append(self.controller.observe(step, admission, verified, forward_s, step_s))
        self.asked.append(step.asked)
        self.admissions.append(admission)
        self.seconds.append(forward_s + draft_s)
        self.tokens.append(int(accepted.sum()) + batch)

    def run(self, steps: int, batch: int) -> World:
        for _ in range(steps):
            self.step(batch)
        return self

    def goodput(self, last: int = 0) -> float:
        """Tokens per second, of the last steps where given."""
        return sum(self.tokens[-last:]) / sum(self.seconds[-last:])

    def mean_length(self, last: int) -> float:
        """Admitted drafts per request and step."""
        return float(np.mean([admission.lengths.mean() for admission in self.admissions[-last:]]))


def world(cost: Callable[[int], float], **arms: Arm) -> World:
    return World(GoodputController(tuple(arms)), cost, arms)


def affine(tokens: int) -> float:
    return 0.050 + 0.002 * tokens


def shallow(tokens: int) -> float:
    return 0.050 + 0.0005 * tokens


def proportional(tokens: int) -> float:
    return 0.005 * tokens


def flat(tokens: int) -> float:
    return 0.050


def saturating(tokens: int) -> float:
    """Free up to 16 tokens, then every token costs."""
    return 0.050 + 0.004 * max(0, tokens - 16)


# --------------------------------------------------------------------------------------------------------- cost model


def observed(cost, sizes, samples=15, seed=0, noise=0.03, outliers=0.1):
    rng, model = np.random.default_rng(seed), CostModel()
    for size in np.repeat(sizes, samples):
        slow = 5.0 if rng.random() < outliers else 1.0
        model.observe(int(size), cost(int(size)) * slow * (1 + noise * rng.normal()))
    return model


def test_without_evidence_there_is_no_prediction():
    assert CostModel().predict(8) is None


@pytest.mark.parametrize("seed", range(5))
def test_an_affine_cost_is_recovered_under_noise_and_outliers(seed):
    table = observed(affine, [4, 6, 8, 12, 16, 24, 40, 64], seed=seed).predict(80)
    for size in range(4, 81):
        assert table[size] == pytest.approx(affine(size), rel=0.1)


def test_a_step_in_the_cost_shows_where_it_was_seen():
    def stepped(tokens):
        return 0.02 if tokens <= 8 else 0.05

    sizes = [2, 4, 6, 8, 9, 10, 12, 16]
    table = observed(stepped, sizes, outliers=0).predict(16)
    for size in sizes:
        assert table[size] == pytest.approx(stepped(size), rel=0.3)
    assert table[9] > 1.7 * table[8]


def test_one_size_is_enough_to_start_with():
    model = observed(affine, [8], outliers=0)
    table = model.predict(64)
    assert table[8] == pytest.approx(affine(8), rel=0.05)
    assert table[8] < table[16] < table[64] < 8 * table[8]  # dearer, but not in proportion


@pytest.mark.parametrize("seed", range(8))
def test_more_tokens_are_never_predicted_to_be_cheaper(seed):
    rng, model = np.random.default_rng(seed), CostModel()
    for _ in range(60):
        model.observe(int(rng.integers(1, 200)), float(rng.exponential(0.05)))
    table = model.predict(400)
    assert table.shape == (401,)
    assert (table > 0).all()
    assert (np.diff(table) >= 0).all()


def test_a_machine_that_slows_down_is_followed():
    model = observed(affine, [4, 8, 16], outliers=0)
    for size in (4, 8, 16):
        for _ in range(15):
            model.observe(size, 2 * affine(size))
    assert model.predict(16)[8] == pytest.approx(2 * affine(8), rel=0.05)


def test_buckets_are_ordered_and_narrow():
    sizes = np.arange(1, 301)
    buckets = np.array([_bucket(int(size)) for size in sizes])
    assert (buckets <= sizes).all()
    assert (np.diff(buckets) >= 0).all()
    assert all(_bucket(int(bucket)) == bucket for bucket in buckets)
    assert (buckets[:15] == sizes[:15]).all()
    assert ((sizes - buckets) <= sizes / 8).all()


def test_every_size_is_predicted_as_it_was_seen():
    for size in range(1, 301):
        model = CostModel()
        for _ in range(15):
            model.observe(size, 0.04)
        assert model.predict(300)[size] == pytest.approx(0.04, rel=0.15), size


def test_a_flat_cost_is_flat_across_every_bucket_edge():
    model = CostModel()
    for size in range(1, 301):
        model.observe(size, 0.04)
    assert np.allclose(model.predict(300)[1:], 0.04, rtol=0.02)


def test_a_longer_table_begins_with_the_shorter_one():
    model = observed(lambda tokens: 0.02 if tokens <= 12 else 0.05, [1, 4, 12, 30], outliers=0)
    short = model.predict(10).copy()
    assert np.array_equal(model.predict(300)[:11], short)
    assert np.array_equal(model.predict(10), short)


def test_what_reading_the_context_costs_is_told_apart_from_the_tokens():
    rng, model = np.random.default_rng(0), CostModel()
    for _ in range(60):
        for size in (4, 8, 16):
            context = int(rng.integers(500, 20_000))
            model.observe(size, affine(size) + 2e-6 * context, context)
    for context in (1000, 15_000):
        assert model.predict(16, context)[8] == pytest.approx(affine(8) + 2e-6 * context, rel=0.1)


def test_contexts_that_cost_nothing_stay_free():
    rng, model = np.random.default_rng(0), CostModel()
    for _ in range(200):
        model.observe(8, affine(8) * (1 + 0.05 * rng.normal()), int(rng.integers(500, 20_000)))
    assert model.predict(8, 20_000)[8] == pytest.approx(model.predict(8, 500)[8], rel=0.05)


def drafted(seconds, calls, seed=0, outliers=0.05):
    rng, model = np.random.default_rng(seed), DraftCost()
    for rows, depth in calls:
        slow = 20.0 if rng.random() < outliers else 1.0
        model.observe(rows, depth, seconds(rows, depth) * slow * (1 + 0.03 * rng.normal()))
    return model


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_of_drafting_is_recovered_under_noise_and_outliers(seed):
    def seconds(rows, depth):
        return 0.002 + 0.001 * depth + 0.0002 * rows * depth

    rng = np.random.default_rng(seed)
    model = drafted(seconds, [(int(rng.integers(1, 17)), int(rng.integers(1, 9))) for _ in range(64)], seed)
    for rows, depth in ((1, 1), (4, 4), (16, 2), (16, 8)):
        assert model.predict(rows, depth) == pytest.approx(seconds(rows, depth), rel=0.35)


def test_one_draft_says_in_proportion_to_its_depth():
    model = drafted(lambda rows, depth: 0.01 * depth, [(8, 4)], outliers=0)
    assert model.predict(8, np.array([2, 4, 8])) == pytest.approx([0.02, 0.04, 0.08], rel=0.15)
    with pytest.raises(ValueError, match="no call"):
        DraftCost().predict(8, 4)


def test_no_draft_is_predicted_to_take_less_than_nothing():
    rng = np.random.default_rng(0)
    model = drafted(lambda rows, depth: float(rng.exponential(0.01)), [(i % 7 + 1, i % 5 + 1) for i in range(40)])
    assert (model.predict(1, np.arange(17)) >= 0).all()


# --------------------------------------------------------------------------------------------------- acceptance model


def test_boasting_at_far_positions_is_found_out_there():
    rng, model = np.random.default_rng(0), AcceptanceModel()
    confidence = np.full((8, 6), 0.8, np.float32)
    truth = np.array([0.8, 0.8, 0.3, 0.3, 0.3, 0.3])
    for _ in range(400):
        model.observe(confidence, *verify(confidence, truth, rng))
    assert model.estimate(confidence)[0] == pytest.approx(truth, abs=0.08)


def test_the_calibration_error_is_that_of_estimates_made_before_the_outcome():
    rng, model = np.random.default_rng(0), AcceptanceModel()
    assert model.take_calibration() == (0, 0.0)
    confidence = np.full((500, 1), 0.9, np.float32)
    model.observe(confidence, *verify(confidence, 0.4, rng))
    scored, error = model.take_calibration()
    assert scored == 500
    assert error == pytest.approx(0.5, abs=0.05)
    model.observe(confidence, *verify(confidence, 0.4, rng))
    assert model.take_calibration()[1] < 0.1
    assert model.take_calibration() == (0, 0.0)


def test_the_committed_tokens_judge_every_draft():
    verified = Verified(np.arange(4), np.array([[5, 6, 7], [5, 6, 7], [5, 0, 0], [5, 6, 0]]), np.array([3, 3, 1, 2]),
                        np.array([2, 2, 0, 1]), np.array([2, 2, 0, 1]), np.zeros(4, bool))  # fmt: skip
    draft = Draft(
        np.array([[5, 6, 7, 8], [5, 9, 7, 8], [5, 6, 7, 8], [9, 0, 0, 0]]), np.array([4, 4, 4, 1]),
        np.full((4, 4), 0.5, np.float32),
    )  # fmt: skip
    tried, accepted = verified.outcome_of(draft)
    assert tried.tolist() == [3, 2, 1, 1]
    assert accepted.tolist() == [3, 1, 1, 0]


def verify(confidence, truth, rng):
    """(num_drafted, num_accepted) of drafts that are verified whole."""
    right = rng.random(confidence.shape) < truth
    accepted = np.where(right.all(axis=1), confidence.shape[1], right.argmin(axis=1))
    return np.full(len(confidence), confidence.shape[1]), accepted


def calibration_error(model, truth):
    grid = np.linspace(0.05, 0.95, 40, dtype=np.float32)
    return float(np.abs(model.estimate(grid[None])[0] - truth(grid)).mean())


def test_without_data_the_speculators_own_confidence_stands():
    confidence = np.array([[0.1, 0.5, 0.9]], np.float32)
    assert np.allclose(AcceptanceModel().estimate(confidence), confidence, atol=1e-6)


@pytest.mark.parametrize(
    "truth", [lambda c: c**3, lambda c: np.sqrt(c), lambda c: 0.1 + 0 * c], ids=["boaster", "modest", "constant"]
)
def test_calibration_error_falls_with_data(truth):
    rng, model, errors = np.random.default_rng(0), AcceptanceModel(), []
    errors.append(calibration_error(model, truth))
    for rounds in (10, 100, 1000):
        for _ in range(rounds):
            confidence = rng.uniform(0.02, 0.98, size=(8, 4)).astype(np.float32)
            model.observe(confidence, *verify(confidence, truth(confidence), rng))
        errors.append(calibration_error(model, truth))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.04
    assert errors[-1] < 0.4 * errors[0]


def test_what_lies_behind_a_rejection_says_nothing():
    """The second position is right 9 times of 10, but seen half the time; its acceptance is not 0.45."""
    rng, model = np.random.default_rng(1), AcceptanceModel()
    confidence = np.tile(np.array([0.2, 0.7], np.float32), (4000, 1))
    model.observe(confidence, *verify(confidence, np.array([0.5, 0.9]), rng))
    first, second = model.estimate(confidence[:1])[0]
    assert first == pytest.approx(0.5, abs=0.03)
    assert second == pytest.approx(0.9, abs=0.03)


def test_only_verified_positions_count():
    """Drafts that were trimmed, or stand behind an accepted ending token, are neither accepted nor rejected."""
    model = AcceptanceModel()
    confidence = np.full((500, 3), 0.6, np.float32)
    confidence[:, 2] = 0.1  # a bin of its own
    model.observe(confidence, np.full(500, 2), np.full(500, 2))
    accepted, untouched = model.estimate(np.array([[0.6, 0.1]], np.float32))[0]
    assert accepted > 0.98
    assert untouched == pytest.approx(0.1, abs=1e-6)
    model.observe(np.zeros((4, 0), np.float32), np.zeros(4, np.int64), np.zeros(4, np.int64))


def test_certain_confidences_stay_finite():
    model, extremes = AcceptanceModel(), np.array([[0.0, 1.0]], np.float32)
    model.observe(extremes, np.array([2]), np.array([1]))
    estimate = model.estimate(extremes)
    assert np.isfinite(estimate).all()
    assert (estimate >= 0).all()
    assert (estimate <= 1).all()


def test_new_evidence_outweighs_old_in_time():
    rng, model = np.random.default_rng(2), AcceptanceModel()
    confidence = np.full((8, 2), 0.5, np.float32)
    for truth, rounds in ((0.1, 1500), (0.9, 1500)):
        for _ in range(rounds):
            model.observe(confidence, *verify(confidence, truth, rng))
        assert model.estimate(confidence)[0, 0] == pytest.approx(truth, abs=0.1)


def test_a_policy_update_discounts_what_was_learned():
    model = AcceptanceModel()
    confidence = np.full((40, 1), 0.5, np.float32)
    model.observe(confidence, np.ones(40, np.int64), np.zeros(40, np.int64))
    estimates = [model.estimate(confidence)[0, 0]]
    for _ in range(8):
        model.policy_updated()
        estimates.append(model.estimate(confidence)[0, 0])
    assert estimates == sorted(estimates)
    assert estimates[0] < 0.12
    assert 0.25 < estimates[-1] < 0.5


# --------------------------------------------------------------------------------------------------------- controller


def test_nothing_is_drafted_before_a_plain_forward_is_known():
    run = world(affine, cheap=sure(0.9))
    assert run.controller.plain_forward_s(4, 0) is None
    run.step(batch=4)
    assert run.admissions[0].lengths.sum() == 0
    assert run.controller.plain_forward_s(4, 0) == pytest.approx(affine(4), rel=0.1)


def test_no_more_is_asked_or_admitted_than_there_is_room_for():
    run = world(flat, cheap=sure(0.97))
    for step in range(150):
        run.step(batch=4, room=step % 5)
        for most in run.asked[-1].values():
            assert most.max() <= step % 5
        assert run.admissions[-1].lengths.max() <= step % 5


def test_hopeless_drafts_are_not_verified():
    """The drafter boasts: it claims 0.6 and is right once in fifty times."""
    run = world(affine, cheap=sure(0.6, truth=0.02)).run(400, batch=8)
    assert run.mean_length(last=200) < 0.02
    assert run.mean_length(last=400) > 0  # it had its chance


def test_drafts_that_cost_as_much_as_they_bring_are_not_verified():
    run = world(proportional, cheap=sure(0.85)).run(400, batch=8)
    assert run.mean_length(last=200) < 0.1


def test_drafts_are_long_where_verification_is_free_and_acceptance_high():
    run = world(flat, cheap=sure(0.95)).run(200, batch=4)
    assert run.mean_length(last=100) > 8


def test_lengths_follow_the_confidence_of_each_row():
    chances = np.array([0.97, 0.2, 0.97, 0.2, 0.7, 0.7])
    mixed = Arm(lambda batch, depth: np.repeat(chances[:, None], depth, axis=1), lambda c: c)
    run = world(affine, cheap=mixed).run(300, batch=6)
    mean = np.mean([admission.lengths for admission in run.admissions[-150:]], axis=0)
    assert mean[[0, 2]].min() > 4
    assert mean[[1, 3]].max() < 0.5
    assert mean[[4, 5]].min() > mean[[1, 3]].max()
    assert mean[[4, 5]].max() < mean[[0, 2]].min()


def test_each_request_uses_the_more_promising_draft():
    even = np.arange(6) % 2 == 0

    def chances(rows):
        return lambda batch, depth: np.repeat(np.where(rows, 0.95, 0.3)[:, None], depth, axis=1)

    run = world(affine, a=Arm(chances(even), lambda c: c), b=Arm(chances(~even), lambda c: c)).run(200, batch=6)
    last = run.admissions[-20:]
    assert all((admission.lengths > 0).all() or not admission.lengths.any() for admission in last)
    arms = np.array([admission.arms for admission in last if admission.lengths.any()])
    assert (arms == np.where(even, 0, 1)).all()


def test_drafts_grow_longer_as_the_batch_shrinks():
    run = world(saturating, cheap=sure(0.8))
    lengths = []
    for batch in (32, 16, 8, 4, 2):
        run.run(150, batch)
        lengths.append(run.mean_length(last=75))
    assert lengths == sorted(lengths)
    assert lengths[0] < 0.7
    assert lengths[-1] > 4


def test_a_costly_arm_that_wins_is_used():
    run = world(affine, costly=sure(0.9, draft_s=lambda depth: 0.005 * depth)).run(300, batch=8)
    asked = [bool(plan) for plan in run.asked[-200:]]
    assert np.mean(asked) > 0.9
    assert run.goodput(last=200) > 1.4 * 8 / affine(8)


def test_a_costly_arm_that_loses_is_tried_dropped_and_rarely_tried_again():
    run = world(affine, costly=sure(0.5, draft_s=lambda depth: 0.06 * depth)).run(1500, batch=8)
    asked = np.array([bool(plan) for plan in run.asked])
    assert asked[:20].sum() >= 1
    assert asked[100:].mean() < 0.03
    assert asked[100:].sum() >= 1


def test_a_costly_arm_has_to_beat_the_cheap_one():
    """Alone it would win; beside a free drafter that is nearly as good it does not pay."""
    costly = sure(0.85, draft_s=lambda depth: 0.02 * depth)
    both = world(affine, cheap=sure(0.8), costly=costly).run(600, batch=4)
    alone = world(affine, costly=costly).run(600, batch=4)
    assert np.mean(["costly" in plan for plan in both.asked[200:]]) < 0.1
    assert np.mean(["costly" in plan for plan in alone.asked[200:]]) > 0.8
    assert np.mean(["cheap" in plan for plan in both.asked[200:]]) > 0.9


ADVERSE = {
    "hopeless": (affine, sure(0.6, truth=0.02)),
    "proportional": (proportional, sure(0.9)),
    "hopeless and costly": (affine, sure(0.6, truth=0.02, draft_s=lambda depth: 0.02 * depth)),
    "costly": (affine, sure(0.5, draft_s=lambda depth: 0.06 * depth)),
    "large batch": (saturating, sure(0.3)),
}


@pytest.mark.parametrize("name", ADVERSE)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_run_is_not_slower_than_without_speculation(name, batch):
    """Everything counted: learning, trials, and drafts that were in vain."""
    cost, arm = ADVERSE[name]
    run = world(cost, only=arm).run(600, batch)
    plain = World(GoodputController(()), cost, {}).run(600, batch)
    assert run.goodput() > 0.97 * plain.goodput()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [flat, affine, saturating, proportional])
def test_a_run_is_nearly_as_fast_as_with_the_best_fixed_length(cost, chance, batch):
    arms = {"cheap": sure(chance)}
    run = world(cost, **arms).run(300, batch)
    fixed = [World(FixedController(["cheap"], "cheap", k), cost, arms).run(60, batch) for k in (1, 2, 4, 8, 16)]
    best = max(batch / cost(batch), *(other.goodput() for other in fixed))
    assert run.goodput(last=200) > 0.9 * best


def test_what_plain_decoding_costs_stays_known_while_everything_is_drafted():
    run = world(affine, cheap=sure(0.95)).run(400, batch=8)
    assert run.mean_length(last=300) > 2
    assert run.controller.plain_forward_s(8, 8 * CONTEXT) == pytest.approx(affine(8), rel=0.1)


def test_outliers_do_not_confuse_it():
    rng = np.random.default_rng(3)

    def hiccups(tokens):
        return affine(tokens) * (10 if rng.random() < 0.05 else 1)

    calm, rough = world(affine, cheap=sure(0.8)), world(hiccups, cheap=sure(0.8))
    assert rough.run(400, batch=8).mean_length(200) == pytest.approx(calm.run(400, batch=8).mean_length(200), rel=0.3)


def test_a_policy_update_gives_a_failed_drafter_another_chance():
    arm = sure(0.6, truth=0.02)
    run = world(affine, cheap=arm).run(60, batch=8)
    assert run.mean_length(last=20) == 0
    arm.truth = lambda c: np.full(c.shape, 0.9)  # its refresh has cured it
    for _ in range(20):
        run.controller.policy_updated({})
        run.run(20, batch=8)
    assert run.mean_length(last=20) > 1


def test_the_fixed_controller_is_fixed():
    run = World(FixedController(["a", "b"], "b", 3), affine, {"a": sure(0.9), "b": sure(0.05)})
    run.run(50, batch=4)
    assert all(list(plan) == ["b"] for plan in run.asked)
    assert all((admission.lengths == 3).all() and (admission.arms == 1).all() for admission in run.admissions)
    run.step(batch=4, room=2)
    assert (run.admissions[-1].lengths == 2).all()
    run.controller.policy_updated({})
    assert run.controller.plain_forward_s(4, 0) > 0


def test_costs_that_no_model_sees_are_noticed_and_stop_drafting():
    """Each drafting step takes longer than it shows: what it keeps of its promise says so."""
    hidden = world(affine, history=sure(0.5))
    hidden.drafting_costs_s = 0.1
    open_ = world(affine, history=sure(0.5))
    assert open_.run(300, 8).mean_length(100) > 0.5
    assert hidden.run(300, 8).mean_length(100) < 0.2 * open_.mean_length(100)


def test_a_costly_arm_is_asked_for_the_requests_that_the_cheap_one_leaves():
    """The history knows half of the requests by heart; the head is worth its price for the others alone."""
    known = np.arange(8) % 2 == 0
    cheap = Arm(lambda batch, depth: np.repeat(np.where(known, 0.9, 0.02)[:, None], depth, axis=1), lambda c: c)
    costly = Arm(
        lambda batch, depth: np.full((batch, depth), 0.85),
        lambda c: c,
        draft_s=lambda depth: 0.0003 * depth,
        per_request_s=0.0002,
    )
    run = world(shallow, cheap=cheap, costly=costly).run(400, batch=8)
    asked = np.array([step["costly"] for step in run.asked[200:] if "costly" in step])
    assert len(asked) > 150
    assert (asked[:, ~known] > 0).mean() > 0.9
    assert (asked[:, known] > 0).mean() < 0.1
    assert run.goodput(last=200) > 1.1 * world(shallow, cheap=cheap).run(400, batch=8).goodput(last=200)


def test_a_refresh_that_measured_its_speculator_needs_no_gamble():
    """A useless head becomes good: asked again in the next step, where without a measurement it waits for its turn."""

    def after_update(measured):
        arm = sure(0.3, draft_s=lambda depth: 0.01 * depth)
        run = world(affine, head=arm)
        run.controller.policy_updated({"head": np.full(5, 0.1)})
        run.run(200, batch=8)
        assert np.mean([bool(step) for step in run.asked[100:]]) < 0.1
        arm.truth, arm.confidence = lambda c: np.full(c.shape, 0.95), lambda batch, depth: np.full((batch, depth), 0.95)
        run.controller.policy_updated({"head": np.cumprod(np.full(5, 0.95))} if measured else {})
        run.run(5, batch=8)
        return np.mean([bool(step) for step in run.asked[-4:]])

    assert after_update(measured=True) == 1
    assert after_update(measured=False) < 1


def test_a_drafter_that_was_not_verified_is_judged_all_the_same():
    """`b` is never admitted beside the confident `a`, yet what it would have got right is known."""
    boaster = sure(0.5, truth=0.95)
    run = world(affine, a=sure(0.9, truth=0.9), b=boaster).run(100, batch=8)
    used = np.concatenate([admission.arms[admission.lengths > 0] for admission in run.admissions[-20:]])
    assert (used == 1).mean() > 0.9


def test_every_step_can_be_explained():
    arms = {"cheap": sure(0.8)}
    run = World(GoodputController(("cheap",), explain=True), affine, arms).run(60, batch=4)
    silent = world(affine, cheap=sure(0.8)).run(60, batch=4)
    assert silent.records == [None] * 60
    assert run.tokens == silent.tokens
    json.dumps(run.records)
    first, last = run.records[0], run.records[-1]
    assert first["asked"] == first["admitted"] == {}
    assert last["asked"]["cheap"]["requests"] == 4
    assert sum(last["admitted"].values()) == run.admissions[-1].lengths.sum()
    assert last["longest"] == run.admissions[-1].lengths.max()
    assert last["tokens"] == run.tokens[-1]
    expected, came = (np.sum([r[key] for r in run.records[30:]]) for key in ("expected_tokens", "tokens"))
    assert expected == pytest.approx(came, rel=0.1)


# ------------------------------------------------------------------------------------------------- depth search


def slow_search(there, expected, better, table, draft_s, depths, discount):
    """The same by sorting every answer's slots."""

    def goodput(survival, seconds):
        values = np.sort(survival[survival > 0])[::-1]
        tokens = len(there) + np.cumsum(values)
        drafting = discount * tokens / (table[len(there) + 1 : len(there) + 1 + len(values)] + seconds)
        return max(len(there) / (table[len(there)] + seconds), drafting.max(initial=0))

    answers = {(0, 0): goodput(there, draft_s[0, 0])}
    for whom, rows in ((1, better), (2, np.ones(len(there), bool))):
        for index, depth in enumerate(depths):
            cut = np.where(np.arange(there.shape[1]) < depth, expected, 0)
            taken = rows & (cut.sum(axis=1) > there.sum(axis=1))
            answers[whom, index] = goodput(np.where(taken[:, None], cut, there), draft_s[whom, index])
    return answers


@pytest.mark.parametrize("seed", range(12))
def test_the_compiled_search_finds_what_sorting_finds(seed):
    rng = np.random.default_rng(seed)
    batch, depths = int(rng.integers(1, 20)), np.array([1, 2, 3, 4, 6, 8, 12, 16])
    there, expected = (np.cumprod(rng.uniform(low, 1, (batch, 16)), axis=1) for low in rng.uniform(0, 0.9, 2))
    there[rng.random(batch) < 0.3] = 0
    better = expected.sum(axis=1) > there.sum(axis=1)
    table = np.array([affine(n) for n in range(batch * 17 + 1)])
    draft_s = np.concatenate([np.zeros((1, 8)), np.outer([better.mean(), 1], depths) * rng.uniform(0, 0.01)])
    answers = slow_search(there, expected, better, table, draft_s, depths, 0.97)
    found = search(there, expected, better, table, draft_s, depths, 0.97)
    assert answers[found] > 0.985 * max(answers.values())  # survival is ranked in steps of 1/64


# ------------------------------------------------------------------------------------------------------ prefix alone


def plateau(tokens: int) -> float:
    """One more token than the batch costs as much as many more: slots pay together or not at all."""
    return 0.050 if tokens <= 4 else 0.062


def depends_on_the_drawn_token(draft_probs: torch.Tensor | None) -> int:
    """How often a slot's fate changes with confidences of later positions, which a drawn token decides."""
    rng = np.random.default_rng(5)
    controller = world(plateau, a=sure(0.8), b=sure(0.8)).run(60, batch=4).controller
    changes = 0
    for _ in range(150):
        confidence = {name: rng.uniform(0.02, 0.98, (4, 5)).astype(np.float32) for name in ("a", "b")}

        def admit(confidence=confidence):
            tokens, lengths = np.zeros((4, 5), np.int64), np.full(4, 5)
            drafts = {name: Draft(tokens, lengths, values, draft_probs) for name, values in confidence.items()}
            asked = dict.fromkeys(drafts, lengths)
            step = Step(np.full(4, ROOM), 4 * CONTEXT, list(drafts), asked, drafts, dict.fromkeys(drafts, 1e-5))
            return controller.admit(step)

        before = admit()
        row, position = int(rng.integers(4)), int(rng.integers(4))
        for values in confidence.values():
            values[row, position + 1 :] = rng.uniform(0.02, 0.98, 4 - position)
        after = admit()
        changes += min(before.lengths[row], position + 1) != min(after.lengths[row], position + 1)
        changes += bool(min(before.lengths[row], after.lengths[row])) and before.arms[row] != after.arms[row]
    return changes


def test_whether_a_draw_is_verified_depends_on_its_prefix_alone():
    """Rejection sampling is exact only then. A later position's confidence is a function of the drawn token."""
    assert depends_on_the_drawn_token(torch.zeros(4, 5, 2)) == 0


def test_the_test_itself_catches_a_controller_that_looks_ahead():
    """As it may where one seed gives one text whatever is drafted, and drafts carry no probabilities."""
    assert depends_on_the_drawn_token(None) > 10


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
def test_drawn_drafts_are_still_worth_their_while(chance):
    arms = {"cheap": sure(chance)}
    run = World(GoodputController(("cheap",)), affine, arms, draft_probs=torch.zeros(8, 16, 2)).run(300, batch=8)
    assert run.goodput(last=200) > 0.85 * world(affine, **arms).run(300, batch=8).goodput(last=200)
