"""GRPO with rollouts by vLLM and drafters that follow the policy, on a CPU or on GPUs.

    python examples/grpo_vllm/run.py                                        # SmolLM2-135M on a CPU, 3 steps
    accelerate launch --num_processes 8 examples/grpo_vllm/run.py --model Qwen/Qwen2.5-7B-Instruct --bf16 --steps 200

Task and reward are those of the demo in `grpo_demo/`; only the engine differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "grpo_demo"))

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from short_run import add_options, load, print_last, settings
from tasks import build_dataset, reward_func


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    model, tokenizer = load(args)
    engine = AtlasRolloutEngine(draft_model=args.draft_model, output_dir=args.output_dir)
    # TRL builds its vLLM engine here, and that engine drafts with our speculators. On a CPU, compiling it would take
    # longer than the run.
    with engine.prepare_vllm(enforce_eager=not torch.cuda.is_available()):
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward_func,
            train_dataset=build_dataset("train", 4096, seed=args.seed),
            args=configuration(args),
        )
    engine.attach(trainer)
    trainer.train()
    print_last(engine, args.output_dir)


def configuration(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        use_vllm=True,
        vllm_mode="colocate",
        vllm_tensor_parallel_size=args.tensor_parallel_size,
        vllm_max_model_length=args.max_model_length,
        vllm_gpu_memory_utilization=args.memory_share,
        vllm_enable_sleep_mode=args.sleep,
        use_cpu=not torch.cuda.is_available(),
        **settings(args),
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "runs/grpo_vllm")
    parser.add_argument("--draft-model", help="folder of a static drafter: an EAGLE-3 head for the policy")
    parser.add_argument("--max-model-length", type=int, default=512, help="prompt and completion tokens at most")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--memory-share", type=float, default=0.3, help="of each GPU, for vLLM")
    parser.add_argument(
        "--sleep", action="store_true", help="vLLM frees its memory while the trainer trains (GPU only)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
