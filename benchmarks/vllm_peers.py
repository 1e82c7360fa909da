"""Runs vLLM's own methods over the cells of `benchmarks.controller`, in a separate process (`make setup-vllm`).

Each repeat of vLLM is followed at once by our engine without speculation on the same prompts, while vLLM waits: ratios are
of runs that lie seconds apart. They cannot take turns by steps as the other arms do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from atlas_rl import AtlasRolloutEngine
from benchmarks.cells import Cell, cell_prompts, group_of, print_cell, seed_of
from benchmarks.common import ROOT, quantiles, saved
from benchmarks.rollout import engine_arm, ratios

METHODS: dict[str, dict[str, Any] | None] = {
    "vllm": None,
    "vllm_ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 5},
    "vllm_suffix": {"method": "suffix", "num_speculative_tokens": 5},
}


def vllm_rows(cells: list[Cell], model: Any, tokenizer: Any, repeats: int) -> list[dict[str, Any]]:
    """The rows of every method that can run here; vLLM starts once per method."""
    off = AtlasRolloutEngine(model=model, tokenizer=tokenizer, speculation=False, console=False)
    rows = []
    folder = saved(cells[0].policy, model, tokenizer)
    for arm, method in METHODS.items():
        peer = Peer(folder, method)
        try:
            if peer.refusal:
                print(f"{arm} left out: {peer.refusal}", flush=True)
                continue
            for cell in cells:
                rows.append(measure(cell, arm, peer, off, tokenizer, repeats))
        finally:
            peer.close()
    return rows


def measure(cell: Cell, arm: str, peer: Peer, off: AtlasRolloutEngine, tokenizer: Any, repeats: int) -> dict[str, Any]:
    plain = engine_arm(off, group_of(cell), cell.max_new_tokens, cell.temperature)
    others = cell_prompts(cell, tokenizer, 20_000)
    peer.generate(cell, others)  # compilation and caches
    plain(others, seed_of(cell, 20_000))  # likewise, and the routes of its layers
    found, base = [], []
    for repeat in range(repeats):
        prompts = cell_prompts(cell, tokenizer, repeat)
        found.append(peer.generate(cell, prompts))
        began = time.perf_counter()
        num_tokens, _ = plain(prompts, seed_of(cell, repeat))
        base.append(num_tokens / (time.perf_counter() - began))
    speeds = [answer["tokens"] / answer["seconds"] for answer in found]
    num_tokens, num_accepted = (sum(answer[key] for answer in found) for key in ("tokens", "accepted"))
    row = {
        **cell.names,
        "arm": arm,
        "tokens_per_s": quantiles(speeds),
        "ratio_to_off": quantiles(ratios(speeds, base)),
        # Every forward of a request commits one token plus the accepted ones.
        "accepted_length": num_tokens / (num_tokens - num_accepted),
        "entropy": None,
        "vllm": peer.version,
    }
    print_cell(cell, [row])
    return row


class Peer:
    """A process with vLLM, with JSON lines as protocol.

    Attributes:
        version: Version of vLLM.
        refusal: Why the method cannot run there; empty if it can.
    """

    def __init__(self, model: str, method: dict[str, Any] | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm_peer", model, json.dumps(method)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        self.version, self.refusal = hello["version"], hello["refusal"]

    def generate(self, cell: Cell, prompts: list[list[int]]) -> dict[str, Any]:
        """Tokens, seconds and accepted draft tokens of one call."""
        assert self._process.stdin is not None
        job = {
            "prompts": prompts,
            "generations": group_of(cell),
            "temperature": cell.temperature,
            "max_new_tokens": cell.max_new_tokens,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the vLLM process ended with status {self._process.wait()}: its messages are above")
        return json.loads(line)
