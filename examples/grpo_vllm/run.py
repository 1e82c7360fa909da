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
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "grpo_demo"))

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from policy import load_policy
from tasks import build_dataset, reward_func


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    model, tokenizer = load(args)
    engine = AtlasRolloutEngine(draft_model=args.draft_model, output_dir=args.output_dir)
    # TRL builds its vLLM engine here, and that engine drafts with our speculators. A CPU would compile it for longer than
    # the run takes.
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
    last = engine.reports[-1]
    print(f"\nlast step: {last.tokens_per_s:.0f} tokens/s, accepted length {last.accepted_length:.2f}")
    print(f"written: {Path(args.output_dir) / 'rollouts.jsonl'}")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.model is None:
        return load_policy()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    return model, AutoTokenizer.from_pretrained(args.model)


def configuration(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(args.output_dir),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_tensor_parallel_size=args.tensor_parallel_size,
        vllm_max_model_length=args.max_model_length,
        vllm_gpu_memory_utilization=args.memory_share,
        vllm_enable_sleep_mode=args.sleep,
        per_device_train_batch_size=args.prompts * args.num_generations,
        num_generations=args.num_generations,
        max_completion_length=args.max_new_tokens,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        beta=0.0,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's folder or name; by default the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--draft-model", help="folder of a static drafter: an EAGLE-3 head for the policy")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per step and rank")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt (the group)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="completion tokens at most")
    parser.add_argument("--max-model-length", type=int, default=512, help="prompt and completion tokens at most")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--memory-share", type=float, default=0.3, help="of each GPU, for vLLM")
    parser.add_argument(
        "--sleep", action="store_true", help="vLLM frees its memory while the trainer trains (GPU only)"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/grpo_vllm"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
