"""Measures our proposer's overhead when drafts gain nothing: throughput beside plain vLLM, 16 clients, tiny policy.

    python -m benchmarks.vllm_overhead                      # some minutes on 2 cores
    python -m benchmarks.vllm_overhead --requests 64 --repeats 1 --output runs/overhead_smoke.json

The policy takes next to no time, and each of its tokens depends on all before it, so that no drafter can guess them:
the engine's own work is all that is measured. Every client asks again as soon as it is answered. `one` traffic samples
every request alike, `mixed` traffic takes the temperatures in turn. vLLM's own prompt lookup, which finds nothing either,
shows what vLLM's way to verify costs without us. All engines live in one process and are stepped in turns of a few requests
each, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atlas_rl import progress
from atlas_rl.vllm.backend import in_this_process, llm_arguments
from benchmarks.common import ROOT, environment, write_result

VOCAB, CONTEXT = 512, 256
_LOGIT_STD = 3.0
TRAFFIC = {"one": (1.0,), "mixed": (0.0, 0.7, 1.0, 1.3)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_TURN_REQUESTS = 16  # requests that an engine ends before the next engine is stepped


class Clients:
    """Clients of one engine, each with one request in flight."""

    def __init__(self, llm: Any, num_clients: int, max_tokens: int, clock: Callable[[], float]) -> None:
        self.seconds, self.tokens, self._clock = 0.0, 0, clock
        self._engine, self._num_clients, self._max_tokens = llm.llm_engine, num_clients, max_tokens
        self._names, self._running = itertools.count(), 0
        self._prompts = np.random.default_rng(0)

    def run(self, num_requests: int, temperatures: tuple[float, ...]) -> None:
        """Run until this many requests end; others are running before and after."""
        began, ended = self._clock(), 0
        while ended < num_requests:
            while self._running < self._num_clients:
                self._ask(temperatures)
            for output in self._engine.step():
                if output.finished:
                    ended, self._running = ended + 1, self._running - 1
                    self.tokens += len(output.outputs[0].token_ids)
        self.seconds += self._clock() - began

    def drain(self) -> None:
        """Run until no request is left."""
        while self._engine.has_unfinished_requests():
            self._running -= sum(output.finished for output in self._engine.step())

    def _ask(self, temperatures: tuple[float, ...]) -> None:
        from vllm import SamplingParams

        number = next(self._names)
        params = SamplingParams(
            temperature=temperatures[number % len(temperatures)],
            max_tokens=self._max_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        prompt = self._prompts.integers(1, VOCAB, size=8).tolist()
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        self._running += 1


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    with tempfile.TemporaryDirectory() as folder, in_this_process():
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            logits = model(torch.randint(VOCAB, (4, 24))).logits
            model.lm_head.weight.mul_(_LOGIT_STD / logits.std(dim=-1).mean())
        model.save_pretrained(folder)
        from vllm import LLM

        common: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_num_seqs": args.clients,
            "max_model_len": CONTEXT,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
        }
        lookup = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 3}
        engines = {
            "plain": LLM(folder, **common),
            "prompt_lookup": LLM(folder, **common, speculative_config=lookup),
            "ours": LLM(folder, **common, **llm_arguments()),
        }
        cells = {
            kind: measure(engines, TRAFFIC[kind], args)
            for kind in progress.each(args.traffic, "kinds of traffic", "kind")
        }
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write_result(args.output, {**environment(), "settings": settings, "cells": cells})


def measure(engines: dict[str, Any], temperatures: tuple[float, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of the engines under one kind of traffic, per repeat, and their ratios to plain vLLM."""
    repeats: list[dict[str, float]] = []
    profile = cProfile.Profile() if args.profile else None
    for repeat in range(
        1 + args.repeats
    ):  # the first is not counted: kernels compile, and drafters learn for the first time
        clock = CLOCKS[args.clock]
        clients = {name: Clients(llm, args.clients, args.max_tokens, clock) for name, llm in engines.items()}
        for _ in range(0, args.requests, _TURN_REQUESTS):
            for name, own in clients.items():
                if profile is not None and name == "ours" and repeat:
                    profile.runcall(own.run, _TURN_REQUESTS, temperatures)
                else:
                    own.run(_TURN_REQUESTS, temperatures)
        for own in clients.values():
            own.drain()
        if repeat:
            repeats.append({name: own.tokens / own.seconds for name, own in clients.items()})
    ratios = {name: [one[name] / one["plain"] for one in repeats] for name in engines if name != "plain"}
    for name, values in ratios.items():
        shown = " ".join(f"{value:.2f}" for value in values)
        progress.say(f"temperatures {temperatures}: {name} / plain {statistics.median(values):.2f} ({shown})")
    if profile is not None:
        for order in ("tottime", "cumtime"):
            pstats.Stats(profile).sort_stats(order).print_stats(60)
    median = {name: statistics.median(values) for name, values in ratios.items()}
    return {"tokens_per_s": repeats, "ratio_to_plain": median, "ratios_to_plain": ratios}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=256, help="per repeat and engine")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--traffic", nargs="+", default=list(TRAFFIC), choices=list(TRAFFIC))
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: on a machine that is busy otherwise"
    )
    parser.add_argument("--profile", action="store_true", help="print where our engine's time goes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_overhead_cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
