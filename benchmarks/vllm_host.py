"""Measures the host seconds of `Drafting.step` and `learn` inside vLLM. Runs neither vLLM nor a GPU.

    python -m benchmarks.vllm_host                   # half a minute on one core; benchmarks/results/vllm_host.json

Between two forwards a device waits for `step`; `learn` runs while the device runs the next forward. A forward is pretended:
it takes no time, so that drafts do not pay and the controller asks for none but to try. Texts repeat a template with noise,
so that the history index finds something in every row. The clock is the thread's own, which other processes do not slow
but by the caches that they share. `benchmarks.vllm_overhead` measures whole engines.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any import of torch

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atlas_rl import progress
from atlas_rl.controller.base import Controller
from atlas_rl.controller.fixed import FixedController
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.decode.compile_kernels import compile_kernels
from atlas_rl.decode.defaults import bind_all, default_speculators
from atlas_rl.decode.guard import GuardedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.vllm.checks import NUM_SPECULATIVE_TOKENS
from atlas_rl.vllm.drafting import Drafting
from atlas_rl.vllm.draw import NO_TOKEN, DrawnTokens
from atlas_rl.vllm.internals import Forward, ForwardBatch
from atlas_rl.vllm.settling import compile_settling
from benchmarks.common import ROOT, environment, quantiles, write_result

VOCAB, HIDDEN, CONTEXT, PROMPT = 2048, 64, 4096, 6
BARS_MS = {8: 0.15, 64: 0.3, 256: 0.8}
"""Most milliseconds of a step without a draft, by batch."""
DEPTH = 4  # tokens that the history index drafts for every request, in steps with drafts
_TEMPLATE = 1200
_SAME = 0.9  # share of the template's tokens
_WARM_UP = 50  # in steps


class PretendedEngine:
    """Simulated requests of an engine that samples a template with noise, independent of drafts.

    Args:
        batch: Number of running requests.
        drafts: Draft in every step; otherwise only if it pays, which it does not.
    """

    def __init__(self, policy: Any, batch: int, *, drafts: bool) -> None:
        self.drafting = Drafting(NUM_SPECULATIVE_TOKENS, CONTEXT, batch, VOCAB)
        speculators = bind_all(default_speculators(), InProcessView(policy), self.drafting.faults, couples_noise=True)
        names = tuple(speculators)
        controller: Controller = FixedController(names, "history", DEPTH) if drafts else GoodputController(names)
        self.drafting.use(speculators, GuardedController(controller, self.drafting.faults))
        self._rng = np.random.default_rng(0)
        self._template = self._rng.integers(0, 200, _TEMPLATE)
        self._names = [f"request {i}" for i in range(batch)]
        self._tokens = np.zeros((batch, CONTEXT), np.int32)
        self._tokens[:, :PROMPT] = self._template[:PROMPT]
        self._lengths = np.full(batch, PROMPT)
        self._drafts: list[list[int]] = [[] for _ in range(batch)]
        self._params = SimpleNamespace(
            extra_args=None, seed=1, temperature=1.0, top_k=0, top_p=1.0, max_tokens=CONTEXT - PROMPT,
            stop_token_ids=[VOCAB - 1], eos_token_id=None, repetition_penalty=1.0, ignore_eos=True,
            thinking_token_budget=None,
        )  # fmt: skip

    def forward(self) -> Forward:
        """The next forward: every row commits its correct drafts and one token."""
        num_drafted = np.array([len(draft) for draft in self._drafts])
        width = int(num_drafted.max()) + 1
        places = (self._lengths[:, None] + np.arange(width)[None]) % _TEMPLATE
        own = self._rng.integers(0, 200, places.shape)
        drawn = np.where(self._rng.random(places.shape) < _SAME, self._template[places], own)
        drafted = np.full((len(drawn), width), NO_TOKEN)
        for row, draft in enumerate(self._drafts):
            drafted[row, : len(draft)] = draft
        num_new = 1 + np.cumprod(drafted == drawn, axis=1).sum(axis=1)
        tokens = np.where(np.arange(width)[None] < num_new[:, None], drawn, NO_TOKEN)
        for row, (length, count) in enumerate(zip(self._lengths.tolist(), num_new.tolist(), strict=True)):
            self._tokens[row, length : length + count] = tokens[row, :count]
        starts, before = np.cumsum(num_drafted + 1) - num_drafted - 1, self._lengths - 1
        self._lengths = self._lengths + num_new
        figures = np.ones(tokens.shape, np.float32)
        params = self._params
        batch = ForwardBatch(
            list(self._names), self._tokens, self._lengths.copy(), np.full(len(tokens), PROMPT),
            np.zeros(len(tokens), bool), lambda name: params,
        )  # fmt: skip
        self.drafting.requests.keys(batch)
        head_inputs = torch.zeros(int((num_drafted + 1).sum()), HIDDEN)
        spans = np.stack([starts, num_drafted + 1, before], axis=1)
        drawn = DrawnTokens(tokens, 0 * tokens, figures, figures, figures)
        return Forward(batch, num_new, num_drafted, starts, head_inputs, {}, spans, drawn)

    def step(self) -> tuple[float, float, int]:
        """One step: thread seconds of `step` and of `learn`, and draft tokens for the next step."""
        with self.drafting.recorder.time("forward"):
            forward = self.forward()
        began_s = time.thread_time()
        self._drafts = self.drafting.step(forward)
        drafted_s = time.thread_time()
        self.drafting.learn()
        return drafted_s - began_s, time.thread_time() - drafted_s, sum(map(len, self._drafts))


def row(policy: Any, batch: int, steps: int, *, drafts: bool) -> dict[str, Any]:
    """Quantiles over steps with drafts, or over steps without."""
    engine = PretendedEngine(policy, batch, drafts=drafts)
    taken = [engine.step() for _ in range(steps)][_WARM_UP:]
    if engine.drafting.take_report().drafter_faults:
        raise RuntimeError("a drafter or the controller failed; see above")
    taken = [one for one in taken if (one[2] > 0) == drafts]
    found = {"batch": batch, "drafts": drafts, "steps": len(taken)}
    found |= {
        name: {key: round(value, 4) for key, value in quantiles([1e3 * one[i] for one in taken]).items()}
        for i, name in enumerate(("step_ms", "learn_ms"))
    }
    return found if drafts else found | {"bar_ms": BARS_MS.get(batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BARS_MS))
    parser.add_argument("--steps", type=int, default=600, help=f"of each, the first {_WARM_UP} not counted")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_host.json")
    args = parser.parse_args()
    if args.steps <= _WARM_UP + 100:
        parser.error(f"--steps must be more than {_WARM_UP + 100}")
    origin = environment()
    torch.set_num_threads(1)
    compile_kernels()
    compile_settling()
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    rows = []
    for drafts in (False, True):
        for batch in args.batches:
            rows.append(row(policy, batch, args.steps, drafts=drafts))
            progress.say(str(rows[-1]))
    settings = {"clock": "thread", "drafters": "default", "depth": DEPTH}
    progress.say(f"written: {write_result(args.output, origin | {'settings': settings, 'rows': rows})}")


if __name__ == "__main__":
    main()
