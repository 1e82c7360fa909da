"""The demo: GRPO on a real language model, with rollouts by AtlasRolloutEngine.

    python examples/grpo_demo/run.py                    # warm-started policy, 8 epochs over 6 questions
    python examples/grpo_demo/run.py --raw-policy       # the raw instruct policy: high entropy, few drafts accepted
    python examples/grpo_demo/run.py --epochs 20 --plot # long enough to see the reward rise

Few requests at a time and the same questions in every epoch: so a CPU resembles the runs that speculation is for
(`announce` says it). Every training step prints the engine's report line and the trainer's reward line. Every generation
(see `--baseline-every`) is repeated without speculation on the same prompts, weights and seed, and once per epoch by TRL's
own generation. The closing tables compare them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from atlas_rl.report.page.command import write_page
from peer import KeepsGenerations, time_trl
from policy import load_policy
from table import print_table, summarize_rollouts
from tasks import FAMILIES, build_dataset, reward_func

REPORTS, TRACE = "rollouts.jsonl", "controller.jsonl"
EAGLE3 = Path(__file__).resolve().parent / "eagle3"  # the static drafter, trained for the warm-started policy
CPU_ROOM = 8  # most requests at a time at which a plain step of this policy leaves two cores room for drafts
QUESTIONS = 6  # of an epoch
RECORDED_LAYERS = (2, 15, 27)  # low, middle and high of the policy's 30 layers: those that its EAGLE-3 head reads

# transformers renames this option while TRL still defines it by the old name.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_policy(warm=not args.raw_policy)
    generations = KeepsGenerations(reward_func)
    trainer, progress = build_trainer(model, tokenizer, args, generations)
    engine = attach_engine(trainer, args)
    announce(args)
    held_out = [evaluate(trainer, args, "before")]
    trainer.train()
    held_out.append(evaluate(trainer, args, "after"))
    trl = compare_with_trl(trainer, engine, generations, args) if engine else []
    summary = summarize(args, engine, progress.rows, held_out) | {"trl": trl, "total_s": time.perf_counter() - started}
    print_table(summary)
    path = args.output_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nwritten: {path}" + (f" and {args.output_dir / 'rollouts.jsonl'}" if engine else ""))
    if engine:
        write_page([args.output_dir], args.output_dir / "report.html")
    if args.plot:
        plot_rewards(progress.rows, args.output_dir / "reward.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, help="questions of an epoch; default: 6, or more if steps do not fit")
    parser.add_argument("--epochs", type=int, default=8, help="times that every question is met")
    parser.add_argument("--steps", type=int, help="optimizer steps, each on fresh completions; default: all epochs")
    parser.add_argument("--prompts", type=int, default=1, help="questions per step")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt (the group)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="completion tokens at most")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--raw-policy", action="store_true", help="leave the warm start out")
    parser.add_argument("--engine", choices=("atlas", "trl"), default="atlas", help="trl: TRL's own generation")
    parser.add_argument("--baseline-every", type=int, default=1, help="rerun every N-th generation without speculation")
    parser.add_argument("--trl-every", type=int, help="let TRL repeat every N-th generation; default: one per epoch")
    parser.add_argument("--eval-prompts", type=int, default=0, help="held-out questions answered before and after")
    parser.add_argument("--record", type=Path, help="folder that gets every rollout with its hidden states, for replay")
    parser.add_argument("--plot", action="store_true", help="draw the reward curve (needs matplotlib)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    args = parser.parse_args(arguments)
    if args.questions is None and args.prompts > 0:
        args.questions = -(-QUESTIONS // args.prompts) * args.prompts
    for name in ("questions", "epochs", "steps", "prompts", "max_new_tokens", "baseline_every", "trl_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.questions % args.prompts:
        parser.error(f"--questions {args.questions} must be a multiple of --prompts {args.prompts}")
    if args.num_generations < 2:
        parser.error("--num-generations must be at least 2: GRPO compares the completions of a group")
    args.steps_per_epoch = args.questions // args.prompts
    args.steps = args.steps or args.epochs * args.steps_per_epoch
    args.trl_every = args.trl_every or args.steps_per_epoch
    return args


def build_trainer(
    model: Any, tokenizer: Any, args: argparse.Namespace, generations: KeepsGenerations
) -> tuple[GRPOTrainer, Progress]:
    """Build a GRPO trainer with quiet logging, and the callback that prints and keeps one row per step."""
    completions = args.prompts * args.num_generations
    config = GRPOConfig(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.steps,
        # The update runs in slices of one group, so that only one slice's logits are held at once (about 0.3 GB).
        per_device_train_batch_size=args.num_generations,
        gradient_accumulation_steps=args.prompts,
        generation_batch_size=completions,
        per_device_eval_batch_size=32,
        num_generations_eval=1,
        num_generations=args.num_generations,
        max_completion_length=args.max_new_tokens,
        temperature=1.0,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=0.0,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=generations,
        args=config,
        train_dataset=build_dataset("train", args.questions, args.seed, args.families),
        eval_dataset=build_dataset("eval", max(1, args.eval_prompts), args.seed, args.families),
        processing_class=tokenizer,
    )
    progress = Progress()
    trainer.remove_callback(PrinterCallback)  # it would print every log as one long dict
    trainer.add_callback(progress)
    return trainer, progress


class Progress(TrainerCallback):
    """Prints and keeps one line per step; `rows` holds reward, length (tokens), entropy (nats) and seconds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._step_began = self._began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        now = time.perf_counter()
        row = {"step": state.global_step, "step_s": now - self._step_began, "reward": float(logs["reward"])}
        row |= {"length": float(logs["completions/mean_length"]), "entropy": float(logs["entropy"])}
        self.rows.append(row)
        self._step_began = now
        left_s = (now - self._began) / state.global_step * (state.max_steps - state.global_step)
        print(
            f"train step {state.global_step}/{state.max_steps} | reward {row['reward']:.2f} | "
            f"{row['length']:.0f} tok/completion | step {row['step_s']:.0f} s | about {left_s / 60:.1f} min left",
            flush=True,
        )


def attach_engine(trainer: GRPOTrainer, args: argparse.Namespace) -> Any | None:
    """Let the trainer generate with the engine, and return it; None with `--engine trl`."""
    if args.engine == "trl":
        return None
    from atlas_rl import AtlasRolloutEngine
    from atlas_rl.replay.record import RecordingSpeculator
    from atlas_rl.speculators.history.speculator import HistorySpeculator
    from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator

    for name in REPORTS, TRACE:
        (args.output_dir / name).unlink(missing_ok=True)  # the engine appends, but a demo starts afresh
    if args.record:
        speculators = [
            HistorySpeculator(),
            RecurrentSpeculator(),
            RecordingSpeculator(args.record, layers=RECORDED_LAYERS),
        ]
        engine = AtlasRolloutEngine(output_dir=args.output_dir, trace=True, speculators=speculators)
    else:
        static = EAGLE3 if EAGLE3.is_dir() and not args.raw_policy else None
        engine = AtlasRolloutEngine(output_dir=args.output_dir, trace=True, draft_model=static)
    engine.attach(trainer, baseline_every=args.baseline_every)
    return engine


def announce(args: argparse.Namespace) -> None:
    """Print the coming run's settings, and how they compare with the runs that speculation is made for."""
    policy, requests = "raw" if args.raw_policy else "warm-started", args.prompts * args.num_generations
    print(
        f"GRPO, {policy} SmolLM2-135M on {', '.join(args.families)}: {args.steps} steps of {args.prompts} x "
        f"{args.num_generations} completions, {args.questions} questions, rollouts by {args.engine}, "
        f"{torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        return
    print(
        "Speculation pays where a step has room: where more tokens in a forward cost little. A B200 has room for some 280\n"
        "tokens, two CPU cores for about 10."
    )
    if requests > CPU_ROOM:
        print(
            f"{requests} requests at a time fill that room without any drafts: there is NOTHING TO WIN here while they are\n"
            f"all active, and what is left is the tail. Up to {CPU_ROOM} a CPU resembles a GPU at its usual batches."
        )
    else:
        print(
            f"So this run has {requests} requests at a time, of many lengths, which end one by one. It meets every\n"
            "question again in every epoch, as RL runs do: the history drafter learns from that."
        )
    print(flush=True)


def compare_with_trl(
    trainer: GRPOTrainer, engine: Any, generations: KeepsGenerations, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Repeat some training steps with TRL's own generation, token by token; returns both times in seconds."""
    reports = {r.step: r for r in engine.reports if r.mode == "train" and r.baseline_tokens_per_s}
    chosen = [step for step in sorted(reports.keys() & generations.kept.keys()) if step % args.trl_every == 0]
    print(f"\nTRL's own generation repeats {len(chosen)} of the steps ...", flush=True)
    rows = []
    for step in chosen:
        report, trl_s = reports[step], time_trl(trainer, generations.kept[step])
        off_s = report.num_tokens / report.baseline_tokens_per_s
        row = {"step": step, "num_tokens": report.num_tokens, "on_s": report.generate_s, "off_s": off_s, "trl_s": trl_s}
        rows.append(row)
    return rows


def evaluate(trainer: GRPOTrainer, args: argparse.Namespace, when: str) -> float | None:
    """Return the mean reward of one completion per held-out question; None without `--eval-prompts`."""
    if args.eval_prompts < 1:
        return None
    print(f"answering {args.eval_prompts} held-out questions {when} training ...", flush=True)
    # With the same draws before and after training, only the policy differs.
    set_seed(args.seed)
    reward = float(trainer.evaluate()["eval_reward"])
    print(f"held-out reward {when} training: {reward:.3f}", flush=True)
    return reward


def summarize(
    args: argparse.Namespace, engine: Any | None, rows: list[dict[str, float]], held_out: list[float | None]
) -> dict[str, Any]:
    """Collect the figures of the closing table as plain JSON values; speeds are in tokens per second."""
    rewards = [row["reward"] for row in rows]
    edge = max(1, min(5, len(rewards) // 2))
    summary: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "architecture": platform.machine()},
        "rewards": rewards,
        "reward_first": statistics.fmean(rewards[:edge]),
        "reward_last": statistics.fmean(rewards[-edge:]),
        "reward_window_steps": edge,
        "held_out_reward_before_after": held_out,
        "train_s": sum(row["step_s"] for row in rows),
        "steps": rows,
    }
    if engine is None:
        return summary
    trace = args.output_dir / TRACE
    return summary | {"rollouts": summarize_rollouts(engine.reports, trace, args.steps_per_epoch)}


def plot_rewards(rows: list[dict[str, float]], path: Path) -> None:
    """Draw mean reward per step and its rolling mean over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, rewards = [row["step"] for row in rows], [row["reward"] for row in rows]
    rolling = [statistics.fmean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.plot(steps, rewards, "o", markersize=3, alpha=0.5, label="one step")
    axes.plot(steps, rolling, label="mean of 5 steps")
    axes.set(xlabel="training step", ylabel="mean reward (share of right answers)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
