"""Measures memory and proposal time of the history index against the size of its archive.

    python -m benchmarks.history_index            # 10k, 100k and 1M tokens
    python -m benchmarks.history_index --huge     # and 10M

The archive is filled with rollouts of a branching source: every prompt has 32 points with four phrasings of eight
tokens each, drawn from a vocabulary that prompts share. A batch of requests, eight siblings of each of four archived
prompts, then decodes new rollouts, so that every proposal follows chains of live siblings, of the same prompt and of
other prompts. Every call brings other prompts, whose part of the archive no cache holds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from atlas_kernels.noise import request_keys
from atlas_rl import progress
from atlas_rl.core import Rollouts, SamplingParams, Sequences, Verified
from atlas_rl.speculators.history.speculator import HistorySpeculator

RESULT = Path(__file__).parent / "results" / "history_index.json"
NODES, BRANCHES, PHRASE = 32, 4, 8
PROMPT_LENGTH, GROUP, PROMPTS_PER_CALL, DRAFT = 32, 8, 4, 8
COMPLETION = NODES * PHRASE
VOCAB = 32_000


class BranchingSource:
    """Rollouts that choose one of `BRANCHES` phrasings at every node, for `num_prompts` prompts; seeded."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        # Prompts share a stock of phrases: as in real rollouts, other prompts' text matches too.
        self.stock = self.rng.integers(10, VOCAB, (max(64, num_prompts * NODES // 4), PHRASE), dtype=np.int32)
        self.phrases = self.rng.integers(0, len(self.stock), (num_prompts, NODES, BRANCHES))
        self.prompts = self.rng.integers(10, VOCAB, (num_prompts, PROMPT_LENGTH), dtype=np.int32)

    def rollouts(self, prompts: np.ndarray) -> np.ndarray:
        """One rollout for each prompt index: int32 `[n, PROMPT_LENGTH + COMPLETION]`."""
        choice = self.rng.integers(0, BRANCHES, (len(prompts), NODES))
        picked = self.phrases[prompts[:, None], np.arange(NODES)[None], choice]
        return np.concatenate([self.prompts[prompts], self.stock[picked].reshape(len(prompts), COMPLETION)], axis=1)


def as_call(full: np.ndarray, prompts: np.ndarray, seed: int) -> Sequences:
    """A generation call over finished rollouts, reset to their prompts."""
    lengths = np.full(len(full), PROMPT_LENGTH, np.int64)
    return Sequences(
        token_ids=full.copy(),
        lengths=lengths,
        prompt_lengths=lengths.copy(),
        prompt_keys=prompts.astype(np.int64),
        noise_keys=request_keys(seed, len(full)),
        sampling=SamplingParams(max_new_tokens=COMPLETION),
        vocab_size=VOCAB,
        policy_version=0,
    )


def fill(spec: HistorySpeculator, source: BranchingSource, num_tokens: int) -> None:
    """Archive rollouts, eight of every prompt in turn, until `num_tokens` are stored."""
    num_prompts = len(source.prompts)
    first = 0
    while spec.num_archived_tokens < num_tokens:
        prompts = np.repeat(np.arange(first, first + 64) % num_prompts, GROUP)
        full = source.rollouts(prompts)
        room = num_tokens - spec.num_archived_tokens
        full, prompts = full[: -(-room // COMPLETION)], prompts[: -(-room // COMPLETION)]
        call = as_call(full, prompts, 0)
        call.lengths[:] = full.shape[1]
        spec.refresh(Rollouts(call), 0)
        first += 64


def decode(spec: HistorySpeculator, call: Sequences, full: np.ndarray) -> Iterator[tuple[float, float, int, int]]:
    """Decode one call; yields seconds of propose and observe, tokens drafted and committed, for every step."""
    requests = np.arange(len(full))
    spec.start(call, requests)
    while len(requests):
        left = full.shape[1] - call.lengths[requests]
        begin = time.perf_counter()
        draft = spec.propose(call, requests, np.minimum(DRAFT, left - 1))
        proposed = time.perf_counter() - begin
        committed = np.ones(len(requests), np.int64)
        for i, request in enumerate(requests):
            truth = full[request, call.lengths[request] : call.lengths[request] + draft.lengths[i]]
            committed[i] += int(np.cumprod(draft.token_ids[i, : draft.lengths[i]] == truth).sum())
        call.lengths[requests] += committed
        # No request is reported as finished, so that the archive keeps its size.
        open_ended = np.zeros(len(requests), bool)
        tokens = np.zeros((len(requests), 0), np.int64)
        verified = Verified(requests, tokens, committed, committed - 1, draft.lengths, open_ended)
        begin = time.perf_counter()
        spec.observe(call, verified)
        yield proposed, time.perf_counter() - begin, int(draft.lengths.sum()), int(committed.sum())
        requests = requests[call.lengths[requests] < full.shape[1]]


def measure(num_tokens: int, calls: int) -> dict[str, Any]:
    """One row of the result: an archive of `num_tokens`, then `calls` calls that decode against it."""
    from benchmarks.common import quantiles

    num_prompts = max(PROMPTS_PER_CALL, num_tokens // (GROUP * COMPLETION))
    source = BranchingSource(num_prompts, seed=1)
    spec = HistorySpeculator(max_tokens=16_000_000)
    fill(spec, source, num_tokens)
    archive_bytes = spec.nbytes
    propose_us, observe_us = [], []
    drafted = committed = steps = 0
    for index in range(calls + 1):
        prompts = np.repeat(source.rng.choice(num_prompts, PROMPTS_PER_CALL, replace=False), GROUP)
        full = source.rollouts(prompts)
        for propose_s, observe_s, num_drafted, num_committed in decode(spec, as_call(full, prompts, index), full):
            if index == 0 or num_drafted == 0:  # the first call compiles
                continue
            propose_us.append(1e6 * propose_s / num_drafted)
            observe_us.append(1e6 * observe_s / num_committed)
            drafted, committed, steps = drafted + num_drafted, committed + num_committed, steps + 1
    return {
        "impl": "history",
        "tokens": num_tokens,
        "bytes_per_token": archive_bytes / num_tokens,
        "propose_us": quantiles(propose_us),
        "observe_us": quantiles(observe_us),
        "steps": steps,
        "drafted": drafted,
        "committed": committed,
    }


def main() -> None:
    """Measure every size and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--huge", action="store_true", help="also measure 10M tokens")
    parser.add_argument("--calls", type=int, default=20, help="measured calls per size")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    from benchmarks.common import environment, write_result

    sizes = [10_000, 100_000, 1_000_000] + ([10_000_000] if arguments.huge else [])
    rows = []
    for size in progress.each(sizes, "sizes of the index", "size"):
        rows.append(measure(size, arguments.calls))
        progress.say(rows[-1])
    write_result(arguments.out, {"rows": rows, **environment()})


if __name__ == "__main__":
    main()
