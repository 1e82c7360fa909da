"""Shared parts of the short example runs: options, policy, trainer settings, closing lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy import load_policy


def add_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Add the options of every short run; `output_dir` is the default of `--output-dir`."""
    parser.add_argument("--model", help="the policy's folder or name; by default the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per step and rank")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt (the group)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="completion tokens at most")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir))
    parser.add_argument("--seed", type=int, default=0)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The requested policy, and its tokenizer."""
    if args.model is None:
        return load_policy()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    return model, AutoTokenizer.from_pretrained(args.model)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """`GRPOConfig` settings that do not depend on where rollouts come from."""
    return {
        "output_dir": str(args.output_dir),
        "per_device_train_batch_size": args.prompts * args.num_generations,
        "num_generations": args.num_generations,
        "max_completion_length": args.max_new_tokens,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "beta": 0.0,
        "bf16": args.bf16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
    }


def print_last(engine: Any, output_dir: Path) -> None:
    """Print the speed of the last step, and where the report is."""
    last = engine.reports[-1]
    print(f"\nlast step: {last.tokens_per_s:.0f} tokens/s, accepted length {last.accepted_length:.2f}")
    print(f"written: {output_dir / 'rollouts.jsonl'}")
