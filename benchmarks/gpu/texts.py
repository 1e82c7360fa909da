"""Writes the demo's tasks as token ids, for a machine that has neither reasoning-gym nor a tokenizer.

python -m benchmarks.gpu.texts runs/gpu/texts.npz
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT

sys.path.insert(0, str(ROOT / "examples" / "grpo_demo"))

from transformers import AutoTokenizer

import policy as demo_policy
import tasks as demo_tasks

TRAINED, ASKED = 24_000, 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="gets the arrays, an .npz file")
    output = parser.parse_args().output
    tokenizer = AutoTokenizer.from_pretrained(demo_policy.prepare())
    rng = random.Random(0)
    arrays: dict[str, np.ndarray] = {"eos": np.array([tokenizer.eos_token_id], np.int32)}
    for name, split, count in (("trained", "warm_start", TRAINED), ("asked", "train", ASKED)):
        rows = []
        for task in demo_tasks.make_tasks(split, count):
            # No system prompt: it would be half of the tokens to learn.
            text = f"{task.question.strip()}\n"
            answer = demo_tasks.write_solution(task, rng) if name == "trained" else ""
            ids = tokenizer(text + answer)["input_ids"]
            rows.append([*ids, tokenizer.eos_token_id] if answer else ids)
        arrays[name] = np.concatenate([np.array(row, np.uint16) for row in rows])
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows], np.int32)
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output, **arrays)  # type: ignore[arg-type]
    print({name: array.shape for name, array in arrays.items()}, output.stat().st_size)


if __name__ == "__main__":
    main()
