"""The vLLM process that `benchmarks.vllm_peers` talks to.

    python -m benchmarks.vllm_peer MODEL_FOLDER METHOD_AS_JSON

A line of JSON says which vLLM this is; then every line that comes in is a generation call and is answered by a line. vLLM
0.32's CPU backend samples wrongly under every speculative method at temperature above 0: its stand-in for the kernel that
spreads temperatures over the draft positions writes into a copy. A wrong engine is not compared, so that is repaired here
first. `suffix` needs the package arctic-inference.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="folder of a checkpoint")
    parser.add_argument("method", type=json.loads, help="vLLM's speculative_config as JSON; null for none")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's output goes to stderr

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    import vllm

    from atlas_rl.vllm import internals

    method = args.method
    if method and method["method"] == "suffix" and not importlib.util.find_spec("arctic_inference"):
        answer({"version": vllm.__version__, "refusal": "arctic-inference is not installed there"})
        return
    internals.tolerate_numba()
    internals.repair_cpu_sampler()
    engine = vllm.LLM(
        model=args.policy,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=64,
        disable_log_stats=False,
        **({"speculative_config": method} if method else {}),
    )
    answer({"version": vllm.__version__, "refusal": ""})
    for line in sys.stdin:
        answer(generate(engine, json.loads(line)))


def generate(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Tokens, seconds and accepted draft tokens of one call."""
    from vllm import SamplingParams

    # No seed per request: vLLM would then draw row by row.
    sampling = SamplingParams(
        n=job["generations"], temperature=job["temperature"], max_tokens=job["max_new_tokens"], detokenize=False
    )
    before, began = accepted(engine), time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    num_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {"tokens": num_tokens, "seconds": seconds, "accepted": accepted(engine) - before}


def accepted(engine: Any) -> int:
    """Draft tokens accepted so far."""
    return int(sum(m.value for m in engine.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"))


if __name__ == "__main__":
    main()
