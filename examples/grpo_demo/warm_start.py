"""Trains and evaluates the demo's warm start: a LoRA adapter for SmolLM2-135M-Instruct.

The adapter is trained on written solutions (tasks.py), with a loss on solution tokens only. Then the merged policy is
sampled at temperature 1 on held-out questions. Its entropy, accuracy and completion lengths are recorded beside the adapter.

    python examples/grpo_demo/warm_start.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessor, LogitsProcessorList

from policy import ADAPTER_DIR, load_policy, merge_adapter
from tasks import SYSTEM_PROMPT, Task, describe, make_tasks, score, write_solution

Example = tuple[list[int], list[int]]  # token ids of the prompt, of the solution (end of turn included)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_policy(warm=False, cache_dir=args.cache_dir)
    path = args.output_dir / "record.json"
    if args.steps:
        model, training = train(model, tokenizer, args)
        save_adapter(model, args.output_dir)
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "seed": args.seed,
            **environment(),
            "training": training,
        }
        # Also written before the measurement, so that an interruption there does not lose the training.
        write_record(path, record)
        model, tokenizer = load_policy(warm=False, cache_dir=args.cache_dir)
    # Measured as shipped: rounded to half precision and merged.
    model = merge_adapter(model, args.output_dir).eval()
    measured = measure(model, tokenizer, args)
    write_record(path, json.loads(path.read_text()) | {"measured": measured})
    print(json.dumps(measured, indent=2))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as indented JSON."""
    path.write_text(json.dumps(record, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps; 0 measures the existing adapter")
    parser.add_argument("--batch-size", type=int, default=8, help="solutions per step")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--eval-prompts", type=int, default=144, help="held-out questions sampled at temperature 1")
    parser.add_argument("--max-new-tokens", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where the dequantized model is kept")
    parser.add_argument("--output-dir", type=Path, default=ADAPTER_DIR)
    return parser.parse_args()


def environment() -> dict[str, Any]:
    """Return the hardware and versions of this run."""
    names = ("torch", "transformers", "peft", "reasoning-gym")
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- training --------------------------------------------------------------------------------------------------------


def encode(task: Task, solution: str, tokenizer: Any) -> Example:
    """Return token ids as generation sees them: the templated prompt; the solution with the end-of-turn token."""
    prompt = tokenizer.apply_chat_template(task.messages, tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, solution)]
    return ids[0], [*ids[1], tokenizer.eos_token_id]


def make_batches(tokenizer: Any, args: argparse.Namespace) -> list[list[Example]]:
    """Make `steps` batches, each of solutions of similar length, in random order."""
    rng = random.Random(args.seed)
    tasks = make_tasks("warm_start", args.steps * args.batch_size, args.seed)
    examples = [encode(task, write_solution(task, rng), tokenizer) for task in tasks]
    examples.sort(key=lambda example: len(example[0]) + len(example[1]))
    # Similar lengths side by side keep padding small; shuffling pairs of batches varies the composition of a batch.
    block, batches = 2 * args.batch_size, []
    for start in range(0, len(examples), block):
        rows = examples[start : start + block]
        rng.shuffle(rows)
        batches += [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    rng.shuffle(batches)
    return batches


def solution_loss(model: Any, batch: list[Example], pad_id: int) -> torch.Tensor:
    """Return the mean negative log-likelihood (nats) of the solution tokens of `batch`.

    Rows are padded on the right, where causal attention never looks, so no mask is needed. The wide output layer runs
    only on solution positions.
    """
    rows = [prompt + solution for prompt, solution in batch]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])  # [batch, width]
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for index, (prompt, solution) in enumerate(batch):
        chosen[index, len(prompt) : len(prompt) + len(solution)] = True
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state  # [batch, width, hidden]
    logits = inner.lm_head(hidden[:, :-1][chosen[:, 1:]])  # [solution tokens, vocabulary]
    return torch.nn.functional.cross_entropy(logits, ids[chosen])


def train(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train a fresh adapter; returns the wrapped model and the record of the training."""
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    batches = make_batches(tokenizer, args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_then_cosine(step, len(batches)))
    losses: list[float] = []
    curve: dict[str, float] = {}  # step -> mean loss of the last five steps
    num_tokens, started = 0, time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        loss = solution_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        num_tokens += sum(len(prompt) + len(solution) for prompt, solution in batch)
        if step % 5 == 0 or step == len(batches):
            seconds = time.perf_counter() - started
            left_s = seconds / step * (len(batches) - step)
            recent = sum(losses[-5:]) / len(losses[-5:])
            curve[str(step)] = round(recent, 3)
            rate = num_tokens / seconds
            print(
                f"step {step}/{len(batches)}  loss {recent:.3f}  {rate:.0f} tokens/s  {left_s:.0f} s left", flush=True
            )
    settings = {"steps": args.steps, "batch_size": args.batch_size, "rank": args.rank, "lr": args.learning_rate}
    seconds = round(time.perf_counter() - started, 1)
    return model, settings | {"seconds": seconds, "tokens": num_tokens, "loss_nats_by_step": curve}


def _warmup_then_cosine(step: int, total: int) -> float:
    warmup = max(1, total // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def save_adapter(model: Any, output_dir: Path) -> None:
    """Write the adapter in half precision."""
    scratch = output_dir / ".adapter"
    model.save_pretrained(scratch)
    weights = load_file(scratch / "adapter_model.safetensors")
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in weights.items()},
        output_dir / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((scratch / "adapter_config.json").read_text())
    # The local folder of the base model means nothing on other machines.
    config["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
    (output_dir / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(scratch)


# --- measurement -----------------------------------------------------------------------------------------------------


class PolicyStatistics(LogitsProcessor):
    """Records the policy's entropy (nats) and largest probability at every step of a generation."""

    def __init__(self) -> None:
        self.entropy: list[torch.Tensor] = []  # per step: [batch]
        self.peak: list[torch.Tensor] = []  # per step: [batch]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record statistics of `scores` [batch, vocabulary] and return them unchanged."""
        logprobs = scores.log_softmax(-1)
        probs = logprobs.exp()
        self.entropy.append(-(probs * logprobs).sum(-1))
        self.peak.append(probs.amax(-1))
        return scores


@torch.no_grad()
def measure(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure entropy, accuracy and lengths of completions sampled at temperature 1 on held-out questions."""
    torch.manual_seed(args.seed + 1)
    # Families have different lengths: a batch of one family waits less for its longest row.
    tasks = sorted(make_tasks("eval", args.eval_prompts, args.seed), key=lambda task: task.family)
    right: dict[str, list[float]] = {task.family: [] for task in tasks}
    lengths: list[int] = []
    entropies: list[float] = []
    peaks: list[float] = []
    samples: list[dict[str, Any]] = []
    for start in range(0, len(tasks), 32):
        rows = tasks[start : start + 32]
        statistics = PolicyStatistics()
        prompts = [encode(task, "", tokenizer)[0] for task in rows]
        completions = sample(model, prompts, tokenizer, args.max_new_tokens, statistics)
        entropy, peak = torch.stack(statistics.entropy, 1), torch.stack(statistics.peak, 1)  # [batch, steps]
        for index, (task, completion) in enumerate(zip(rows, completions, strict=True)):
            entropies += entropy[index, : len(completion)].tolist()
            peaks += peak[index, : len(completion)].tolist()
            lengths.append(len(completion))
            text = tokenizer.decode(completion, skip_special_tokens=True)
            right[task.family].append(score(text, task.family, task.answer))
            samples.append({"family": task.family, "reward": right[task.family][-1], "text": text})
        print(f"measured {start + len(rows)}/{len(tasks)} completions", flush=True)
    quantiles = {f"p{q}": round(torch.tensor(lengths).float().quantile(q / 100).item(), 1) for q in (5, 25, 50, 75, 95)}
    return {
        "prompts": len(tasks),
        "temperature": 1.0,
        "system_prompt": SYSTEM_PROMPT,
        "entropy_nats_per_token": round(sum(entropies) / len(entropies), 4),
        "mean_max_probability": round(sum(peaks) / len(peaks), 4),
        "accuracy": round(sum(sum(v) for v in right.values()) / len(tasks), 4),
        "accuracy_per_family": {k: round(v, 4) for k, v in describe(right).items()},
        "completion_tokens": {"mean": round(sum(lengths) / len(lengths), 1), **quantiles},
        "truncated_fraction": round(sum(n >= args.max_new_tokens for n in lengths) / len(lengths), 4),
        "samples": samples[:: max(1, len(samples) // 9)],
    }


def sample(
    model: Any, prompts: list[list[int]], tokenizer: Any, max_new_tokens: int, statistics: PolicyStatistics
) -> list[list[int]]:
    """Sample one completion per prompt from the unmodified distribution, cut after its end-of-turn token."""
    width, pad_id = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id,
        logits_processor=LogitsProcessorList([statistics]),
    )
    completions = [row[width:].tolist() for row in output]
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in completions]


if __name__ == "__main__":
    main()
