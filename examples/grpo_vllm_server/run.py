"""GRPO with rollouts by a vLLM server whose drafters follow the policy, on CPUs or on GPUs of several machines.

    python examples/grpo_vllm_server/run.py --save-policy runs/policy      # the demo's SmolLM2-135M, for the server
    atlas-rl vllm-serve runs/policy --max-model-len 512 --enforce-eager    # another terminal, or another machine
    python examples/grpo_vllm_server/run.py --server http://localhost:8000

Task and reward are those of the demo in `grpo_demo/`; only the engine differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "grpo_demo"))

from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from short_run import add_options, load, print_last, settings
from tasks import build_dataset, reward_func


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    model, tokenizer = load(args)
    if args.save_policy is not None:
        model.save_pretrained(args.save_policy)
        tokenizer.save_pretrained(args.save_policy)
        return
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_func,
        train_dataset=build_dataset("train", 4096, seed=args.seed),
        args=configuration(args),
    )
    # With backend="vllm" the engine connects to the server itself: over NCCL to GPUs, over gloo to CPUs.
    engine = AtlasRolloutEngine(backend="vllm", output_dir=args.output_dir).attach(trainer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print_last(engine, args.output_dir)


def configuration(args: argparse.Namespace) -> GRPOConfig:
    cpu = not torch.cuda.is_available()
    return GRPOConfig(
        vllm_mode="server",
        vllm_server_base_url=args.server,
        vllm_group_port=args.group_port,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        **settings(args),
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "runs/grpo_vllm_server")
    parser.add_argument("--save-policy", type=Path, help="write the policy to this folder, for the server, and stop")
    parser.add_argument("--server", default="http://localhost:8000", help="address of `atlas-rl vllm-serve`")
    parser.add_argument("--group-port", type=int, default=51216, help="a free port here, for the weights")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
