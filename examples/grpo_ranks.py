"""GRPO on several ranks, with rollouts in process on each; accelerate starts it.

`grpo_deepspeed/` and `grpo_fsdp/` hold the configurations and the commands. Task and reward are those of the demo in
`grpo_demo/`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "grpo_demo"))

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from cpu_ranks import asked_for, pretend
from policy import load_policy
from tasks import build_dataset, reward_func


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        pretend(asked_for())
    set_seed(args.seed)
    model, tokenizer = load(args)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_func,
        train_dataset=build_dataset("train", 4096, seed=args.seed),
        args=configuration(args),
    )
    # The same line as on one device: the policy is gathered once for each generation call.
    engine = AtlasRolloutEngine(output_dir=args.output_dir).attach(trainer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        last = engine.reports[-1]
        print(f"\nlast step: {last.tokens_per_s:.0f} tokens/s, accepted length {last.accepted_length:.2f}")
        print(f"written: {Path(args.output_dir) / 'rollouts.jsonl'}")
    trainer.accelerator.end_training()


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.model is None:
        return load_policy()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    return model, AutoTokenizer.from_pretrained(args.model)


def configuration(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(args.output_dir),
        per_device_train_batch_size=args.prompts * args.num_generations,
        num_generations=args.num_generations,
        max_completion_length=args.max_new_tokens,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        beta=0.0,
        bf16=args.bf16,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's folder or name; by default the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per step and rank")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt (the group)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="completion tokens at most")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/grpo_ranks"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
