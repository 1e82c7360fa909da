"""Steps of fixed shapes and attention over sequences of any length: the logits of ragged forwards, on a CPU."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.policy import ragged_attention, step_graphs, varlen
from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.policy.step_inputs import padded_tokens
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.engines import ARMS, SETTINGS, draft_model, engine_of, generate, reference
from tests.models import FACTORIES, tiny_llama

VOCAB = 64
# Policies that squash scores keep the rectangle: flash attention cannot.
FAMILIES = sorted(FACTORIES)


def forwards(name, *, fixed, taps=False):
    """Logits, and what was tapped, of prompts and of three ragged steps, one of them of scattered rows."""
    runner = InProcessRunner(FACTORIES[name](seed=3))
    cache = runner.new_cache(8, 128)
    cache.varlen = fixed
    rng, out = np.random.default_rng(5), []
    lengths = np.array([5, 17, 2, 40])
    with runner.session(cache):
        tokens = rng.integers(VOCAB, size=int(lengths.sum()))
        runner.forward(Segments(tokens, 0, np.zeros(4, np.int64), lengths), np.cumsum(lengths) - 1)
        for counts, rows in (([1, 1, 1, 1], None), ([3, 1, 4, 2], None), ([2, 1], [3, 0]), ([1, 2, 1, 6], None)):
            counts = np.array(counts)
            own = np.arange(4) if rows is None else np.array(rows)
            tokens = rng.integers(VOCAB, size=int(counts.sum()))
            caught = Taps(taps, (1,) if taps else ())
            segments = Segments(tokens, 0, lengths[own], counts, None if rows is None else own)
            logits = runner.forward(segments, np.arange(len(tokens)), caught)
            out += [logits.clone(), *([caught.head_inputs, caught.layers[1]] if taps else [])]
            lengths[own] += counts
        runner.copy_rows(3, [1], int(lengths[3]))
        tokens = rng.integers(VOCAB, size=2)
        segments = Segments(tokens, 0, lengths[[3, 3]], np.ones(2, np.int64), np.array([1, 3]))
        out.append(runner.forward(segments, np.arange(2)).clone())
    return out, cache


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_fixed_shape_has_the_logits_of_a_ragged_one(name):
    plain, _ = forwards(name, fixed=False, taps=True)
    shaped, cache = forwards(name, fixed=True, taps=True)
    if cache.attended == {True}:
        assert {key[0] for key in cache.steps._steps} == {2, 4, 12}  # of 4, 10, 3, 10 and, without taps, 2 tokens
    else:
        assert cache.steps is None
    for a, b in zip(plain, shaped, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-4


def test_most_families_take_steps():
    assert sum(forwards(name, fixed=True)[1].takes_steps for name in FAMILIES) >= len(FAMILIES) - 1


def test_a_wrong_row_is_seen(monkeypatch):
    """The comparison above can fail: keys of a neighbour's row change the logits."""
    plain, _ = forwards("llama", fixed=False)
    own = step_graphs.Packing
    monkeypatch.setattr(
        step_graphs, "Packing", lambda **fields: own(**(fields | {"key_starts": fields["key_starts"] + 1}))
    )
    shaped, _ = forwards("llama", fixed=True)
    assert max((a - b).abs().max() for a, b in zip(plain, shaped, strict=True)) > 1e-2


def test_sizes_cover_every_step_and_waste_little():
    sizes = np.array(step_graphs.SIZES)
    assert (np.diff(sizes) > 0).all()
    taken = sizes[np.searchsorted(sizes, np.arange(1, sizes[-1] + 1))]
    assert (taken <= np.maximum(2 * np.arange(1, sizes[-1] + 1), 2)).all()
    assert (taken[15:] <= 1.5 * np.arange(16, sizes[-1] + 1)).all()


@pytest.mark.parametrize("seed", range(6))
def test_inputs_are_padded_with_the_last_token(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, rng.integers(1, 5))
    total = int(lengths.sum())
    starts, rows, tokens = (
        rng.integers(1, 50, lengths.shape),
        rng.permutation(9)[: len(lengths)],
        rng.integers(64, size=total),
    )
    missing, behind = int(rng.integers(0, 4)), rng.integers(99, size=3)
    depths = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    expected = np.stack([tokens, np.repeat(starts, lengths) + depths, np.repeat(rows, lengths)])
    expected = np.pad(expected, ((0, 0), (0, missing)), mode="edge")
    found = padded_tokens(total + missing, tokens, starts, lengths, rows, behind)
    assert found.tolist() == [*expected.ravel(), *behind]


def sizes_of_steps(counts):
    """The sizes that steps of so many tokens are run by, of one row each time."""
    runner, seen = InProcessRunner(tiny_llama(layers=1, seed=3, context=2048)), []
    cache = runner.new_cache(600, 2048)
    cache.varlen = True
    one, position = np.ones(1, np.int64), 1
    with runner.session(cache):
        runner.forward(Segments(one, 0, 0 * one, one), np.arange(1))
        runner.reserve(1, 2048)  # so that no growth comes between
        for count in counts:
            runner.forward(Segments(np.ones(count, np.int64), 0, position * one, count * one), np.arange(count))
            seen.append(len(cache.placed.token_rows))
            position += count if position < 1000 else 0
    return seen


def test_a_size_that_there_is_serves_until_another_is_wanted_often():
    assert sizes_of_steps([1, 1, 2, 1, 7, 3, 1]) == [1, 1, 2, 1, 8, 8, 1]
    assert sizes_of_steps([30, 17, 12, 20, 33]) == [32, 32, 12, 32, 40]
    wanted = [12] + [3] * (step_graphs._PATIENCE + 3)
    assert sizes_of_steps(wanted) == [12] * (1 + step_graphs._PATIENCE) + [4] * 3


@pytest.mark.slow
def test_a_batch_that_drains_needs_few_sizes():
    assert len(set(sizes_of_steps(range(128, 0, -1)))) <= 5


def test_a_cache_goes_with_its_last_user():
    """Its memory is wanted back at once, not when Python looks for circles."""
    runner = InProcessRunner(tiny_llama(seed=3))
    cache = runner.new_cache(2, 64)
    cache.varlen = True
    with runner.session(cache):
        for start, count in ((0, 4), (4, 1), (5, 1)):
            one = np.array([count])
            runner.forward(Segments(np.arange(count), 0, np.array([start]), one), np.arange(count))
    assert cache.steps is not None
    gc.disable()
    try:
        keys = weakref.ref(cache.keys[0])
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "arm", ["controller, history and draft LM", "draft LM, k=3", "parrot, 30% wrong, k=5", "history, k=5"]
)
@pytest.mark.parametrize("setting", ["plain", "everything"])
def test_tokens_are_those_of_ragged_steps(arm, setting, fixed_shapes):
    output = generate(ARMS[arm](), **SETTINGS[setting])
    assert any(cache.steps is not None and cache.steps._steps for cache in fixed_shapes)
    expected = reference.__wrapped__(setting)
    assert output.completion_ids == expected.completion_ids


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("arm", ["draft LM", "fp4"])
def test_nobody_reads_the_logits_of_a_step_before(arm, verification, fixed_shapes, monkeypatch):
    """A graph writes where it wrote the last time: whoever kept logits would find others there."""
    own, written = step_graphs.StepGraphs._advance, []

    def advance(self, step, cache):
        for logits in written:
            logits.fill_(float("nan"))
        own(self, step, cache)
        written.append(step.logits)

    def drafting():
        drafter = DraftLM(draft_model(), VOCAB) if arm == "draft LM" else Fp4SelfSpeculator()
        # Under rejection tokens depend on what is drafted: no decision may depend on the clock.
        return engine_of(
            speculators=[drafter],
            controller=FixedController([drafter.name], drafter.name, 3),
            verification=verification,
        )

    expected = generate(drafting())
    monkeypatch.setattr(step_graphs.StepGraphs, "_advance", advance)
    output = generate(drafting())
    assert len(written) > 20
    assert output.completion_ids == expected.completion_ids
    assert output.report.drafter_faults == expected.report.drafter_faults


def test_waves_and_retiring(fixed_shapes):
    engine = engine_of(draft_model=draft_model(), max_batch_size=3)
    assert generate(engine).completion_ids == reference().completion_ids


@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_any_length_is_attention(window):
    """Against softmax by hand, rows of several lengths, two queries and one."""
    torch.manual_seed(0)
    keys, values = torch.randn(3, 10, 2, 8), torch.randn(3, 10, 2, 8)
    query = torch.randn(4, 4, 8)
    packing = varlen.Packing(torch.tensor([0, 2, 3, 4]), torch.tensor([10, 0, 20, 30]), torch.tensor([7, 4, 10]), 2, 10)
    out = varlen.attend(query, keys, values, packing, None, window)
    for token, (row, last) in enumerate([(1, 5), (1, 6), (0, 3), (2, 9)]):
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(4):
            scores = keys[row, first : last + 1, head // 2] @ query[token, head] / 8**0.5
            expected = scores.softmax(0) @ values[row, first : last + 1, head // 2]
            assert torch.allclose(out[token, head], expected, atol=1e-5)


def test_torch_has_the_operator():
    """Its arguments are given by name: a torch that renames one is noticed here, not on a GPU."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right", "seqused_k"} <= set(names)
    assert not varlen.takes(torch.zeros(1, 1, 8, dtype=torch.bfloat16), 8)  # which is on a CPU
    assert ragged_attention.NAME == "atlas_ragged"


def sizes_told():
    """What an engine's controller is told of its forwards, in a call of several waves."""
    controller, told = GoodputController(["history"]), []
    controller.forwards_are_padded = told.append
    generate(engine_of(speculators=[HistorySpeculator()], controller=controller, max_batch_size=3))
    return told


def test_the_controller_is_told_what_forwards_are_padded_to(fixed_shapes):
    assert sizes_told() == [step_graphs.SIZES]


def test_a_wave_that_gets_no_memory_tells_the_controller_nothing(fixed_shapes, monkeypatch):
    """Before a prompt has run, nothing is known of the forwards to come."""
    own, failures = DecodeLoop.prefill, [MemoryError("no memory")]

    def prefill(self, leaders, first_row):
        if failures:
            raise failures.pop()
        return own(self, leaders, first_row)

    monkeypatch.setattr(DecodeLoop, "prefill", prefill)
    assert sizes_told() == [step_graphs.SIZES]
    assert not failures


def test_and_that_they_are_not():
    assert sizes_told() == [()]
