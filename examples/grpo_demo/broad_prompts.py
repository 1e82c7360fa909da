"""Writes training prompts for the demo's static drafter: many reasoning-gym families, none of them the demo's.

    python examples/grpo_demo/broad_prompts.py --output runs/eagle3
    atlas-rl train-speculator --model runs/eagle3/policy --data runs/eagle3/prompts.jsonl --output runs/eagle3/head

Writes the policy, with the warm start merged, and the prompts. The demo's training and evaluation questions are kept out
by construction: no prompt is drawn from the demo's families or from those that ask the same kind of sum. Half of the
prompts have the demo's system prompt, so that the drafter sees the policy's answers with it and without it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import reasoning_gym
from reasoning_gym.factory import DATASETS

from policy import load_policy
from tasks import FAMILIES, SYSTEM_PROMPT

# Further excluded families: their questions contain or paraphrase a sum or product of a few numbers.
RELATIVES = {"basic_arithmetic", "simple_equations", "complex_arithmetic", "decimal_chain_sum", "decimal_arithmetic",
             "gsm_symbolic", "products", "fraction_simplification", "composite", "number_format"}  # fmt: skip
MAX_CHARACTERS = 420


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=768, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = broad_prompts(args.size, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"family": family, "prompt": messages}) + "\n" for family, messages in prompts)
    (args.output / "prompts.jsonl").write_text(text)
    policy, tokenizer = load_policy(warm=True)
    policy.save_pretrained(args.output / "policy")
    tokenizer.save_pretrained(args.output / "policy")
    print(f"{len(prompts)} prompts of {len({family for family, _ in prompts})} families, and the policy: {args.output}")


def broad_families() -> list[str]:
    """Return the families to draw prompts from."""
    return sorted(set(DATASETS) - set(FAMILIES) - RELATIVES)


def broad_prompts(size: int, seed: int) -> list[tuple[str, list[dict[str, str]]]]:
    """Draw `size` prompts as (family, messages), the families in turn."""
    rng = random.Random(seed)
    streams = {}
    for family in broad_families():
        try:
            streams[family] = iter(reasoning_gym.create_dataset(family, size=size, seed=seed))
        except (ImportError, OSError, ValueError) as error:  # needs a package or data that is not installed
            print(f"left out {family}: {error}")
    found: list[tuple[str, list[dict[str, str]]]] = []
    while len(found) < size and streams:
        for family in list(streams):
            question = next((entry["question"].strip() for _, entry in zip(range(20), streams[family], strict=False)
                             if len(entry["question"]) <= MAX_CHARACTERS), None)  # fmt: skip
            if question is None:
                del streams[family]
                continue
            system = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < 0.5 else []
            found.append((family, [*system, {"role": "user", "content": question}]))
    return found[:size]


if __name__ == "__main__":
    main()
