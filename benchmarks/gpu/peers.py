"""In one run, on one device: the engine with speculation and without, and what transformers brings without vLLM.

    python -m benchmarks.gpu.peers                                              # on a GPU: Qwen3 of 0.6B, 1.7B and 8B
    python -m benchmarks.gpu.peers --sizes tiny --batches 1 3 --vocab 128       # whether it runs, on a CPU

Policies have random weights, and no text ends before its length. So drafts are accepted only by chance. *off* is the speed
of decode steps. *on* is that speed when the controller decides not to draft; it does not show the gain of speculation.

    off, on         the engine, in process
    generate        `model.generate`, which is TRL's generation without vLLM
    continuous      `model.generate_batch`, transformers' continuous batching, as TRL calls it: cache and graphs are made in
                    every call. On a CPU the cache has a fixed size, because the default takes most of the memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from atlas_rl import AtlasRolloutEngine
from benchmarks.common import ROOT, environment, quantiles, write_result
from benchmarks.gpu.policy import SIZES, VOCAB, new_policy

ARMS = ("off", "on", "generate", "continuous")
PROMPT_TOKENS = 128
_CPU_BLOCKS, _CPU_BATCH_TOKENS = 64, 512
RESULT = ROOT / "benchmarks" / "results" / "peers_gpu.json"

Run = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a seed: gives completions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.6b", "1.7b", "8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    payload: dict[str, Any] = environment(("torch", "transformers", "triton", "numba", "numpy"), args.commit) | {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "settings": {"prompt_tokens": PROMPT_TOKENS, "max_new_tokens": args.max_new_tokens, "weights": "random"},
        "rows": [],
    }
    for size in args.sizes:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = new_policy(size, args.vocab, device, dtype)
        runs = {arm: run_of(arm, model, args.max_new_tokens) for arm in args.arms}
        for batch in args.batches:
            for row in cell(runs, batch, args):
                payload["rows"].append({"size": size, "batch": batch} | row)
                print(payload["rows"][-1], flush=True)
            write_result(args.output, payload)
        del model, runs
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"written: {args.output}")


def run_of(arm: str, model: Any, max_new_tokens: int) -> Run:
    """How an arm generates; every completion has `max_new_tokens` tokens."""
    if arm in ("off", "on"):
        engine = AtlasRolloutEngine(model=model, speculation=arm == "on", console=False, audit_share=0.0)

        def of_engine(prompts: list[list[int]], seed: int) -> list[list[int]]:
            out = engine.generate(prompts, max_new_tokens=max_new_tokens, eos_token_ids=(), seed=seed)
            return out.completion_ids

        return of_engine
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def of_generate(prompts: list[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling)
        completions: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return completions

    on_cpu = arm == "continuous" and model.device.type == "cpu"
    room = ContinuousBatchingConfig(num_blocks=_CPU_BLOCKS, max_batch_tokens=_CPU_BATCH_TOKENS) if on_cpu else None

    def of_continuous(prompts: list[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        attention = model.config._attn_implementation
        try:
            out = model.generate_batch(prompts, generation_config=sampling, continuous_batching_config=room)
        finally:
            model.set_attn_implementation(attention)
        return [each.generated_tokens for each in out.values()]

    return of_generate if arm == "generate" else of_continuous


def cell(runs: dict[str, Run], batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens/s of every arm over the same prompts, the arms in turns; the first turn warms up."""
    rates: dict[str, list[float]] = {arm: [] for arm in runs}
    for turn in range(1 + args.repeats):
        generator = torch.Generator().manual_seed(turn)
        prompts = torch.randint(args.vocab, (batch, PROMPT_TOKENS), generator=generator).tolist()
        for arm, run in runs.items():
            began_s = now_s()
            completions = run(prompts, turn)
            seconds = now_s() - began_s
            assert [len(completion) for completion in completions] == [args.max_new_tokens] * batch, arm
            if turn:
                rates[arm].append(batch * args.max_new_tokens / seconds)
    rows = []
    for arm, own in rates.items():
        rows.append({"arm": arm, "tokens_per_s": quantiles(own)})
        if "off" in rates:
            rows[-1]["ratio_to_off"] = quantiles([a / b for a, b in zip(own, rates["off"], strict=True)])
    return rows


def now_s() -> float:
    """A clock, read when the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
