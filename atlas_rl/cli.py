"""The command `atlas-rl`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sub-command; what is wrong with its input is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="atlas-rl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_speculator(commands)
    _add_plan(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except ValueError as error:
        print(f"atlas-rl {args.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _add_train_speculator(commands: Any) -> None:
    parser = commands.add_parser(
        "train-speculator",
        help="train an EAGLE-3 head for a policy",
        description="Train an EAGLE-3 head (arXiv 2503.01840) on the policy's own continuations of given prompts. Writes a "
        "checkpoint in the `speculators` layout, which vLLM serves with its method `eagle3` as well. An interrupted "
        "run goes on where it stopped.",
    )
    parser.add_argument("--model", required=True, help="folder of the policy's checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="prompts: .jsonl (field `prompt`: text or messages), .txt "
                        "(one per line), or a folder saved by datasets with a column `prompt`")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, help="folder that gets config.json and model.safetensors")
    parser.add_argument("--work", type=Path, help="folder for continuations and training state [OUTPUT/work]")
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers to read [low, middle and high]")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens per continuation at most [256]")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the continuations [1.0]")
    parser.add_argument("--generate-batch", type=int, default=32, help="prompts per generation call [32]")
    parser.add_argument("--draft-vocab-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, help="of the head's MLP [the policy's]")
    parser.add_argument("--unroll", type=int, default=4, help="steps of test-time unrolling [4]")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=train_speculator)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what speculation would bring on given GPUs",
        description="A roofline of decoding with and without speculation: tokens/s, best draft length, the batch at which "
        "it stops paying, and memory. How far to trust it is in docs/planner.md.",
    )
    parser.add_argument("--model", required=True, help="config.json of the target, a folder with one, or a model of the "
                        "hub that is in its cache")  # fmt: skip
    parser.add_argument("--gpu", required=True, help="a100, h100, h200, b200, gb200, l40s or rtx5090")
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallelism within one node [1]")
    parser.add_argument("--batch", type=int, default=1, help="requests at once [1]")
    parser.add_argument("--context", type=int, default=2048, help="tokens cached per request [2048]")
    parser.add_argument("--accept", type=float, required=True, help="acceptance of a draft when those before it were "
                        "accepted, from 0 to 1")  # fmt: skip
    precisions = ("bf16", "fp8", "fp4")
    parser.add_argument("--precision", choices=precisions, default="bf16", help="of the weights [bf16]")
    parser.add_argument("--attention-precision", choices=precisions, help="of the attention's weights [--precision; bf16 "
                        "beside fp4]")  # fmt: skip
    parser.add_argument("--cache-precision", choices=precisions, default="bf16", help="of keys and values [bf16]")
    parser.add_argument("--drafter", default="eagle3", help="eagle3, mtp, recurrent, ngram or draft-lm [eagle3]")
    parser.add_argument("--draft-model", help="config.json of a draft LM, with --drafter draft-lm")
    parser.add_argument("--draft-tokens", type=int, help="draft length to show in detail [the best]")
    parser.add_argument("--max-draft-tokens", type=int, default=16, help="longest draft that is tried [16]")
    parser.add_argument("--round-overhead-ms", type=float, default=0.0, help="what the engine adds to every round that "
                        "drafts, if measured [0]")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON in SI units")
    parser.set_defaults(run=plan)


def plan(args: argparse.Namespace) -> None:
    """Work out one setting and print it. Loads neither torch nor transformers."""
    from atlas_rl.planner.drafters import drafter_model
    from atlas_rl.planner.hardware import Machine, gpu_named
    from atlas_rl.planner.model import load_model
    from atlas_rl.planner.plan import make_plan, render
    from atlas_rl.planner.roofline import Precision
    from atlas_rl.planner.speculation import Setting

    model = load_model(args.model)
    # Published FP4 checkpoints keep the attention in BF16; FP8 ones do not.
    attention = args.attention_precision or ("bf16" if args.precision == "fp4" else args.precision)
    setting = Setting(
        model=model,
        machine=Machine(gpu=gpu_named(args.gpu), num_gpus=args.gpus),
        drafter=drafter_model(args.drafter, model, load_model(args.draft_model) if args.draft_model else None),
        precision=Precision(mlp=args.precision, attention=attention, cache=args.cache_precision),
        context=args.context,
        round_overhead_s=args.round_overhead_ms / 1e3,
    )
    result = make_plan(
        setting,
        batch=args.batch,
        accept=args.accept,
        draft_tokens=args.draft_tokens,
        max_draft_tokens=args.max_draft_tokens,
    )
    print(json.dumps(result.as_dict(), indent=2) if args.json else render(result, setting))


def train_speculator(args: argparse.Namespace) -> None:
    """Continuations of the prompts, then the training, then the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atlas_rl.policy.view import InProcessView
    from atlas_rl.speculators.eagle3.checkpoint import default_layers, save_eagle3
    from atlas_rl.training.eagle3 import TrainSettings, train

    for name in ("max_new_tokens", "generate_batch", "draft_vocab_size", "unroll", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"no checkpoint in '{args.model}': --model takes a folder with a config.json")
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    prompts = read_prompts(args.data, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, local_files_only=True)
    policy = model.to(device).eval()
    layers = tuple(args.layers or default_layers(policy.config.get_text_config().num_hidden_layers))
    work = args.work or args.output / "work"
    calls = generate(policy, tokenizer, prompts, work / "rollouts", layers, args)
    settings = TrainSettings(
        layers=layers,
        draft_vocab_size=args.draft_vocab_size,
        intermediate_size=args.intermediate_size,
        unroll=args.unroll,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    head = train(InProcessView(policy), calls, work, settings, say=lambda line: print(line, flush=True))
    save_eagle3(args.output, head, policy)
    log = json.loads((work / "training.json").read_text()) | {"max_new_tokens": args.max_new_tokens}
    (args.output / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"written: {args.output}")


def generate(
    policy: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    folder: Path,
    layers: tuple[int, ...],
    args: argparse.Namespace,
) -> list[Path]:
    """Continue every prompt once, recording hidden states; calls that are there already are kept."""
    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.replay.record import RecordingSpeculator, recorded_calls
    from atlas_rl.speculators.history.speculator import HistorySpeculator

    batches = [prompts[i : i + args.generate_batch] for i in range(0, len(prompts), args.generate_batch)]
    done = len(list(folder.glob("call_*.safetensors")))
    recorder = RecordingSpeculator(folder, layers, first_call=done)
    engine = AtlasRolloutEngine(
        model=policy, tokenizer=tokenizer, speculators=[HistorySpeculator(), recorder], console=False
    )
    for index, batch in enumerate(batches[done:], start=done):
        report = engine.generate(
            batch, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed * 1_000_003 + index
        ).report
        engine.policy_updated()  # the recorder writes a call when the next could follow another policy
        print(f"continuations {index + 1}/{len(batches)} | {report.num_tokens} tokens | "
              f"{report.tokens_per_s:.0f} tok/s", flush=True)  # fmt: skip
    return recorded_calls(folder)


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Prompts as token ids: messages and texts through the chat template where the tokenizer has one.

    Raises:
        ValueError: Nothing there, or nothing that can be read.
    """
    if path.is_dir():
        from datasets import load_from_disk

        rows = list(load_from_disk(str(path))["prompt"])
    elif path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        rows = [_prompt_of(line, path, n) for n, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    else:
        raise ValueError(f"no prompts at '{path}': --data takes a .jsonl or .txt file, or a folder saved by datasets")
    if not rows:
        raise ValueError(f"'{path}' holds no prompts")
    return [_token_ids(row, tokenizer) for row in rows]


def _prompt_of(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}', line {number}: not a JSON object with a field `prompt`") from error


def _token_ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return encoded["input_ids"]
