"""Drafts in parallel threads are those of one thread, and the form that a run has found faster is used."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch

from atlas_rl.speculators.history import speculator as speculator_module
from atlas_rl.speculators.history import threads
from atlas_rl.speculators.history.rows import draft_parts, draft_rows
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.history.threads import ONE, PARALLEL, Forms, usable_threads
from tests.speculators.history.calls import archive, call, commit, speculator


@pytest.fixture(scope="module")
def started():
    """A call of 256 requests over few tokens, some of which have moved on, and its speculator with an archive."""
    rng = np.random.default_rng(0)
    spec = speculator(coupled=True)
    for prompt in ([5, 6], [7, 8]):
        archive(spec, prompt, rng.integers(5, 12, (6, 80)).tolist())
    sequences = call([[5, 6], [7, 8], [5, 7], [8, 8, 6]] * 64, seed=3)
    spec.start(sequences, np.arange(256))
    for _ in range(4):
        moving = rng.choice(256, 150, replace=False).tolist()
        commit(spec, sequences, {request: rng.integers(5, 12, rng.integers(1, 9)).tolist() for request in moving})
    return spec, sequences


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32, 100, 255, 256])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_draft_what_one_thread_drafts(started, batch, parts):
    spec, sequences = started
    rng = np.random.default_rng(batch)
    requests, want = rng.permutation(256)[:batch], rng.integers(0, 9, batch)
    searched = rng.random(256) < 0.5  # as after a draft in the same history
    results = []
    before = numba.get_num_threads()
    numba.set_num_threads(min(parts, numba.config.NUMBA_NUM_THREADS))
    for form in (draft_rows, lambda *arguments: draft_parts(parts, *arguments)):
        spec._found_at[:] = -1
        spec.propose(sequences, np.flatnonzero(searched), np.ones(searched.sum(), np.int64))
        state = spec._cursors.copy(), spec._counts.copy(), spec._found.copy(), spec._found_at.copy()
        drafts = form(
            requests, sequences.lengths, want, *state, *spec._live.view, *spec._archive.view, *spec._model,
            spec._mode(sequences), sequences.noise_keys, sequences.sampling.stops,
        )  # fmt: skip
        filled = [own[:found] for own, found in zip(state[0][requests], state[2][requests], strict=True)]
        results.append([*drafts, *state[1:], np.concatenate(filled)])
    numba.set_num_threads(before)
    assert batch < 32 or results[0][2].any()
    for one, parallel in zip(*results, strict=True):
        np.testing.assert_array_equal(one, parallel)


def test_a_speculator_drafts_the_same_with_more_threads():
    specs = [speculator(coupled=True, threads=parts) for parts in (1, 3)]
    rng, calls = np.random.default_rng(1), [call([[5, 6]] * 9, seed=2) for _ in specs]
    forms: list[int] = []
    took = specs[1]._forms.took
    specs[1]._forms.took = lambda work, form, seconds: (forms.append(form), took(work, form, seconds))
    for spec, sequences in zip(specs, calls, strict=True):
        spec.start(sequences, np.arange(9))
    for _ in range(30):
        rows = {request: rng.integers(5, 9, rng.integers(1, 4)).tolist() for request in range(9)}
        drafts = [
            spec.propose(sequences, np.arange(9), np.full(9, 4)) for spec, sequences in zip(specs, calls, strict=True)
        ]
        for name in ("token_ids", "lengths", "confidence"):
            np.testing.assert_array_equal(getattr(drafts[0], name), getattr(drafts[1], name))
        for spec, sequences in zip(specs, calls, strict=True):
            commit(spec, sequences, rows)
    assert forms[:2] == [ONE, PARALLEL]
    np.testing.assert_equal(specs[0].state_dict(), specs[1].state_dict())


# --------------------------------------------------------------------------------------------------- which form is used


def used(forms: Forms, seconds, drafts, work=512):
    """Forms of some drafts, which take `seconds[form]`."""
    chosen = []
    for _ in range(drafts):
        form = forms.choose(work)
        chosen.append(form)
        forms.took(work, form, seconds[form])
    return chosen


def test_the_faster_form_is_used_and_the_other_tried():
    for faster in (ONE, PARALLEL):
        chosen = used(Forms(2), {faster: 3e-4, 1 - faster: 5e-4}, 400)
        assert chosen[0] == ONE
        assert 0 < sum(form != faster for form in chosen) <= 35  # they lose 2e-4 s each, of 0.05 * 0.13 s


def test_a_machine_that_gets_busy_or_quiet_is_noticed():
    forms = Forms(2)
    quiet, busy = {ONE: 1e-3, PARALLEL: 6e-4}, {ONE: 1e-3, PARALLEL: 1e-2}
    assert used(forms, quiet, 100)[-50:].count(PARALLEL) >= 40
    assert used(forms, busy, 100).count(PARALLEL) <= 6
    assert used(forms, quiet, 3000)[-100:].count(PARALLEL) >= 80


def test_trials_lose_a_twentieth_of_the_time_at_most():
    one, parallel, forms = 1e-4, 1e-2, Forms(2)
    tried = used(forms, {ONE: one, PARALLEL: parallel}, 5000).count(PARALLEL)
    assert tried > 1
    assert (tried - 1) * (parallel - one) <= 0.05 * (
        5000 * one + tried * parallel
    )  # the trial at the limit is one more


def test_amounts_of_work_are_told_apart():
    forms = Forms(2)
    for _ in range(100):
        used(forms, {ONE: 2e-5, PARALLEL: 6e-5}, 1, work=30)
        used(forms, {ONE: 1e-3, PARALLEL: 6e-4}, 1, work=1000)
    assert (forms._times[5].faster, forms._times[10].faster) == (ONE, PARALLEL)


@pytest.mark.parametrize(
    ("variables", "cores", "expected"),
    [
        ({}, 6, 6),
        ({}, 64, 8),
        ({}, 1, 1),
        ({"OMP_NUM_THREADS": "1"}, 6, 1),
        ({"OMP_NUM_THREADS": "4,2"}, 6, 4),
        ({"OMP_NUM_THREADS": "12"}, 6, 6),
        ({"LOCAL_WORLD_SIZE": "4"}, 12, 3),
        ({"LOCAL_WORLD_SIZE": "8"}, 4, 1),
    ],
)
def test_threads_are_those_that_the_process_may_use(monkeypatch, variables, cores, expected):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 99)
    monkeypatch.setattr(numba, "threading_layer", lambda: "omp")
    assert usable_threads() == expected
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    assert usable_threads() == 1
    monkeypatch.setattr(numba, "threading_layer", lambda: "omp")
    monkeypatch.setattr(threads, "_IMPORTED_BY", -1)  # in a forked process
    assert usable_threads() == 1


def test_a_policy_on_a_cpu_keeps_the_cores(monkeypatch):
    """Whose own threads wait for their next product on them."""
    monkeypatch.setattr(speculator_module, "usable_threads", lambda: 4)
    for given, device, used in ((None, "cpu", 1), (None, "meta", 4), (3, "cpu", 3)):
        spec = HistorySpeculator(threads=given)
        spec.bind(SimpleNamespace(vocab_size=9, device=torch.device(device)), couples_noise=False)
        assert spec._forms.threads == used
