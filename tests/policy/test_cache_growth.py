"""The attention cache has the rows and cells that are used: exact counts of what is held and of what is copied to grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_rl.policy import ragged_attention
from atlas_rl.policy.base import Segments, roomy
from atlas_rl.policy.in_process import InProcessRunner
from tests.models import FACTORIES, tiny_llama

VOCAB = 64
CELL_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, dimensions, float32


def run(runner, starts, lengths, rows=None, first_row=0):
    tokens = np.random.default_rng(0).integers(VOCAB, size=sum(lengths))
    segments = Segments(tokens, first_row, np.array(starts), np.array(lengths), rows)
    return runner.forward(segments, np.arange(len(tokens)))


def held_bytes(cache):
    return sum(t.nbytes for store in (cache.keys, cache.values) for t in store.values())


def test_room_beyond_what_is_needed():
    assert [roomy(n) for n in (0, 1, 160, 1000)] == [32, 33, 192, 1200]
    assert [roomy(n, 100) for n in (1, 90, 100, 120)] == [33, 100, 100, 120]
    # Copies, of arrays that grow by what is needed next: at most five times the last array.
    for last in (100, 1_000, 32_768, 131_072):
        held, copied = roomy(1), 0
        while held < last:
            copied, held = copied + held, roomy(held + 1)
        assert held <= 1.2 * last + 33
        assert copied <= 5 * held


def test_a_cache_holds_what_is_used_whatever_it_may_come_to():
    runner = InProcessRunner(tiny_llama(context=131_072))
    for capacity in (80, 131_000):
        cache = runner.new_cache(256, capacity)
        with runner.session(cache):
            assert (cache.held_rows, cache.held_cells, held_bytes(cache)) == (0, 0, 0)
            run(runner, [0] * 3, [5, 2, 9])
            assert (cache.held_rows, cache.held_cells) == (3, 41)
            run(runner, [5], [9], first_row=0)
            assert (cache.held_rows, cache.held_cells, cache.copied_bytes) == (3, 41, 0)
            assert held_bytes(cache) == cache.num_bytes == 3 * 41 * CELL_BYTES
            assert cache.cell_bytes == CELL_BYTES == runner.row_bytes(1)


def test_growth_is_paid_for_once_in_a_while():
    runner = InProcessRunner(tiny_llama())
    cache = runner.new_cache(4, 128)
    with runner.session(cache):
        run(runner, [0] * 2, [8, 8])
        assert cache.held_cells == 40
        for length in range(8, 41):
            run(runner, [length - 1] * 2, [1, 1])
        assert cache.copied_bytes == 0
        run(runner, [40] * 2, [1, 1])
        assert (cache.held_cells, cache.copied_bytes) == (41 + 32, 2 * 40 * CELL_BYTES)
        run(runner, [0] * 2, [41, 41], first_row=2)
        assert (cache.held_rows, cache.held_cells, cache.copied_bytes) == (
            4,
            73,
            2 * 40 * CELL_BYTES + 2 * 73 * CELL_BYTES,
        )


def test_reserving_drops_the_rows_behind():
    runner = InProcessRunner(tiny_llama())
    cache = runner.new_cache(8, 128)
    with runner.session(cache):
        run(runner, [0] * 6, [9] * 6)
        runner.reserve(6, 41)
        assert runner.held_cells == 41
        runner.reserve(2, 42)
        assert runner.held_cells == 74
        assert (cache.held_rows, cache.num_bytes) == (2, 2 * 74 * CELL_BYTES)
        runner.reserve(2, 128)
        assert runner.held_cells == 128
        with pytest.raises(IndexError, match="9 rows of 33 tokens in a cache for 8 of 128"):
            runner.reserve(9, 1)
        with pytest.raises(IndexError, match="129"):
            runner.reserve(2, 129)


def test_rows_of_an_empty_cache_can_be_copied():
    runner = InProcessRunner(tiny_llama(seed=3))
    with runner.session(runner.new_cache(4, 64)):
        runner.copy_rows(0, [1, 2], 0)
        runner.copy_rows(0, [], 0)
        run(runner, [0] * 2, [3, 3])


def test_a_row_that_is_added_takes_nothing_from_the_others():
    model, tokens = tiny_llama(seed=2), np.random.default_rng(1).integers(VOCAB, size=60)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0]
    runner = InProcessRunner(model)
    with runner.session(runner.new_cache(9, 128)) as _:
        one = np.zeros(1, np.int64)
        runner.forward(Segments(tokens[:50], 0, one, one + 50), np.arange(50))
        run(runner, [0] * 3, [2, 1, 3], first_row=1)  # short texts in new rows
        runner.copy_rows(1, [7], 2)
        logits = runner.forward(Segments(tokens[50:], 0, one + 50, one + 10), np.arange(10))
        assert (logits - expected[50:]).abs().max() < 1e-4
        assert (runner._cache.held_rows, runner._cache.held_cells) == (8, 82)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_rows_that_grow_one_by_one_give_the_logits_of_a_plain_forward(name):
    model = FACTORIES[name](seed=1)
    tokens = torch.randint(VOCAB, (3, 100), generator=torch.Generator().manual_seed(0)).numpy()
    with torch.no_grad():
        expected = [model(torch.from_numpy(row)[None]).logits[0] for row in tokens]
    runner = InProcessRunner(model)
    cache = runner.new_cache(3, 100)
    with runner.session(cache):
        for row in range(3):
            for start in range(0, 100, 10):
                segments = Segments(tokens[row, start : start + 10], row, np.array([start]), np.array([10]))
                logits = runner.forward(segments, np.arange(10))
                assert (logits - expected[row][start : start + 10]).abs().max() < 1e-4
    assert cache.copied_bytes > 0


def test_memory_is_asked_for_and_not_exceeded_when_more_becomes_free(monkeypatch):
    runner = InProcessRunner(tiny_llama())
    free = [100 * CELL_BYTES]
    monkeypatch.setattr(runner, "free_bytes", lambda: free[0])
    cache = runner.new_cache(16, 128)
    with runner.session(cache):
        assert runner.cells_that_fit() == 100  # an estimate, from the configuration
        run(runner, [0] * 2, [8, 8])
        assert cache.num_bytes == 80 * CELL_BYTES
        free[0] = 1000 * CELL_BYTES
        assert runner.cells_that_fit() == 100
        free[0] = 5 * CELL_BYTES  # somebody else has taken the rest
        assert runner.cells_that_fit() == 85
        runner.reserve(2, 41)
        assert runner.held_cells == 42  # what memory allows, not what would be roomy


def test_memory_that_is_not_there_is_said_and_costs_nothing(monkeypatch):
    runner = InProcessRunner(tiny_llama(seed=3))
    cache = runner.new_cache(4, 128)
    allocated = ragged_attention.allocated

    def full(like, *shape):
        if shape[1] > 60:
            like = like.as_subclass(_NoMemory)
        return allocated(like, *shape)

    with runner.session(cache):
        expected = run(runner, [0] * 2, [20, 20])
        monkeypatch.setattr(ragged_attention, "allocated", full)
        with pytest.raises(MemoryError, match=r"0\.00 GiB more.*lower max_batch_size"):
            runner.reserve(2, 90)
        assert (cache.held_rows, cache.held_cells) == (2, 52)
        assert torch.equal(run(runner, [0] * 2, [20, 20]), expected)


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize(("rows", "cells"), [(8, 82), (4, 128), (2, 110), (8, 110)])
def test_a_cache_says_what_every_tensor_holds_wherever_resizing_ends(failing, rows, cells, monkeypatch):
    runner = InProcessRunner(tiny_llama(seed=3))
    cache = runner.new_cache(8, 128)
    allocated, calls = ragged_attention.allocated, []

    def full(like, *shape):
        calls.append(shape)
        if len(calls) > failing:
            raise MemoryError
        return allocated(like, *shape)

    with runner.session(cache):
        run(runner, [0] * 4, [68] * 4)
        expected = run(runner, [68] * 2, [1, 1])
        monkeypatch.setattr(ragged_attention, "allocated", full)
        with pytest.raises(MemoryError):
            cache.reserve(rows, cells, rows * cells)
        monkeypatch.undo()
        shapes = [t.shape for store in (cache.keys, cache.values) for t in store.values()]
        assert (cache.held_rows, cache.held_cells) == (min(s[0] for s in shapes), min(s[1] for s in shapes))
        assert cache.num_bytes == held_bytes(cache)
        assert (len({s[1] for s in shapes}) == 1) == (failing == 0)
        for length in range(70, cache.held_cells + 1):  # what is said to be there can be written
            run(runner, [length - 1] * 2, [1, 1])
        assert torch.equal(run(runner, [68] * 2, [1, 1]), expected)
        runner.reserve(rows, cells)
        run(runner, [cells - 1] * rows, [1] * rows)


def test_a_first_forward_that_gets_no_memory_leaves_an_empty_cache(monkeypatch):
    runner = InProcessRunner(tiny_llama(seed=3))
    cache = runner.new_cache(4, 128)
    allocated, sizes = ragged_attention.allocated, iter([1, 1, 1, 0])

    def full(like, *shape):
        if not next(sizes, 1):
            raise MemoryError
        return allocated(like, *shape)

    with runner.session(cache):
        runner.reserve(4, 20)
        assert (cache.held_rows, cache.held_cells) == (4, 52)
        monkeypatch.setattr(ragged_attention, "allocated", full)
        with pytest.raises(MemoryError):
            run(runner, [0] * 2, [20, 20])
        assert (cache.held_rows, cache.held_cells, held_bytes(cache)) == (0, 0, 0)
        runner.reserve(2, 20)
        run(runner, [0] * 2, [20, 20])
        assert (cache.held_rows, cache.held_cells) == (2, 20)  # no margin


class _NoMemory(torch.Tensor):
    def new_empty(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
