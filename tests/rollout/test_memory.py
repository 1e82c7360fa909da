"""Memory follows what texts come to: long budgets cost nothing; where memory runs short, requests wait, tokens unchanged."""

from __future__ import annotations

import pytest

from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import SamplingParams
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy import ragged_attention
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.rollout.requests import build_sequences
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import RandomDrafter, recurrent_drafter
from tests.engines import VOCAB, draft_model, engine_of
from tests.models import tiny_llama

CELL_BYTES = 2 * 2 * 2 * 8 * 4  # of the policy: keys and values, layers, heads, dimensions, float32
PROMPTS = [list(range(1, 1 + n)) for n in (3, 9, 5, 20, 12)]
LONG = {"num_generations": 2, "max_new_tokens": 60, "eos_token_ids": []}
SOON = list(range(0, VOCAB, 4))  # a quarter of the tokens ends a request


@pytest.fixture
def caches(monkeypatch):
    """Every cache that is made, in order, without those of the probe."""
    made, original = [], InProcessRunner.new_cache

    def new_cache(self, num_rows, capacity):
        cache = original(self, num_rows, capacity)
        if self._probed:
            made.append(cache)
        return cache

    monkeypatch.setattr(InProcessRunner, "new_cache", new_cache)
    return made


def generate(engine, **options):
    given = {"num_generations": 6, "max_new_tokens": 100, "eos_token_ids": [5], "seed": 3}
    return engine.generate(PROMPTS, **given | options)


def little_memory(monkeypatch, num_cells):
    """Caches of the whole process together may take as much as so many tokens of the policy's."""
    monkeypatch.setattr(InProcessRunner, "free_bytes", lambda self: num_cells * CELL_BYTES)


# -------------------------------------------------------------------------------------------------------- long budgets


@pytest.mark.parametrize("drafter", ["none", "history", "draft LM"])
def test_a_long_budget_holds_what_a_short_one_does(drafter, caches):
    model, sizes, tokens, widths = tiny_llama(seed=11, context=200_000), [], [], []
    generate(engine_of(model), max_new_tokens=1)  # probed
    for budget in (64, 32_768, 131_072):
        caches.clear()
        speculators = {"none": [], "history": [HistorySpeculator()], "draft LM": [DraftLM(draft_model(), VOCAB)]}[
            drafter
        ]
        options = {"speculators": speculators} if speculators else {"speculation": False}
        engine = engine_of(model, **options)
        if speculators:
            engine._controller = FixedController([speculators[0].name], speculators[0].name, 3)
        output = generate(engine, max_new_tokens=budget, eos_token_ids=SOON)
        tokens.append(output.completion_ids)
        sizes.append([(cache.held_rows, cache.held_cells) for cache in caches if cache.keys])
        widths.append(engine._policy._newest.sequences.token_ids.shape if speculators else None)
    assert tokens[1] == tokens[2] == tokens[0]
    assert max(map(len, tokens[0])) < 30
    assert sizes[1] == sizes[2]
    assert widths[1] == widths[2]
    for short, long in zip(sizes[0], sizes[1], strict=True):
        assert long[0] == short[0] > 15
        assert long[1] <= 1.2 * short[1]


def test_texts_have_the_room_that_they_use():
    for budget in (64, 131_072):
        sampling = SamplingParams(max_new_tokens=budget)
        sequences, limits = build_sequences(PROMPTS, 2, sampling, VOCAB, None, 0)
        assert sequences.token_ids.shape == (10, 20 + 32)
        assert sequences.max_length == limits.max() == 20 + budget
        before = sequences.token_ids.copy()
        sequences.reserve(52)
        assert sequences.token_ids.shape == (10, 52)
        sequences.reserve(53)
        assert sequences.token_ids.shape == (10, min(85, 20 + budget))
        assert (sequences.token_ids[:, :52] == before).all()


def test_the_batch_is_not_cut_by_the_budget(monkeypatch):
    little_memory(monkeypatch, 30 * 64)
    model = tiny_llama(seed=11, context=200_000)
    for budget in (64, 131_072):
        report = generate(engine_of(model, speculation=False), max_new_tokens=budget, eos_token_ids=SOON).report
        assert report.active_batch_curve[0][1] > 15  # of 30, some of which end with their first token
        assert not report.warnings


def test_the_recurrent_drafter_learns_from_all_that_short_texts_give():
    model, kept = tiny_llama(seed=11, context=200_000), []
    for budget in (64, 131_072):
        drafter = recurrent_drafter(max_tokens=5_000)
        engine = engine_of(model, speculators=[drafter])
        output = generate(engine, max_new_tokens=budget, eos_token_ids=SOON)
        engine.policy_updated()
        kept.append(len(drafter.learner._buffer))
        assert kept[-1] == sum(map(len, output.completion_ids))
    thinned = recurrent_drafter(max_tokens=200)
    engine = engine_of(model, speculators=[thinned])
    output = generate(engine)
    engine.policy_updated()
    lengths = [len(row) for row in output.completion_ids]
    assert len(thinned.learner._buffer) in [sum(lengths[::stride]) for stride in (2, 4, 8, 16, 32)]
    assert len(thinned.learner._buffer) <= max(200, lengths[0])


# ------------------------------------------------------------------------------------------------------ too little memory


def drafters():
    return {
        "none": lambda: None,
        "history": HistorySpeculator,
        "draft LM": lambda: DraftLM(draft_model(), VOCAB),
        "fp4": Fp4SelfSpeculator,
        "recurrent": recurrent_drafter,
    }


def engine_with(drafter):
    speculator = drafters()[drafter]()
    if speculator is None:
        return engine_of(speculation=False)
    controller = FixedController([speculator.name], speculator.name, 4)
    return engine_of(speculators=[speculator], controller=controller)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", drafters())
@pytest.mark.parametrize("num_cells", [1, 130, 400])
def test_requests_wait_where_texts_outgrow_memory(drafter, num_cells, monkeypatch, caches):
    wanted = generate(engine_of(speculation=False), **LONG).completion_ids
    little_memory(monkeypatch, num_cells)
    engine = engine_with(drafter)
    for _ in range(2):
        output = generate(engine, **LONG)
        assert output.completion_ids == wanted
        paused = [warning for warning in output.report.warnings if "gave its row up" in warning]
        assert len(paused) == (num_cells > 1)  # a single row is never given up
        engine.policy_updated()
    longest = max(len(p) + len(c) for p, c in zip(output.prompt_ids, output.completion_ids, strict=True))
    for cache in caches[1:]:
        if cache.cell_bytes == CELL_BYTES:
            assert cache.num_bytes <= max(num_cells, 1.2 * longest + 33) * CELL_BYTES


def test_memory_that_others_take_in_the_middle_of_a_call(monkeypatch, caches):
    wanted = generate(engine_of(speculation=False), **LONG).completion_ids
    left = iter([10 * 53 * CELL_BYTES] * 2)  # for the first wave: 10 rows of at most 53 tokens
    monkeypatch.setattr(InProcessRunner, "free_bytes", lambda self: next(left, 0))
    output = generate(engine_of(speculation=False), **LONG)
    assert output.completion_ids == wanted
    assert any("gave its row up" in warning for warning in output.report.warnings)


def test_allocations_that_fail_cost_rows(monkeypatch):
    options = LONG | {"max_new_tokens": 100}
    wanted = generate(engine_of(speculation=False), **options).completion_ids
    monkeypatch.setattr(ragged_attention, "allocated", _only(900))  # 10 rows of 84 tokens and not of more
    output = generate(engine_of(speculation=False), **options)
    assert output.completion_ids == wanted
    assert any("gave its row up" in warning for warning in output.report.warnings)


def test_one_request_that_gets_no_memory_is_an_error_that_says_so(monkeypatch):
    engine = engine_of(speculation=False)
    wanted = generate(engine).completion_ids
    monkeypatch.setattr(ragged_attention, "allocated", _only(100))
    with pytest.raises(MemoryError, match="attention cache needs"):
        generate(engine)
    monkeypatch.undo()
    assert generate(engine).completion_ids == wanted


FEW_WORDS = [[3, 1, 4], [15, 9, 2, 6]]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["none", "draft LM", "recurrent"])
@pytest.mark.parametrize("num_cells", [160, 500, 700])
def test_a_first_allocation_that_fails_costs_rows(drafter, num_cells, monkeypatch):
    options = {"num_generations": 6, "max_new_tokens": 60, "eos_token_ids": [], "seed": 4}
    prompts = [PROMPTS[3] * 3, PROMPTS[1] * 10]  # requests of 120 and 150 tokens
    wanted = engine_of(speculation=False).generate(prompts, **options).completion_ids
    engine, allocated = engine_with(drafter), []
    only = _only(num_cells)

    def noting(like, *shape):
        made = only(like, *shape)
        allocated.append(shape[0])
        return made

    monkeypatch.setattr(ragged_attention, "allocated", noting)
    assert engine.generate(prompts, **options).completion_ids == wanted
    assert {160: 1, 500: 4, 700: 6}[num_cells] <= max(allocated) < 12


def test_no_more_is_asked_for_than_one_request_needs(monkeypatch):
    """A margin is not worth a call: a single request runs in memory for exactly its tokens."""
    options = {"max_new_tokens": 60, "eos_token_ids": [], "seed": 4}
    wanted = engine_of(speculation=False).generate(FEW_WORDS, **options).completion_ids
    engine = engine_with("history")
    monkeypatch.setattr(ragged_attention, "allocated", _only(4 + 60 - 1))
    assert engine.generate(FEW_WORDS, **options).completion_ids == wanted
    monkeypatch.setattr(ragged_attention, "allocated", _only(4 + 60 - 2))
    with pytest.raises(MemoryError):
        engine.generate(FEW_WORDS, **options)


@pytest.mark.parametrize("every", [5, 6, 7, 9])
@pytest.mark.parametrize("drafter", ["none", "history"])
def test_allocations_that_fail_now_and_then_change_no_token(drafter, every, monkeypatch):
    """Four tensors: with every fifth allocation or fewer failing, one of two tries in a row succeeds."""
    engine, allocated, count = engine_with(drafter), ragged_attention.allocated, [0, 0]
    wanted = [generate(engine, **LONG | {"seed": seed}).completion_ids for seed in range(3)]
    little_memory(monkeypatch, 600)  # requests are paused and come back

    def failing(like, *shape):
        count[0] += 1
        if count[0] % every == 0:
            count[1] += 1
            raise MemoryError("the attention cache needs more")
        return allocated(like, *shape)

    monkeypatch.setattr(ragged_attention, "allocated", failing)
    for seed in range(3):
        assert generate(engine, **LONG | {"seed": seed}).completion_ids == wanted[seed]
    assert count[1] > 5


def _only(num_cells):
    allocated = ragged_attention.allocated

    def full(like, *shape):
        if shape[0] * shape[1] > num_cells:
            raise MemoryError("the attention cache needs more")
        return allocated(like, *shape)

    return full


def test_a_wave_is_as_large_as_memory_takes(monkeypatch):
    """Prompts of 3 to 20 tokens and 32 more of each, in memory for 520: 10 to 14 rows."""
    wanted = generate(engine_of(speculation=False), eos_token_ids=SOON).completion_ids
    little_memory(monkeypatch, 520)
    output = generate(engine_of(speculation=False), eos_token_ids=SOON)
    assert output.completion_ids == wanted
    assert 5 < max(active for _, active in output.report.active_batch_curve) <= 14


@pytest.mark.slow
@pytest.mark.parametrize("num_cells", [120, 200, 10_000])
def test_room_for_drafts_is_settled_before_they_are_drawn(num_cells, monkeypatch):
    """Rejection sampling: a cache that grew, or did not, for what was drawn would choose which drawn tokens are verified."""
    little_memory(monkeypatch, num_cells)
    drafter = RandomDrafter(with_probs=True)
    asked, propose, forward = [], drafter.propose, DecodeLoop.forward

    def noted(sequences, requests, most):
        asked.append(((sequences.lengths[requests] + most).max(), engine._backend.runner.held_cells))
        return propose(sequences, requests, most)

    def checked(self, requests, draft, tail):
        if draft.lengths.any():
            needed, held = asked[-1]
            assert needed <= held == self.runner.held_cells
        return forward(self, requests, draft, tail)

    monkeypatch.setattr(drafter, "propose", noted)
    monkeypatch.setattr(DecodeLoop, "forward", checked)
    engine = engine_of(
        tiny_llama(seed=11),
        speculators=[drafter],
        controller=FixedController(["random"], "random", 40),
        verification="rejection",
    )
    output = engine.generate(PROMPTS, **LONG)
    assert asked
    assert sum(output.report.accepted.values()) > 0
