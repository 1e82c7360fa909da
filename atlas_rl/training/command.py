"""The command `atlas-rl train-speculator`: checks input, continues the prompts, trains the head, writes the checkpoint.

Generation takes hours, so everything is checked as early as possible: options, prompts and folders before the policy is
loaded, and whatever depends on the policy right after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atlas_rl import progress
from atlas_rl.policy.in_process import InProcessRunner, decoder_layers
from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import RecordingSpeculator
from atlas_rl.speculators.causal_lm import causal_lm_config, load_causal_lm, load_tokenizer
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.identify import DFLASH, DSPARK, EAGLE3, fingerprint, kind_of
from atlas_rl.training.head_kinds import KINDS
from atlas_rl.training.loop import num_held_out
from atlas_rl.training.prompts import Prompt, check_prompts, read_prompts
from atlas_rl.training.state import check_same_training
from atlas_rl.whole_files import write_whole

_AT_LEAST_ONE = (
    "max_new_tokens", "generate_batch", "draft_vocab_size", "intermediate_size", "unroll", "num_layers", "block_size",
    "epochs", "batch_size",
)  # fmt: skip
_WORK_OF = "generated.json"  # what the continuations in a work folder were made from


def train_speculator(args: argparse.Namespace, new_engine: Callable[..., Any]) -> None:
    """Run the command.

    Args:
        args: Options of the command.
        new_engine: Class of the engine that generates. Passed in, because it is defined in a layer above this folder.

    Raises:
        ValueError: The options, the prompts or the checkpoint are invalid.
        OSError: Continuations or the head cannot be written.
    """
    _check_options(args)
    config = causal_lm_config(args.model).get_text_config()
    kind, tokenizer = KINDS[args.kind], load_tokenizer(args.model)
    layers = kind.layers(args, config.num_hidden_layers)
    settings = kind.settings(args, layers, tokenizer, config.vocab_size)
    prompts = read_prompts(args.data, tokenizer)
    check_prompts(prompts, config.vocab_size, _longest_prompt(config))
    if max(len(prompt.token_ids) for prompt in prompts) + args.max_new_tokens < 3:
        raise ValueError("prompts and completions of one token leave nothing to predict: raise --max-new-tokens")
    num_calls = math.ceil(len(prompts) / args.generate_batch)
    if num_held_out(num_calls) >= num_calls:
        raise ValueError(
            f"too few prompts: {len(prompts)} make one call of --generate-batch {args.generate_batch}, and one call is held "
            "out. Give more prompts or a smaller batch"
        )
    work = args.work or args.output / "work"
    rollouts = work / "rollouts"
    _check_replaces_no_policy(args.output, ours=(rollouts / _WORK_OF).is_file())
    for folder in (args.output, work, rollouts):
        _check_writable(folder)
    made_of = _made_of(args, layers, prompts)
    _check_same_work(rollouts, made_of)
    check_same_training(work, settings)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy: Any = load_causal_lm(args.model, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    view, runner = InProcessView(policy), InProcessRunner(policy)
    check_prompts(prompts, runner.vocab_size, runner.max_context)
    decoder_layers(policy, config.num_hidden_layers)
    kind.check_policy(view, settings)

    write_whole(rollouts / _WORK_OF, json.dumps(made_of, indent=2) + "\n")
    calls = _generate(policy, prompts, rollouts, layers, args, new_engine)
    head = kind.train(view, calls, work, settings, progress.say)
    kind.save(args.output, head, view)
    log = json.loads((work / "training.json").read_text()) | {"max_new_tokens": args.max_new_tokens}
    write_whole(args.output / "training.json", json.dumps(log, indent=2) + "\n")
    progress.say(f"written: {args.output}")


def _check_options(args: argparse.Namespace) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name, kind in KINDS.items():
        strange = [option for option in kind.options if getattr(args, option) is not None and name != args.kind]
        if strange:
            raise ValueError(f"--{strange[0].replace('_', '-')} is for --kind {name}, and this is --kind {args.kind}")
    if not math.isfinite(args.temperature) or args.temperature < 0:
        raise ValueError(f"--temperature must be a finite number of at least 0, got {args.temperature}")
    if not math.isfinite(args.learning_rate) or args.learning_rate <= 0:
        raise ValueError(f"--learning-rate must be a finite number above 0, got {args.learning_rate}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")


def _longest_prompt(config: Any) -> int | None:
    """The policy's context, or more if its positions are scaled; the loaded policy decides exactly."""
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return None if context is None or rope.get("rope_type", "default") != "default" else context


def _check_replaces_no_policy(output: Path, *, ours: bool) -> None:
    """Raise `ValueError` if the folder holds anything but a head; one that is damaged may be replaced if it is `ours`."""
    if not (output / "config.json").is_file():
        return
    try:
        kind = kind_of(output)
    except ValueError:
        if ours:
            return
        raise
    if kind not in (EAGLE3, DFLASH, DSPARK):
        raise ValueError(f"'{output}' holds {kind}, which the head would overwrite: give another --output")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"'{folder}' cannot be written to ({error.strerror}): give another --output or --work"
        ) from error


def _made_of(args: argparse.Namespace, layers: tuple[int, ...], prompts: list[Prompt]) -> dict[str, Any]:
    """Everything that the continuations depend on. A command resumes another if both are equal."""
    ids = json.dumps([prompt.token_ids for prompt in prompts]).encode()
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "generate_batch", "seed")}
    return {
        "model": str(Path(args.model).resolve()),
        "weights": fingerprint(args.model),  # a folder such as `latest` gets others
        "prompts": hashlib.sha256(ids).hexdigest(),
        "layers": list(layers),
        **options,
    }


def _check_same_work(rollouts: Path, made_of: dict[str, Any]) -> None:
    """Raise `ValueError` if the folder has continuations of other prompts, another policy or other options."""
    if not any(rollouts.glob("call_*.safetensors")):
        return
    try:
        known = json.loads((rollouts / _WORK_OF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    differing = [name for name, value in made_of.items() if not isinstance(known, dict) or known.get(name) != value]
    if differing:
        raise ValueError(
            f"'{rollouts}' holds continuations made with other {', '.join(differing)}: give another --output or --work, "
            "or delete the folder"
        )


def _generate(
    policy: Any,
    prompts: list[Prompt],
    folder: Path,
    layers: tuple[int, ...],
    args: argparse.Namespace,
    new_engine: Callable[..., Any],
) -> list[Path]:
    """Continue every prompt once, recording hidden states. Calls that the folder has are kept, lost ones are made again.

    Raises:
        OSError: A call could not be written: a training on the others would be another one.
    """
    batches = [prompts[i : i + args.generate_batch] for i in range(0, len(prompts), args.generate_batch)]
    recorder = RecordingSpeculator(folder, layers)
    missing = [index for index in range(len(batches)) if not recorder.file_of(index).is_file()]
    engine = new_engine(
        model=policy, tokenizer=load_tokenizer(args.model), speculators=[HistorySpeculator(), recorder], console=False
    )
    with progress.bar("continuations", len(batches), "call", done=len(batches) - len(missing)) as bar:
        for index in missing:
            recorder.next_call = index
            report = engine.generate(
                [prompt.token_ids for prompt in batches[index]],
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=args.seed * 1_000_003 + index,
            ).report
            engine.policy_updated()  # the recorder writes a call only when the policy version changes
            if not recorder.file_of(index).is_file():
                raise OSError(
                    f"'{recorder.file_of(index)}' could not be written: free space, and repeat the command, which keeps "
                    "the continuations that are there"
                )
            progress.say(f"continuations {index + 1}/{len(batches)} | {report.num_tokens} tokens | "
                         f"{report.tokens_per_s:.0f} tok/s")  # fmt: skip
            bar.update()
    return [recorder.file_of(index) for index in range(len(batches))]
