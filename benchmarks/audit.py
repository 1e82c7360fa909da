"""Benchmarks the audit's power and price, and how far bf16 rounding is from a fault.

    python -m benchmarks.audit                        # about ten minutes on one core

Power: positions of real rollouts are taken as they are, tokens are drawn anew at each by a wrong sampler, and the audit's
own bets and detector are run over them, 64 tokens a step, until the alarm. That is teacher forcing: a wrong token does not
lead the rest of its rollout astray, so faults look smaller than they are. Only the 500 likeliest tokens of each position
are kept, renormalised.
Price: seconds per token of the audit's forward against those of the generation it audits.
Rounding: the policy in bf16, generated in process and held against its own plain forward pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas_kernels.noise import request_keys
from atlas_rl import AtlasRolloutEngine, SamplingParams, progress
from atlas_rl.audit.auditor import Auditor
from atlas_rl.audit.bets import ChangeDetector, log_ratios
from benchmarks.common import environment, quantiles, write_result

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "grpo_demo"))

import policy as demo_policy  # noqa: E402
import tasks as demo_tasks  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "audit_cpu.json"
VOCAB_KEPT, STEP_TOKENS, MAX_STEPS = 500, 64, 400
POOL_DRAWS = 60  # draws per position: a run that exhausts its pool would not be random, and the audit would detect that
NEW = 96


def tempered(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda log_probs: (log_probs / factor).softmax(dim=-1)


def junk(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda log_probs: (1 - share) * log_probs.exp() + share / log_probs.shape[-1]


def greedy(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(log_probs.argmax(dim=-1), log_probs.shape[-1]).float()


def nucleus(log_probs: torch.Tensor) -> torch.Tensor:
    probs = log_probs.exp()
    ordered, order = probs.sort(dim=-1, descending=True)
    kept = ordered * ((ordered.cumsum(dim=-1) - ordered) < 0.95)
    return torch.zeros_like(probs).scatter(1, order, kept / kept.sum(dim=-1, keepdim=True))


WRONG = {
    "right": tempered(1.0),
    "random tokens": junk(1.0),
    "1% random tokens": junk(0.01),
    "greedy": greedy,
    "temperature x 1.2": tempered(1.2),
    "temperature x 1.05": tempered(1.05),
    "temperature x 0.95": tempered(0.95),
    "top-p 0.95, not asked for": nucleus,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs per wrong sampler and policy")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    power, price, rounding = [], [], []
    for name in ("warm", "raw"):
        model, tokenizer = demo_policy.load_policy(warm=name == "warm")
        prompts = task_prompts(tokenizer, 4)
        output = generate(model, prompts, seed=0)
        price.append({"policy": name, **priced(model, output)})
        rows = positions(model, output)
        for fault, sampler in progress.each(WRONG.items(), f"wrong samplers, {name}", "sampler"):
            power.append({"policy": name, "fault": fault, **tokens_to_alarm(rows, sampler, args.runs)})
            progress.say(power[-1])
        rounding.append({"policy": name, **rounded(model.to(torch.bfloat16), prompts)})
        print(price[-1], rounding[-1], flush=True)
    write_result(args.output, {**environment(), "power": power, "price": price, "rounding": rounding})
    print(f"written: {args.output}")


def task_prompts(tokenizer: Any, num_prompts: int) -> list[list[int]]:
    rows = demo_tasks.build_dataset("train", num_prompts, seed=7)["prompt"]
    return [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for row in rows
    ]


def generate(model: Any, prompts: list[list[int]], seed: int) -> Any:
    """Sixteen rollouts without speculation and without the engine's own audit."""
    engine = AtlasRolloutEngine(model=model, speculation=False, console=False, audit_share=0)
    return engine.generate(prompts, num_generations=4, max_new_tokens=NEW, seed=seed, eos_token_ids=ending(model))


def ending(model: Any) -> list[int]:
    return [int(model.config.eos_token_id)]


def positions(model: Any, output: Any) -> torch.Tensor:
    """Log-probabilities at the positions of the rollouts: float32 `[positions, VOCAB_KEPT]`, likeliest first."""
    rows = []
    for prompt, completion in zip(output.prompt_ids, output.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.topk(VOCAB_KEPT, dim=-1).values.log_softmax(dim=-1))
    return torch.cat(rows)


def tokens_to_alarm(
    log_probs: torch.Tensor, sampler: Callable[[torch.Tensor], torch.Tensor], num_runs: int
) -> dict[str, Any]:
    """Audited tokens until the alarm, over seeded runs that draw their tokens from a pool."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(sampler(log_probs), POOL_DRAWS, replacement=True, generator=generator)
    unseen = torch.zeros((), dtype=torch.bool).expand(log_probs.shape)
    pool = torch.cat([log_ratios(log_probs, tokens, unseen, ()) for tokens in drawn.T], dim=1).numpy()
    rng, counts = np.random.default_rng(0), []
    for _ in range(num_runs):
        detector = ChangeDetector()
        for step in range(1, MAX_STEPS + 1):
            if detector.step(pool[:, rng.integers(pool.shape[1], size=STEP_TOKENS)].sum(axis=1)):
                counts.append(float(step * STEP_TOKENS))
                break
    found = {"found": len(counts) / num_runs, "num_tokens_most": MAX_STEPS * STEP_TOKENS}
    return found | {"tokens_to_alarm": quantiles(counts) if len(counts) == num_runs else None}


def priced(model: Any, output: Any) -> dict[str, Any]:
    """Seconds per token of generation at batch 16 and of the audit, which runs prompts and completions."""
    sampling = SamplingParams(max_new_tokens=NEW, seed=0, eos_token_ids=tuple(ending(model)))
    began = time.perf_counter()
    audit = Auditor(1e3).audit(model, output.prompt_ids, output.completion_ids, sampling, logprobs=output.logprobs)
    audit_s = time.perf_counter() - began
    num_forwarded = sum(map(len, output.prompt_ids)) + audit.scores.num_tokens
    generated_s, audited_s = output.report.generate_s / output.report.num_tokens, audit_s / num_forwarded
    return {
        "entropy_nats": output.report.entropy,
        "generated_us_per_token": 1e6 * generated_s,
        "audited_us_per_token": 1e6 * audited_s,
        "share_of_time_at_1_percent": 0.01 * audited_s / generated_s,
        "z": audit.scores.z,
        "findings": list(audit.findings),
    }


def rounded(model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Compares bf16 with bf16: differences of logprobs, tokens beyond the margin of the known noise, and the drift."""
    output = generate(model, prompts, seed=1)
    sampling = SamplingParams(max_new_tokens=NEW, seed=1, eos_token_ids=tuple(ending(model)))
    keys = request_keys(1, len(output.completion_ids))
    audit = Auditor(1e3).audit(
        model, output.prompt_ids, output.completion_ids, sampling, logprobs=output.logprobs, noise_keys=keys
    )
    scores = audit.scores
    return {
        "num_tokens": scores.num_tokens,
        "logprob_error_mean_nats": scores.logprob_error_mean_nats,
        "logprob_error_max_nats": scores.logprob_error_max_nats,
        "num_changed_beyond_tolerance": scores.num_changed,
        **drift(model, output),
        "z": scores.z,
        "findings": list(audit.findings),
    }


def drift(model: Any, output: Any) -> dict[str, float]:
    """Change of a token's mean log-likelihood in nats if bf16 runs the same prefix in another shape.

    p is the forward over the whole sequence, p' the one that ends at the position; sum of (p' - p) log p is the drift
    of a position, for any token drawn there. Every twelfth position is used.
    """
    found = []
    for prompt, completion in zip(output.prompt_ids, output.completion_ids, strict=True):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            whole = model(tokens, use_cache=False).logits[0].double().log_softmax(dim=-1)
            for end in range(len(prompt), tokens.shape[1], 12):
                ended = model(tokens[:, :end], use_cache=False, logits_to_keep=1).logits[0, -1].double().softmax(dim=-1)
                p = whole[end - 1]
                found.append(float(((ended - p.exp()) * p).sum()))
    return {
        "drift_mean_nats": float(np.mean(found)),
        "drift_standard_error_nats": float(np.std(found) / np.sqrt(len(found))),
        "drift_mean_absolute_nats": float(np.mean(np.abs(found))),
    }


if __name__ == "__main__":
    main()
