"""Benchmarks how well each drafter follows the policy: accepted length per training step, by replay of recorded runs.

    python -m benchmarks.adaptivity record --scenario grpo --seed 0      # one live run: rollouts, hidden states, times
    python -m benchmarks.adaptivity replay                               # every arm over every recorded run, and the plots

Rollouts do not depend on the drafter, so one recorded run per seed answers for every arm, exactly; only times need the live
run. `grpo` is the demo's training; `shift` trains on one task family, then on another, then on the first again. Arms draft
`LOOKAHEAD` tokens per request and step, so that accepted lengths compare drafters and not decisions; `all` asks every
drafter and takes the most promising draft of each request. The recurrent head comes in kinds: `recurrent` starts from what
it had learned by the end of another run, `recurrent_cold` from nothing; the others are cold ones as well: `recurrent_frozen`
without refreshes after step 5, `recurrent_tv` with the other loss, `recurrent_argmax` without drawn drafts,
`recurrent_uniform` without learning more where its drafts were rejected, and `recurrent_x2`, `_x4` and `_x8` with so many
times the learning for the same budget. `recurrent_idle` and `all_idle` also learn while the trainer computes, as drafters of
a server do: for two thirds of the live step, the trainer's share of the demo, or until that no longer pays.
`eagle3_adaptive` is the static head, refined after
every update; `recurrent_eagle3_adaptive` has it beside a cold recurrent head, `all_adaptive` beside all others: within one
budget of seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers import TrainerCallback

from atlas_rl.controller.acceptance import AcceptanceModel
from atlas_rl.controller.base import Admission, Step
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Verified
from atlas_rl.policy.view import InProcessView
from atlas_rl.progress import each, say
from atlas_rl.replay.policy import RecordedPolicy
from atlas_rl.replay.record import Recorded, recorded_calls
from atlas_rl.replay.replay import replay
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3_adaptive.speculator import AdaptiveEagle3Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.learning_budget import divide_budget
from atlas_rl.speculators.recurrent.distill import Loss
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.common import environment, write_result
from benchmarks.replay_seconds import LiveClock, ThreadSeconds, study

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "grpo_demo"
sys.path.insert(0, str(DEMO))

import run as demo  # noqa: E402
import tasks as demo_tasks  # noqa: E402
from policy import load_policy  # noqa: E402

LOOKAHEAD = 5
FREEZE_AFTER = 5
NEVER = 1_000_000  # steps between reruns without speculation
PROMPTS = {"grpo": 4, "grpo_short": 2, "shift": 4}  # questions per step, all of them new
SHIFT = (("chain_sum", 15), ("leg_counting", 8), ("chain_sum", 7))  # task family and training steps
EAGLE3 = DEMO / "eagle3"
MORE_LEARNING = {"recurrent_x2": 2.0, "recurrent_x4": 4.0, "recurrent_x8": 8.0}  # times that of the same budget
TRAINERS_SHARE = 2 / 3  # of a step (docs/demo.md): the time in which a server has nothing to do
IDLE = {"recurrent_idle": "recurrent_cold", "all_idle": "all"}  # arms that learn in idle time, and who drafts in them
ARMS = (
    "recurrent_cold",
    "history",
    "recurrent",
    "recurrent_frozen",
    "recurrent_tv",
    "recurrent_argmax",
    "recurrent_uniform",
    *MORE_LEARNING,
    *IDLE,
    "eagle3",
    "eagle3_adaptive",
    "recurrent_eagle3_adaptive",
    "all",
    "all_adaptive",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record_ = commands.add_parser("record")
    record_.add_argument("--scenario", choices=("grpo", "grpo_short", "shift"), default="grpo")
    record_.add_argument("--steps", type=int, default=30)
    record_.add_argument("--seed", type=int, default=0)
    record_.add_argument("--eval-prompts", type=int, default=0, help="held-out questions answered before and after")
    record_.add_argument("--learning-rate", type=float, default=2e-5)
    replay_ = commands.add_parser("replay")
    replay_.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "adaptivity_cpu.json")
    replay_.add_argument("--arms", nargs="+", choices=ARMS, help="only these")
    replay_.add_argument("--keep", action="store_true", help="keep the other arms of the output file")
    for command in (record_, replay_):
        command.add_argument("--runs", type=Path, default=ROOT / "runs" / "adaptivity")
        command.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    {"record": record, "replay": replay_all}[args.command](args)


def record(args: argparse.Namespace) -> None:
    """Run the demo's training live and record it into RUNS/SCENARIO-SEED."""
    folder = args.runs / f"{args.scenario}-{args.seed}"
    if args.scenario == "shift":
        args.steps = sum(steps for _, steps in SHIFT)
    given = {"steps": args.steps, "seed": args.seed, "learning-rate": args.learning_rate, "output-dir": folder}
    given |= {"record": folder / "record", "eval-prompts": args.eval_prompts, "baseline-every": NEVER}
    prompts = PROMPTS[args.scenario]
    given |= {"prompts": prompts, "questions": args.steps * prompts, "threads": args.threads}
    options = demo.parse_args([f"--{name}={value}" for name, value in given.items()])
    folder.mkdir(parents=True, exist_ok=True)
    demo.set_seed(options.seed)
    model, tokenizer = load_policy(warm=True)
    trainer, progress = demo.build_trainer(model, tokenizer, options, demo.KeepsGenerations(demo_tasks.reward_func))
    ticks = CpuTicks()
    trainer.add_callback(ticks)
    if args.scenario == "shift":
        phases = [
            demo_tasks.build_dataset("train", steps * options.prompts, options.seed + phase, [family])
            for phase, (family, steps) in enumerate(SHIFT)
        ]
        trainer.train_dataset = concatenate_datasets(phases)
        trainer.args.shuffle_dataset = trainer.shuffle_dataset = False
    engine = demo.attach_engine(trainer, options)
    held_out = [demo.evaluate(trainer, options, "before")]
    trainer.train()
    engine.policy_updated()  # writes the last call
    write_steps(folder, engine, progress.rows, ticks.steps_s)
    held_out.append(demo.evaluate(trainer, options, "after"))
    summary = demo.summarize(options, engine, progress.rows, held_out)
    (folder / "summary.json").write_text(json.dumps(environment() | summary, indent=2) + "\n")
    demo.plot_rewards(progress.rows, folder / "reward.png")


class CpuTicks(TrainerCallback):
    """Processor seconds of every training step: on one thread, its seconds on an otherwise idle machine."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self._began_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began_s = time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            now_s = time.process_time()
            self.steps_s.append(now_s - self._began_s)
            self._began_s = now_s


def write_steps(folder: Path, engine: Any, rows: list[dict[str, float]], steps_cpu_s: list[float]) -> None:
    """Write figures that only the live run has: rewards, entropies and times."""
    reports = [report for report in engine.reports if report.mode == "train"]
    steps = [
        {
            "reward": row["reward"],
            "entropy": report.entropy,
            "step_s": row["step_s"],
            "step_cpu_s": cpu_s,
            "generate_s": report.generate_s,
            "refresh_s": report.refresh_s,
            "live_accepted_length": report.accepted_length,
        }
        for row, report, cpu_s in zip(rows, reports, steps_cpu_s, strict=True)
    ]
    (folder / "steps.json").write_text(json.dumps({"environment": environment(), "steps": steps}, indent=2) + "\n")


class MostPromising(FixedController):
    """Every speculator drafts; each request uses the draft with the most expected accepted tokens."""

    def __init__(self, speculators: list[str], num_draft_tokens: int) -> None:
        super().__init__(speculators, speculators[0], num_draft_tokens)
        self._all = speculators
        self._calibrated = {name: AcceptanceModel() for name in speculators}

    def plan(self, step: Step) -> dict[str, np.ndarray]:
        left = [name for name in self._all if name in step.ready and name not in step.drafts]
        return {name: np.minimum(step.room, self._num_draft_tokens) for name in left}

    def admit(self, step: Step) -> Admission:
        arms, lengths, best = np.zeros(step.batch, np.int64), np.zeros(step.batch, np.int64), np.zeros(step.batch)
        for name, draft in step.drafts.items():
            present = np.arange(draft.confidence.shape[1])[None] < draft.lengths[:, None]
            estimate = self._calibrated[name].estimate(draft.confidence)
            gain = np.cumprod(np.where(present, estimate, 0.0), axis=1).sum(axis=1)
            better = gain > best
            arms[better], lengths[better], best[better] = self._all.index(name), draft.lengths[better], gain[better]
        return Admission(arms, lengths)

    def observe(
        self, step: Step, admission: Admission, verified: Verified, forward_s: float, step_s: float
    ) -> dict[str, Any] | None:
        for name, draft in step.drafts.items():
            self._calibrated[name].observe(draft.confidence, *verified.outcome_of(draft))
        return super().observe(step, admission, verified, forward_s, step_s)

    def policy_updated(self, expected: Mapping[str, np.ndarray]) -> None:
        for model in self._calibrated.values():
            model.policy_updated()


def replay_all(args: argparse.Namespace) -> None:
    """Replay every arm over every recorded run; `recurrent` starts from the final state of another run's cold head."""
    folders = sorted(path.parent for path in args.runs.glob("*/steps.json"))
    if not folders:
        raise SystemExit(f"nothing recorded in {args.runs}: run `record` first")
    runs: list[dict[str, Any]] = []
    if args.keep and args.output.is_file():
        anew = {(folder.name, arm) for folder in folders for arm in args.arms or ARMS}
        before = json.loads(args.output.read_text())
        # The top of the file will name this machine. Runs that are kept keep the names of theirs.
        origin = {name: before[name] for name in ("machine", "versions", "commit") if name in before}
        kept = [run for run in before["runs"] if (f"{run['scenario']}-{run['seed']}", run["arm"]) not in anew]
        runs = [{**origin, **run} for run in kept]
    learned = {}
    for folder in folders if "recurrent_cold" in (args.arms or ARMS) else []:
        learned[folder] = measure(runs, "recurrent_cold", folder, args.output, state=None)["recurrent"].state_dict()
    for folder in each(folders, "recorded runs", "run"):
        others = [other for other in folders if other != folder]
        state = learned[others[(folders.index(folder)) % len(others)]] if others and learned else None
        for arm in ARMS:
            if arm == "recurrent_cold" or arm not in (args.arms or ARMS):
                continue
            if ("eagle3" in arm and not EAGLE3.is_dir()) or (arm == "recurrent" and state is None):
                continue
            measure(runs, arm, folder, args.output, state if arm == "recurrent" else None)
    print(f"written: {args.output}")


def measure(
    runs: list[dict[str, Any]], arm: str, folder: Path, output: Path, state: dict[str, Any] | None
) -> dict[str, Speculator]:
    """Replay one arm over one run, add it to `runs` and write it; returns its speculators."""
    scenario, seed = folder.name.rsplit("-", 1)
    steps = json.loads((folder / "steps.json").read_text())["steps"]
    speculators, lengths, costs = replay_arm(arm, folder / "record", steps, state)
    runs.append(
        {
            "scenario": scenario,
            "arm": arm,
            "seed": int(seed),
            "accepted_length_per_step": lengths,
            "reward_per_step": [step["reward"] for step in steps],
            "entropy_per_step": [step["entropy"] for step in steps],
            **costs,
            "lookahead": LOOKAHEAD,
            # Steps before which the task changed.
            "shifts": np.cumsum([steps for _, steps in SHIFT])[:-1].tolist() if scenario == "shift" else [],
        }
    )
    say(f"{folder.name} {arm:>16}: " + " ".join(f"{value:.2f}" for value in lengths))
    write_result(output, {**environment(), "runs": runs})
    return speculators


def replay_arm(
    arm: str, folder: Path, steps: list[dict[str, float]], state: dict[str, Any] | None
) -> tuple[dict[str, Speculator], list[float], dict[str, float]]:
    """Speculators of the arm, the accepted length per step, and the arm's costs.

    `refresh_share` is the refreshes' share of the live steps' time and `refresh_s` their seconds. `idle_learning_s` is the
    seconds of this thread for learning beside the trainer. `draft_s` is its seconds for everything else that the
    speculators did. `num_forwards` counts the target forwards.
    """
    clock = LiveClock(MORE_LEARNING.get(arm, 1.0))
    speculators = arm_speculators(arm, clock)
    divide_budget(speculators.values())
    spent = ThreadSeconds(speculators.values())
    names = list(speculators)
    controller = MostPromising(names, LOOKAHEAD) if len(names) > 1 else FixedController(names, names[0], LOOKAHEAD)
    lengths, policy, refresh_s, idle_learning_s, num_forwards, num_tokens = [], None, 0.0, 0.0, 0, 0
    for index, (path, step) in enumerate(zip(recorded_calls(folder), steps, strict=True)):
        recorded = Recorded.load(path)
        if policy is None:
            # A head that learned in another run may know tokens that this run has not used yet.
            like = None if state is None else InProcessView(load_policy(warm=True)[0])
            policy = RecordedPolicy(recorded, like)
            for speculator in speculators.values():
                speculator.bind(policy, couples_noise=True)
            if state is not None:
                speculators["recurrent"].load_state_dict(state)
        policy.follow(recorded)
        report, rollouts = replay(recorded, speculators, controller)
        step_s = step.get("step_cpu_s", step["step_s"])  # older runs had the machine to themselves
        if arm in IDLE:
            idle_learning_s += study(speculators.values(), TRAINERS_SHARE * step_s)
        clock.pass_(step_s)
        generate_s = (step["generate_s"] - step["refresh_s"]) * step_s / step["step_s"]
        rollouts = replace(rollouts, generate_s=generate_s, accepted=report.accepted)
        lengths.append(report.accepted_length)
        num_forwards, num_tokens = num_forwards + report.num_forwards, num_tokens + report.num_decoded_tokens
        began_s = clock()
        with clock.refreshing():
            for name, speculator in speculators.items():
                if not (arm == "recurrent_frozen" and name == "recurrent" and index >= FREEZE_AFTER):
                    speculator.refresh(rollouts, index + 1)
        refresh_s += (clock() - began_s) * clock.slower
        controller.policy_updated({})
    costs = {
        "refresh_share": refresh_s / sum(step.get("step_cpu_s", step["step_s"]) for step in steps),
        "refresh_s": refresh_s,
        "idle_learning_s": idle_learning_s,
        "draft_s": spent.total_s,
        "num_forwards": num_forwards,
        "num_decoded_tokens": num_tokens,
    }
    return speculators, lengths, costs


def arm_speculators(arm: str, clock: LiveClock) -> dict[str, Speculator]:
    loss: Loss = "tv" if arm == "recurrent_tv" else "kl"
    recurrent = RecurrentSpeculator(
        clock=clock,
        loss=loss,
        argmax=arm == "recurrent_argmax",
        **({"missed_weight": 1.0} if arm == "recurrent_uniform" else {}),
    )
    chosen: dict[str, list[Speculator]] = {
        "history": [HistorySpeculator()],
        "recurrent": [recurrent],
        "recurrent_frozen": [recurrent],
        "recurrent_cold": [recurrent],
        "recurrent_tv": [recurrent],
        "recurrent_argmax": [recurrent],
        "recurrent_uniform": [recurrent],
        "all": [HistorySpeculator(), recurrent],
    }
    if EAGLE3.is_dir():
        static = Eagle3Speculator(EAGLE3)
        refined = AdaptiveEagle3Speculator(EAGLE3, clock=clock)
        chosen["eagle3"] = [static]
        chosen["eagle3_adaptive"] = [refined]
        chosen["recurrent_eagle3_adaptive"] = [recurrent, refined]
        chosen["all"].append(static)
        chosen["all_adaptive"] = [*chosen["all"], refined]
    return {
        speculator.name: speculator
        for speculator in chosen["recurrent_cold" if arm in MORE_LEARNING else IDLE.get(arm, arm)]
    }


if __name__ == "__main__":
    main()
