"""Measures whether drafts of the history index are faster over rows in parallel threads than on one thread.

    python -m benchmarks.history_threads                    # on every core that the process may use
    taskset -c 0-3 python -m benchmarks.history_threads     # on four of them

The library drafts on one thread. Here `draft_rows` also runs over parts of the rows in parallel, in threads of numba: in
OpenMP threads that spin while they wait (`omp`, the default), in such that sleep (`passive`), and by numba's `workqueue`.
Both forms draft from the same state in turns, and their drafts must be equal. Before every draft the host works on one
thread for some milliseconds, as in a decode step: meanwhile the other threads go to sleep. The smallest figures are near
those of a quiet machine; medians contain the cost of other processes, whose load is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np

from atlas_kernels.jit_cache import cached_njit
from atlas_rl import progress
from atlas_rl.core import Sequences, Verified
from atlas_rl.speculators.history.rows import draft_rows
from atlas_rl.speculators.history.speculator import HistorySpeculator
from benchmarks.history_index import DRAFT, GROUP, BranchingSource, as_call, fill

RESULT = Path(__file__).parent / "results" / "history_threads.json"
LAYERS = {
    "omp": {"NUMBA_THREADING_LAYER": "omp"},
    "passive": {"NUMBA_THREADING_LAYER": "omp", "OMP_WAIT_POLICY": "passive"},
    "workqueue": {"NUMBA_THREADING_LAYER": "workqueue"},
}
BATCHES, GAPS_MS = (8, 32, 64, 128, 256), (0.0, 3.0)
NUM_PROMPTS, ARCHIVED_TOKENS = 256, 512 * 1024
COMPILING = 4  # drafts that are not counted, because the first ones compile

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@numba.njit
def _room_for(want):
    """Tokens, confidences and lengths of drafts. In the parallel function itself, filling them would be another region."""
    widest = 0
    for i in range(len(want)):
        widest = max(widest, want[i])
    shape = len(want), widest
    return np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(len(want), np.int64)


@cached_njit(nogil=True, parallel=True)
def draft_parts(parts, requests, lengths, want, *rest):
    """`draft_rows` over `parts` parts of the rows in parallel; rows are independent, so the drafts are the same."""
    tokens, confidence, drafted = _room_for(want)
    for part in numba.prange(parts):
        index = np.int64(part)
        begin, end = index * len(requests) // parts, (index + 1) * len(requests) // parts
        own = draft_rows(requests[begin:end], lengths, want[begin:end], *rest)
        tokens[begin:end, : own[0].shape[1]] = own[0]
        confidence[begin:end, : own[1].shape[1]] = own[1]
        drafted[begin:end] = own[2]
    return tokens, confidence, drafted


def work_for(milliseconds: float, numbers: np.ndarray) -> None:
    """Keep one thread busy, with memory of the size of a core's cache."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        numbers.sum()


class Drafting:
    """A history index that drafts every step of a call in both forms, and continues by known rollouts."""

    def __init__(self, batch: int, gap_ms: float, threads: int) -> None:
        self.batch, self.gap_ms, self.threads = batch, gap_ms, threads
        self.source = BranchingSource(NUM_PROMPTS, seed=1)
        self.speculator = HistorySpeculator(max_tokens=2 * ARCHIVED_TOKENS)
        self.speculator.bind(SimpleNamespace(vocab_size=2**20), couples_noise=True)  # type: ignore[arg-type]
        fill(self.speculator, self.source, ARCHIVED_TOKENS)
        self.numbers = np.ones(1 << 19)
        self.seconds: tuple[list[float], list[float]] = [], []  # on one thread, in parallel
        self.drafted = 0

    def call(self, seed: int) -> None:
        """Decode one call until its shortest text is nearly complete."""
        prompts = np.repeat(self.source.rng.choice(NUM_PROMPTS, self.batch // GROUP, replace=False), GROUP)
        full = self.source.rollouts(prompts)
        call, requests = as_call(full, prompts, seed), np.arange(self.batch)
        self.speculator.start(call, requests)
        while call.lengths.max() < full.shape[1] - DRAFT - 1:
            tokens, _, lengths = self.draft(call, requests)
            truth = full[requests[:, None], call.lengths[:, None] + np.arange(DRAFT)]
            right = (tokens == truth[:, : tokens.shape[1]]) & (np.arange(tokens.shape[1]) < lengths[:, None])
            committed = 1 + np.cumprod(right, axis=1).sum(axis=1)
            call.lengths += committed
            open_ended = np.zeros(self.batch, bool)
            verified = Verified(requests, tokens[:, :0], committed, committed - 1, lengths, open_ended)
            self.speculator.observe(call, verified)
            self.speculator.learn()

    def draft(self, call: Sequences, requests: np.ndarray) -> Arrays:
        """One draft of every request, in both forms; the one that goes first alternates."""
        spec, forms = self.speculator, (draft_rows, lambda *arguments: draft_parts(self.threads, *arguments))
        arguments = (
            requests, call.lengths, np.full(self.batch, DRAFT), spec._cursors, spec._counts, spec._found, spec._found_at,
            *spec._live_of(call).view, *spec._archive.view, *spec._model, spec._mode(call), call.noise_keys,
            call.sampling.stops,
        )  # fmt: skip
        results: dict[int, Arrays] = {}
        first = len(self.seconds[0]) % 2
        for form in (first, 1 - first):
            spec._found_at[:] = -1  # both search
            seconds, results[form] = self.timed(forms[form], arguments)
            self.seconds[form].append(seconds)
        assert all(np.array_equal(one, parallel) for one, parallel in zip(results[0], results[1], strict=True))
        self.drafted += int(results[0][2].sum())
        return results[0]

    def timed(self, form: Callable[..., Arrays], arguments: tuple[Any, ...]) -> tuple[float, Arrays]:
        """Seconds of one draft, after the host's work."""
        work_for(self.gap_ms, self.numbers)
        begin = time.perf_counter()
        result = form(*arguments)
        return time.perf_counter() - begin, result


def measure(batch: int, gap_ms: float, steps: int) -> dict[str, Any]:
    """One row of the result, with the threading layer of this process."""
    from benchmarks.common import quantiles

    threads = len(os.sched_getaffinity(0))
    drafting, calls = Drafting(batch, gap_ms, threads), 0
    while len(drafting.seconds[0]) < steps + COMPILING:
        drafting.call(calls := calls + 1)
    row: dict[str, Any] = {"threads": threads, "batch": batch, "gap_ms": gap_ms}
    for name, seconds in zip(("one", "parallel"), drafting.seconds, strict=True):
        taken_us = 1e6 * np.array(seconds[COMPILING:])
        row[f"{name}_us"] = {"least": float(taken_us.min()), **quantiles(taken_us.tolist())}
    drafts = len(drafting.seconds[0])
    row |= {"drafts": drafts - COMPILING, "tokens_per_row": drafting.drafted / drafts / batch}
    return row | {"load": os.getloadavg()[0]}


def main() -> None:
    """Measure each threading layer in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="measured drafts per batch size and gap, at least")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="how threads run and wait")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--here", action="store_true", help="measure in this process and print the rows")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps([measure(batch, gap_ms, arguments.steps) for gap_ms in GAPS_MS for batch in BATCHES]))
        return
    from benchmarks.common import environment, write_result

    rows: list[dict[str, Any]] = []
    for layer in progress.each(arguments.layers, "threading layers", "layer"):
        command = [sys.executable, "-m", "benchmarks.history_threads", "--here", "--steps", str(arguments.steps)]
        variables = {**os.environ, **LAYERS[layer]}
        printed = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout
        for row in json.loads(printed):
            rows.append({"layer": layer, **row})
            progress.say(rows[-1])
    write_result(arguments.out, {"rows": rows, **environment()})


if __name__ == "__main__":
    main()
