"""Do EAGLE-3.1 heads, and heads that norm their whole input, draft as well in vLLM's own method `eagle3` as in ours?

    python -m benchmarks.eagle31_vllm_check    # minutes; writes benchmarks/results/eagle31_vllm_check.json

Greedy, same prompts, same folder. The policy is a tiny random one whose next token depends mostly on the last one; each
head is trained on it for a few seconds, and written in the `speculators` layout and in the original one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import recorded_calls
from atlas_rl.speculators.eagle3.checkpoint import save_eagle3
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.training.eagle3 import Eagle3Lesson, TrainSettings, most_used_tokens
from atlas_rl.training.head_shape import head_config
from atlas_rl.training.loop import run, split_calls
from benchmarks.common import ROOT
from benchmarks.vllm_check import compared, random_prompts, recorded_policy, write_check

LAYERS, LOOKAHEAD = (1, 2, 3), 3
MAX_NEW_TOKENS, NUM_PROMPTS = 100, 24
VARIANTS = {"fc_norm, norm_output": ("fc_norm", "norm_output"), "norm_before_fc": ("norm_before_fc",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "eagle31_vllm_check.json")
    args = parser.parse_args()
    prompts, rows = random_prompts(NUM_PROMPTS, 64), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = recorded_policy(folder, LAYERS, prompts, MAX_NEW_TOKENS)
        for variant, options in VARIANTS.items():
            for layout in ("speculators", "original"):
                head = folder / f"{variant} {layout}"
                write_head(head, folder, policy, options, original=layout == "original")
                config = {"method": "eagle3", "model": str(head), "num_speculative_tokens": LOOKAHEAD}
                row = compared(policy, Eagle3Speculator(head), folder / "policy", config, prompts, MAX_NEW_TOKENS)
                rows.append({"head": variant, "layout": layout, **row})
                print(json.dumps(rows[-1]), flush=True)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "prompts": NUM_PROMPTS, "temperature": 0.0, "lookahead": LOOKAHEAD}
    write_check(args.output, settings, {"rows": rows})


def write_head(head: Path, folder: Path, policy: Any, options: tuple[str, ...], *, original: bool) -> None:
    """Train a head with these norms on the recorded calls, and write it."""
    view, calls = InProcessView(policy), recorded_calls(folder / "record")
    held_out, trained = split_calls(calls, 0.1)
    ids = most_used_tokens(trained, view.vocab_size, view.vocab_size)
    torch.manual_seed(0)
    made = Eagle3Head(replace(head_config(view, LAYERS, len(ids)), **dict.fromkeys(options, True)))
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    made.set_vocabulary(torch.from_numpy(ids))
    with torch.no_grad():
        made.lm_head.weight.copy_(view.rows_of(ids)[1])
    settings = TrainSettings(LAYERS, epochs=6, learning_rate=4e-3)
    run(Eagle3Lesson(view, made, settings), held_out, trained, folder / f"work of {head.name}", print, 1e9)
    save_eagle3(head, made, policy)
    if original:
        settings_file = head / "config.json"
        config = json.loads(settings_file.read_text())
        layer = config.pop("transformer_layer_config")
        flat = {**layer, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(ids)}
        flat |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS), "use_aux_hidden_state": True}}
        flat |= {name: config[name] for name in ("fc_norm", "norm_output", "torch_dtype")}
        flat["eagle_config"]["norm_before_fc"] = config["norm_before_fc"]
        settings_file.write_text(json.dumps(flat))


if __name__ == "__main__":
    main()
