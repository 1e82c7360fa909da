"""Measures whether drafts of the history index are faster over rows in parallel threads than on one thread.

    python -m benchmarks.history_threads                    # on every core that the process may use
    taskset -c 0-3 python -m benchmarks.history_threads     # on four of them

Threads are numba's: OpenMP threads that spin while they wait (`omp`, the default), such that sleep (`passive`), and those
of `workqueue`, which the library does not use for drafts. Both forms, and the library's choice between them
(`atlas_rl/speculators/history/threads.py`), draft from the same state in turns, and their drafts must be equal. Before
every draft the host works on one thread for some milliseconds, as in a decode step: meanwhile the other threads go to
sleep. The smallest figures are near those of a quiet machine; medians contain the cost of other processes, whose load is
recorded.
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

import numpy as np
import torch

from atlas_rl import progress
from atlas_rl.core import Sequences, Verified
from atlas_rl.speculators.history.rows import draft_parts, draft_rows
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.history.threads import usable_threads
from benchmarks.history_index import DRAFT, GROUP, BranchingSource, as_call, fill

RESULT = Path(__file__).parent / "results" / "history_threads.json"
LAYERS = {
    "omp": {"NUMBA_THREADING_LAYER": "omp"},
    "passive": {"NUMBA_THREADING_LAYER": "omp", "OMP_WAIT_POLICY": "passive"},
    "workqueue": {"NUMBA_THREADING_LAYER": "workqueue"},
}
BATCHES, GAPS_MS = (8, 32, 64, 128, 256), (0.0, 3.0)
NUM_PROMPTS, ARCHIVED_TOKENS = 256, 512 * 1024
FORMS = ("one", "parallel", "chosen")
COMPILING = 4  # drafts that are not counted, because the first ones compile

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def work_for(milliseconds: float, numbers: np.ndarray) -> None:
    """Keep one thread busy, with memory of the size of a core's cache."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        numbers.sum()


class Drafting:
    """A history index that drafts every step of a call in all forms, and continues by known rollouts."""

    def __init__(self, batch: int, gap_ms: float, threads: int) -> None:
        self.batch, self.gap_ms, self.threads = batch, gap_ms, threads
        self.source = BranchingSource(NUM_PROMPTS, seed=1)
        self.speculator = HistorySpeculator(max_tokens=2 * ARCHIVED_TOKENS, threads=usable_threads())
        self.speculator.bind(SimpleNamespace(vocab_size=2**20, device=torch.device("cpu")), couples_noise=True)  # type: ignore[arg-type]
        fill(self.speculator, self.source, ARCHIVED_TOKENS)
        self.numbers = np.ones(1 << 19)
        self.seconds: dict[str, list[float]] = {form: [] for form in FORMS}
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
        """One draft of every request in each form; they take turns in going first."""
        spec, want = self.speculator, np.full(self.batch, DRAFT)
        arguments = (
            requests, call.lengths, want, spec._cursors, spec._counts, spec._found, spec._found_at,
            *spec._live_of(call).view, *spec._archive.view, *spec._model, spec._mode(call), call.noise_keys,
            call.sampling.stops,
        )  # fmt: skip

        def chosen() -> Arrays:
            draft = spec.propose(call, requests, want)
            return draft.token_ids, draft.confidence, draft.lengths

        forms: dict[str, Callable[[], Arrays]] = {
            "one": lambda: draft_rows(*arguments),
            "parallel": lambda: draft_parts(self.threads, *arguments),
            "chosen": chosen,
        }
        first, results = len(self.seconds["one"]) % len(FORMS), {}
        for form in (*FORMS[first:], *FORMS[:first]):
            spec._found_at[:] = -1  # all search
            seconds, results[form] = self.timed(forms[form])
            self.seconds[form].append(seconds)
        for form in FORMS[1:]:
            assert all(np.array_equal(one, other) for one, other in zip(results["one"], results[form], strict=True))
        self.drafted += int(results["one"][2].sum())
        return results["one"]

    def timed(self, form: Callable[[], Arrays]) -> tuple[float, Arrays]:
        """Seconds of one draft, after the host's work."""
        work_for(self.gap_ms, self.numbers)
        begin = time.perf_counter()
        result = form()
        return time.perf_counter() - begin, result


def measure(batch: int, gap_ms: float, steps: int) -> dict[str, Any]:
    """One row of the result, with the threading layer of this process."""
    from benchmarks.common import quantiles

    threads = len(os.sched_getaffinity(0))
    drafting, calls = Drafting(batch, gap_ms, threads), 0
    while len(drafting.seconds["one"]) < steps + COMPILING:
        drafting.call(calls := calls + 1)
    row: dict[str, Any] = {"threads": threads, "batch": batch, "gap_ms": gap_ms}
    for name, seconds in drafting.seconds.items():
        taken_us = 1e6 * np.array(seconds[COMPILING:])
        row[f"{name}_us"] = {"least": float(taken_us.min()), **quantiles(taken_us.tolist())}
    drafts = len(drafting.seconds["one"])
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
