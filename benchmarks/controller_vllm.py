"""vLLM's half of `benchmarks.controller`: plain decoding, `ngram` and `suffix`, in vLLM's own environment.

    PYTHON_WITH_VLLM benchmarks/controller_vllm.py JOB.json OUT.json

vLLM 0.32's CPU backend samples wrongly under every speculative method at temperature above 0: its stand-in for the kernel
that spreads temperatures over the draft positions writes into a copy. A wrong engine is not compared, so that is repaired
here first. `suffix` needs the package arctic-inference and is left out where it is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
LOOKAHEAD = 5


def main() -> None:
    import vllm

    given = json.loads(Path(sys.argv[1]).read_text())
    repair_sampler()
    methods: dict[str, dict[str, Any] | None] = {
        "vllm": None,
        "vllm_ngram": {"method": "ngram", "num_speculative_tokens": LOOKAHEAD, "prompt_lookup_max": 5},
    }
    if importlib.util.find_spec("arctic_inference"):
        methods["vllm_suffix"] = {"method": "suffix", "num_speculative_tokens": LOOKAHEAD}
    arms = {arm: measure(given["policy"], given["jobs"], config) for arm, config in methods.items()}
    Path(sys.argv[2]).write_text(json.dumps({"version": vllm.__version__, "arms": arms}))


def repair_sampler() -> None:
    """Spread per-request values over each request's draft positions with a plain repeat."""
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(values, counts.long(), output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def measure(policy: str, jobs: list[dict[str, Any]], speculative: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of every job, tokens/s of each repeat and the accepted length of all."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=policy,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=64,
        disable_log_stats=False,
        **({"speculative_config": speculative} if speculative else {}),
    )

    def run(job: dict[str, Any], prompts: list[list[int]], seed: int) -> tuple[int, float]:
        sampling = SamplingParams(
            n=job["generations"], temperature=job["temperature"], max_tokens=job["max_new_tokens"], seed=seed
        )
        began = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs), seconds

    def accepted() -> int:
        found = [m.value for m in engine.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"]
        return int(sum(found))

    results = []
    for job in jobs:
        run(job, [prompt[::-1] for prompt in job["prompts"][0]], 1)  # compilation and caches, on a text of its own
        before = accepted()
        timed = [run(job, prompts, seed) for prompts, seed in zip(job["prompts"], job["seeds"], strict=True)]
        num_tokens, num_accepted = sum(count for count, _ in timed), accepted() - before
        # Every forward of a request commits one token and what it accepts.
        accepted_length = num_tokens / (num_tokens - num_accepted)
        speeds = [count / seconds for count, seconds in timed]
        results.append({"tokens_per_s": speeds, "accepted_length": accepted_length})
    return results


if __name__ == "__main__":
    main()
