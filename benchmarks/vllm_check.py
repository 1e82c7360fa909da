"""A draft head in our engine and in vLLM's own method: greedy, same prompts, same folder.

vLLM counts all drafts that it accepts, also those beyond a text's limit. Our engine asks for no drafts beyond it. So the
accepted lengths of equal drafts differ a little, and less in long texts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.replay.record import RecordingSpeculator
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.vllm.backend import in_this_process
from benchmarks.common import environment, write_result
from benchmarks.tiny_policies import build

_CALLS = 8  # that are recorded to train a head on


def random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 4 to 19 tokens below `vocab_size`."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 20, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def recorded_policy(folder: Path, layers: Sequence[int], prompts: list[list[int]], max_new_tokens: int) -> Any:
    """Write a policy to `folder / "policy"`, and some of its calls to `folder / "record"`, to train a head on.

    It is a tiny random one whose next token depends mostly on the last one.

    Args:
        folder: A new folder.
        layers: Layers whose hidden states are recorded.
        prompts: Token ids.
        max_new_tokens: Tokens of each completion.

    Returns:
        The policy.
    """
    model = build("qwen3", seed=2, head_dim=32, hidden_size=64, logit_std=3.0)
    with torch.no_grad():
        for each in model.model.layers:
            each.self_attn.o_proj.weight.mul_(0.02)
    model.save_pretrained(folder / "policy")
    recorder = RecordingSpeculator(folder / "record", tuple(layers))
    engine = AtlasRolloutEngine(model=model, speculators=[HistorySpeculator(), recorder], console=False)
    for seed in range(_CALLS):
        engine.generate(prompts, max_new_tokens=max_new_tokens, temperature=0.5, eos_token_ids=[], seed=seed)
        engine.policy_updated()
    return model


def compared(
    policy: Any,
    speculator: Speculator,
    folder: Path,
    speculative_config: dict[str, Any],
    prompts: list[list[int]],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Accepted lengths of both, and how many of their completions are equal.

    Args:
        policy: The policy in `folder`.
        speculator: Our speculator with the head.
        folder: The policy's folder, for vLLM.
        speculative_config: vLLM's settings, with the same number of draft tokens.
        prompts: Token ids.
        max_new_tokens: Tokens of each completion.
    """
    lookahead = speculative_config["num_speculative_tokens"]
    controller = FixedController([speculator.name], speculator.name, lookahead)
    engine = AtlasRolloutEngine(model=policy, speculators=[speculator], controller=controller, console=False)
    output = engine.generate(prompts, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_ids=[])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # vLLM's counters are per process
        waiting = process.submit(_in_vllm, str(folder), speculative_config, prompts, max_new_tokens)
        completions, accepted_length = waiting.result(timeout=300)
    return {
        "ours": {"accepted_length": output.report.accepted_length},
        "vllm": {"accepted_length": accepted_length},
        "completions_equal": sum(a == b for a, b in zip(output.completion_ids, completions, strict=True)),
    }


def write_check(path: Path, settings: dict[str, Any], rows: dict[str, Any]) -> None:
    """Write the result file of a check."""
    import vllm

    write_result(path, {**environment(), "vllm": vllm.__version__, "settings": settings, **rows})


def _in_vllm(
    folder: str, speculative_config: dict[str, Any], prompts: list[list[int]], max_new_tokens: int
) -> tuple[list[list[int]], float]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    with in_this_process():
        llm = LLM(
            model=folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            disable_log_stats=False,
            skip_tokenizer_init=True,
            speculative_config=speculative_config,
        )
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    counts: dict[str, Any] = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    accepted, drafts = (counts[f"vllm:spec_decode_num_{name}"] for name in ("accepted_tokens", "drafts"))
    return [list(output.outputs[0].token_ids) for output in outputs], 1 + accepted / drafts
