"""Does a DFlash head draft as well in vLLM's own method `dflash` as in ours? Greedy, same prompts, same folder.

    python -m benchmarks.dflash_vllm_check    # a minute; writes benchmarks/results/dflash_vllm_check.json

The policy is a tiny random Qwen3 whose next token depends mostly on the last one; the head is trained on it for a few
seconds. vLLM runs blocks of as many positions as it is asked for draft tokens, and one more; ours always have the length
that the head was trained with. So vLLM is asked for whole blocks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import recorded_calls
from atlas_rl.speculators.dflash.checkpoint import save_dflash
from atlas_rl.speculators.dflash.speculator import DFlashSpeculator
from atlas_rl.training.dflash import DFlashSettings, train_dflash
from benchmarks.common import ROOT
from benchmarks.vllm_check import compared, random_prompts, recorded_policy, write_check

BLOCK_SIZE, LAYERS, MASK = 5, (1, 3), 62
MAX_NEW_TOKENS, NUM_PROMPTS, EPOCHS = 100, 24, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "dflash_vllm_check.json")
    args = parser.parse_args()
    prompts = random_prompts(NUM_PROMPTS, MASK)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = write_trained(folder, prompts)
        head = folder / "head"
        config = {"method": "dflash", "model": str(head), "num_speculative_tokens": BLOCK_SIZE - 1}
        row = compared(policy, DFlashSpeculator(head), folder / "policy", config, prompts, MAX_NEW_TOKENS)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "prompts": NUM_PROMPTS, "temperature": 0.0, "block_size": BLOCK_SIZE}
    write_check(args.output, settings, row)
    print(json.dumps(row, indent=2))


def write_trained(folder: Path, prompts: list[list[int]]) -> Any:
    """Write a policy and a head that was trained on it; returns the policy."""
    model = recorded_policy(folder, LAYERS, prompts, MAX_NEW_TOKENS)
    settings = DFlashSettings(
        LAYERS, MASK, num_layers=2, block_size=BLOCK_SIZE, epochs=EPOCHS, learning_rate=4e-3, batch_size=4
    )
    head = train_dflash(InProcessView(model), recorded_calls(folder / "record"), folder / "work", settings)
    save_dflash(folder / "head", head, model.config.num_hidden_layers)
    return model


if __name__ == "__main__":
    main()
