"""Measures acceptance of the FP4 self-draft on the demo's policy, with embeddings, head and cache in either precision.

    python -m benchmarks.fp4_self_draft             # no GPU needed; written to benchmarks/results/fp4_self_draft_cpu.json

Every arm drafts the same number of tokens on every step, for the same prompts and seeds: temperature 1, no ending token;
under drafter-invariant verification all arms generate the very same text. `acceptance_by_position` is the share of drafts
that were accepted at a position together with all before it. Nothing is timed: without a GPU the copy is dequantized and
runs at the policy's own price.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_kernels.nvfp4 import dequantize, quantize, tensor_scale_for
from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.fp4_self.copy import HEADROOM, FourBitCopy
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from benchmarks.common import environment, write_result
from benchmarks.rollout import unseen_prompts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "grpo_demo"))

import policy as demo_policy  # noqa: E402

ARMS = {
    "layers": {"quantize_head": False},
    "layers and head": {"quantize_head": True},
    "layers, head and embeddings": {"quantize_head": True, "quantize_embeddings": True},
}
OWN_CACHE = "layers and head, a cache of its own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="different prompts, one completion each")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--verification", nargs="+", default=["invariant", "rejection"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fp4_self_draft_cpu.json")
    args = parser.parse_args()
    origin = environment()  # as of the first drawn token
    rows = []
    for name in ("raw", "warm"):
        model, tokenizer = demo_policy.load_policy(warm=name == "warm")
        prompts = unseen_prompts(tokenizer, args.prompts, 1, seed=77)[0]
        for verification in args.verification:
            for arm in progress.each((*ARMS, OWN_CACHE), f"arms, {name}, {verification}", "arm"):
                rows.append({"policy": name, "verification": verification, "arm": arm})
                rows[-1] |= measured(model, speculator_of(arm, model), verification, prompts, args)
                progress.say({key: value for key, value in rows[-1].items() if key != "acceptance_by_position"})
                progress.say([round(value, 3) for value in rows[-1]["acceptance_by_position"]])
    settings = {
        "temperature": 1.0,
        "num_prompts": args.prompts,
        "max_new_tokens": args.max_new_tokens,
        "draft_tokens": args.draft_tokens,
        "weights": "float32, dequantized from NVFP4",
    }
    print(f"written: {write_result(args.output, origin | {'settings': settings, 'rows': rows})}")


def speculator_of(arm: str, model: nn.Module) -> Speculator:
    if arm == OWN_CACHE:
        return DraftLM(dequantized(model), model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return Fp4SelfSpeculator(**ARMS[arm])


def dequantized(model: nn.Module) -> nn.Module:
    """A copy of a model whose linear layers, head included, hold dequantized four-bit weights."""
    twin: Any = copy.deepcopy(model)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())  # separate from the embedding table
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            module.weight.data = dequantize(quantize(weight, tensor_scale_for(weight, HEADROOM)))
    return twin


def measured(
    model: nn.Module, speculator: Speculator, verification: str, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Acceptance of one arm."""
    engine = AtlasRolloutEngine(
        model=model,
        speculators=[speculator],
        controller=FixedController([speculator.name], speculator.name, args.draft_tokens),
        verification=verification,
        console=False,
    )
    report = engine.generate(prompts, max_new_tokens=args.max_new_tokens, eos_token_ids=[], seed=7).report
    copied = getattr(speculator, "_copy", None)
    return {
        "accepted_length": report.accepted_length,
        "acceptance_rate": report.acceptance_rate,
        "acceptance_by_position": list(report.acceptance_by_position),
        "num_drafted": report.drafted[speculator.name],
        "entropy": report.entropy,
        "copy_mib": copied.num_bytes / 2**20 if isinstance(copied, FourBitCopy) else None,
        "policy_bf16_mib": sum(parameter.numel() for parameter in model.parameters()) * 2 / 2**20,
    }


if __name__ == "__main__":
    with torch.no_grad():
        main()
