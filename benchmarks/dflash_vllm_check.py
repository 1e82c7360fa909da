"""Does a DFlash head draft as well in vLLM's own method `dflash` as in ours? Greedy, same prompts, same folder.

    python -m benchmarks.dflash_vllm_check    # a minute; writes benchmarks/results/dflash_vllm_check.json

The policy is a tiny random Qwen3 whose next token depends mostly on the last one; the head is trained on it for a few
seconds. vLLM runs blocks of as many positions as it is asked for draft tokens, and one more; ours always have the length
that the head was trained with. So vLLM is asked for whole blocks.
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

BLOCK_SIZE, LAYERS, MASK = 5, (1, 3), 62
MAX_NEW_TOKENS, NUM_PROMPTS, CALLS, EPOCHS = 48, 24, 8, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "dflash_vllm_check.json")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 20, (NUM_PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        policy = write_trained(Path(folder), prompts)
        completions, own = ours(policy, Path(folder), prompts)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # vLLM's counters are per process
            theirs, counts = process.submit(in_vllm, folder, prompts).result(timeout=300)
    row = {
        "ours": own,
        "vllm": counts,
        "completions_equal": sum(a == b for a, b in zip(completions, theirs, strict=True)),
    }
    import vllm

    settings = {"max_new_tokens": MAX_NEW_TOKENS, "prompts": NUM_PROMPTS, "temperature": 0.0, "block_size": BLOCK_SIZE}
    write_result(args.output, {**environment(), "vllm": vllm.__version__, "settings": settings, **row})
    print(json.dumps(row, indent=2))


def write_trained(folder: Path, prompts: list[list[int]]) -> Any:
    """Write a policy and a head that was trained on it; returns the policy."""
    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.policy.view import InProcessView
    from atlas_rl.replay.record import RecordingSpeculator, recorded_calls
    from atlas_rl.speculators.dflash.checkpoint import save_dflash
    from atlas_rl.speculators.history.speculator import HistorySpeculator
    from atlas_rl.training.dflash import DFlashSettings, train_dflash

    model = build("qwen3", seed=2, head_dim=32, hidden_size=64, logit_std=3.0)
    with torch.no_grad():
        for each in model.model.layers:
            each.self_attn.o_proj.weight.mul_(0.02)
    model.save_pretrained(folder / "policy")
    recorder = RecordingSpeculator(folder / "record", LAYERS)
    engine = AtlasRolloutEngine(model=model, speculators=[HistorySpeculator(), recorder], console=False)
    for seed in range(CALLS):
        engine.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.5, eos_token_ids=[], seed=seed)
        engine.policy_updated()
    settings = DFlashSettings(
        LAYERS, MASK, num_layers=2, block_size=BLOCK_SIZE, epochs=EPOCHS, learning_rate=4e-3, batch_size=4
    )
    head = train_dflash(InProcessView(model), recorded_calls(folder / "record"), folder / "work", settings)
    save_dflash(folder / "head", head, model.config.num_hidden_layers)
    return model


def ours(policy: Any, folder: Path, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, float]]:
    """Completions, and the acceptance of the drafts."""
    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.controller.fixed import FixedController
    from atlas_rl.speculators.dflash.speculator import DFlashSpeculator

    engine = AtlasRolloutEngine(
        model=policy,
        speculators=[DFlashSpeculator(folder / "head")],
        controller=FixedController(["dflash"], "dflash", BLOCK_SIZE - 1),
        console=False,
    )
    output = engine.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, eos_token_ids=[])
    return output.completion_ids, {"accepted_length": output.report.accepted_length}


def in_vllm(folder: str, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, float]]:
    """The same with vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=f"{folder}/policy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        speculative_config={"method": "dflash", "model": f"{folder}/head", "num_speculative_tokens": BLOCK_SIZE - 1},
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    counts: dict[str, Any] = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    accepted, drafts = (counts[f"vllm:spec_decode_num_{name}"] for name in ("accepted_tokens", "drafts"))
    completions = [list(output.outputs[0].token_ids) for output in outputs]
    return completions, {"accepted_length": 1 + accepted / drafts}


if __name__ == "__main__":
    main()
