"""The command `atlas-rl`."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from atlas_rl import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sub-command; invalid input prints one line on stderr and gives exit status 2.

    A command may return work whose errors are not of its input: they keep their tracebacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal or a log has no letter for ends no command
    args = parse(arguments)
    try:
        work = args.run_command(args)
    except BrokenPipeError as error:
        # Whoever read the output has enough of it (`| head`). What is left must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except (ValueError, OSError) as error:
        print(f"atlas-rl {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    if work is not None:
        work()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of the sub-command; `run_command` is the function that runs it.

    Options of others are left unread in `flags`: those of `grpo` are TRL's, those of `vllm-serve` vLLM's, and both take
    seconds to import.
    """
    parser = argparse.ArgumentParser(
        prog="atlas-rl",
        description="Speculative decoding for the rollouts of reinforcement learning: train, look at runs, examine the "
        "machine. `atlas-rl COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"atlas-rl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_grpo(commands)
    _add_train_speculator(commands)
    _add_plan(commands)
    _add_report(commands)
    _add_compare(commands)
    _add_doctor(commands)
    _add_vllm_serve(commands)
    args, flags = parser.parse_known_args(arguments)
    if args.command in ("grpo", "vllm-serve"):
        args.flags = flags
    elif flags:
        _refuse(commands.choices[args.command], flags)
    return args


def _refuse(command: argparse.ArgumentParser, flags: Sequence[str]) -> NoReturn:
    """Exit with the usage of the sub-command, the unknown options, and the nearest option that exists."""
    known = [name for action in command._actions for name in action.option_strings]
    near = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    command.error(f"unrecognized arguments: {' '.join(flags)}{hint}")


def _add_grpo(commands: Any) -> None:
    parser = commands.add_parser(
        "grpo", help="train by GRPO as `trl grpo` does, from the same YAML file", add_help=False
    )
    parser.set_defaults(run_command=grpo)


def _add_train_speculator(commands: Any) -> None:
    parser = commands.add_parser(
        "train-speculator",
        help="train an EAGLE-3 or DFlash head for a policy",
        description="Train an EAGLE-3 head (arXiv 2503.01840) or a DFlash head (arXiv 2602.06036) on the policy's own "
        "continuations of given prompts. Writes a checkpoint that vLLM's own methods `eagle3` and `dflash` read as well. An "
        "interrupted run goes on where it stopped.",
    )
    parser.add_argument("--kind", choices=("eagle3", "dflash"), default="eagle3", help="kind of head [eagle3]")
    parser.add_argument("--model", required=True, help="folder of the policy's checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="prompts: .jsonl (field `prompt`: text or messages), .txt "
                        "(one per line), or a folder saved by datasets with a column `prompt`")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, help="folder that gets config.json and model.safetensors")
    parser.add_argument("--work", type=Path, help="folder for continuations and training state [OUTPUT/work]")
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers to read the inputs of [low, "
                        "middle and high; evenly spaced for dflash]")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens per continuation at most [256]")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the continuations [1.0]")
    parser.add_argument(
        "--generate-batch",
        type=int,
        default=32,
        help="prompts per generation call [32]; one call is held "
        "out of training to measure on, so there must be more prompts than this",
    )
    parser.add_argument("--draft-vocab-size", type=int, help="most tokens that an eagle3 head proposes [4096]")
    parser.add_argument("--intermediate-size", type=int, help="of the head's MLP [the policy's]")
    parser.add_argument("--unroll", type=int, help="steps of test-time unrolling, of eagle3 [4]")
    parser.add_argument("--num-layers", type=int, help="layers of a dflash head [5]")
    parser.add_argument("--block-size", type=int, help="positions of a dflash block, one more than it drafts [8]")
    parser.add_argument("--markov-rank", type=int, help="makes a dflash head one of DSpark, whose draft tokens depend on "
                        "the one before [0: it does not]")  # fmt: skip
    parser.add_argument("--mask-token-id", type=int, help="token that stands for a position to be drafted, of dflash [the "
                        "tokenizer's mask token, an unused one or the padding token]")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run_command=train_speculator)


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
    parser.add_argument("--engine", default="typical", help="whose host is added to rounds that draft: typical, sglang, "
                        "vllm, tensorrt-llm, together, or none for a device alone [typical]")  # fmt: skip
    parser.add_argument("--round-overhead-ms", type=float, help="what the host adds to every round that drafts, if measured "
                        "[the engine's]")  # fmt: skip
    parser.add_argument("--request-overhead-ms", type=float, help="the same, for every request in it [the engine's]")
    parser.add_argument("--json", action="store_true", help="print JSON in SI units")
    parser.set_defaults(run_command=plan)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML page of a run, or of several side by side",
        description="Write one HTML page that needs nothing but a browser: whether speculation paid, where the seconds "
        "went, who drafted and how well, warnings and what to do about them. Ranks are merged; a run may be going on.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run (output_dir), or its rollouts.jsonl")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page [report.html]")
    parser.add_argument("--all", action="store_true", help="show earlier runs in the same file, too")
    parser.set_defaults(run_command=report)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="two runs' figures with their noise",
        description="Print the figures of two runs, the spread of their steps, and the ratio of the second to the first "
        "with a bootstrap interval.",
    )
    parser.add_argument("first", type=Path, help="folder of a run (output_dir), or its rollouts.jsonl")
    parser.add_argument("second", type=Path, help="of the run that is divided by it")
    parser.add_argument("--skip", type=int, default=0, help="steps to leave out at the start of both [0]")
    parser.set_defaults(run_command=compare)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine can run, and what is missing",
        description="Print versions, GPU, engines and kernels of this machine, and for what is missing the command that "
        "brings it. Exit status 1 if what is needed or installed does not work; missing optional parts are no fault.",
    )
    parser.set_defaults(run_command=doctor)


def _add_vllm_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "vllm-serve",
        help="vLLM's server with drafters that follow a trainer's policy",
        usage="atlas-rl vllm-serve MODEL [--draft-model FOLDER] [--idle-learning on|off] "
        "[flags of `vllm serve` or `trl vllm-serve`]",
        description="Run `vllm serve` with this package's proposer, worker extension and weight transfer. What it adds is "
        "printed. A TRL trainer in server mode is attached as any other (docs/scaling.md).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder or name of the policy, if it is not the first argument")
    parser.add_argument("--draft-model", type=Path, help="folder of an EAGLE-3 or DFlash head, the static speculator")
    parser.add_argument("--idle-learning", choices=("on", "off"), help="whether drafters learn while the server has nothing "
                        "to do [on for GPUs, off for CPUs, whose cores the trainer may be using]")  # fmt: skip
    parser.set_defaults(run_command=vllm_serve)


def grpo(args: argparse.Namespace) -> Callable[[], None]:
    """Check the options of TRL's own script and return a function that trains. See `integrations/trl/script.py`."""
    from atlas_rl.integrations.trl.script import prepare, read_arguments

    arguments, config = read_arguments(args.flags)
    from atlas_rl import AtlasRolloutEngine

    return prepare(arguments, config, AtlasRolloutEngine)


def plan(args: argparse.Namespace) -> None:
    """Predict one setting and print it. Loads neither torch nor transformers."""
    from atlas_rl.planner.drafters import drafter_model
    from atlas_rl.planner.hardware import Machine, gpu_named
    from atlas_rl.planner.host import host_of
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
        host=host_of(args.engine, round_ms=args.round_overhead_ms, request_ms=args.request_overhead_ms),
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
    """Train a draft head; see `training/command.py`."""
    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.training import command

    command.train_speculator(args, AtlasRolloutEngine)


def report(args: argparse.Namespace) -> None:
    """Write an HTML page about runs; see `report/page/command.py`. Loads neither torch nor transformers."""
    from atlas_rl.report.page.command import write_report

    write_report(args)


def compare(args: argparse.Namespace) -> None:
    """Compare two runs; see `report/compare.py`. Loads neither torch nor transformers."""
    from atlas_rl.report.compare import run_command

    run_command(args)


def doctor(args: argparse.Namespace) -> None:
    """Examine this machine; exit status 1 if something does not work. See `doctor.py`."""
    from atlas_rl.doctor import examine, report_on

    findings = examine()
    print(report_on(findings))
    if any(finding.state == "broken" for finding in findings):
        raise SystemExit(1)


def vllm_serve(args: argparse.Namespace) -> None:
    """Replace this process with vLLM's server; see `vllm/serve.py`."""
    model, flags = args.model, list(args.flags)
    if model is None and flags and not flags[0].startswith("-"):
        model = flags.pop(0)
    if model is None:
        raise ValueError("which model? It comes first: atlas-rl vllm-serve MODEL, then vLLM's flags")
    from atlas_rl.vllm.serve import serve

    learning = None if args.idle_learning is None else args.idle_learning == "on"
    serve(model, flags, args.draft_model, idle_learning=learning)
