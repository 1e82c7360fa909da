"""GRPO on several ranks, each with in-process rollouts; started by accelerate.

`grpo_deepspeed/` and `grpo_fsdp/` hold the configurations and the commands. Task and reward are those of the demo in
`grpo_demo/`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "grpo_demo"))

from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from cpu_ranks import asked_for, pretend
from short_run import add_options, load, print_last, settings
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
    # The same line as on one device: the policy is gathered once per generation call.
    engine = AtlasRolloutEngine(output_dir=args.output_dir).attach(trainer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print_last(engine, args.output_dir)
    trainer.accelerator.end_training()


def configuration(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        gradient_checkpointing=False,
        **settings(args),
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "runs/grpo_ranks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
