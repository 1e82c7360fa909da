"""Measures without a GPU how much of speculation's gain the host's work leaves when forwards are as fast as a GPU's.

    python -m benchmarks.pace record             # once: rollouts and hidden states of two policies, two minutes on two cores
    python -m benchmarks.pace measure            # every cell, a quarter of an hour on one core
    python -m benchmarks.pace measure --quick    # one setting, three batches

`benchmarks/paced.py` says how: forwards take what the planner predicts for the setting; the host's code is real and timed.
So `tokens_per_s` are predictions, but host milliseconds are measured. A cell is a setting, a policy and a batch. Its arms:
*off*, each drafter of the default configuration alone at `FIXED` tokens, and the controller with both. Drafters start from
what they learned of an earlier call over other prompts; the controller has one pass over the cell to get used to it, with
drafters that are put back afterwards. The rest of the passes count. Nothing of a pass enters the archive of the next one.

    tokens_per_s        all tokens of the cell's calls over the seconds to the end of the rollouts
    ratio_to_ideal      against the same decisions with a host that takes no time
    device_idle_share   share of the time in which the device waits for the host
    host_exposed_ms     per step, the time between the end of the device's work and the next forward that is no draft
    host_ms             per phase and step, the host's own work; what runs beside the device is in it
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas_rl import progress
from atlas_rl.controller.base import Controller
from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.controller.goodput import GoodputController
from atlas_rl.core import Sequences
from atlas_rl.decode.defaults import bind_all
from atlas_rl.decode.guard import Faults, GuardedController
from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.drafters import recurrent
from atlas_rl.planner.hardware import Machine, gpu_named
from atlas_rl.planner.host import NO_HOST
from atlas_rl.planner.model import parse_model
from atlas_rl.planner.roofline import Precision
from atlas_rl.planner.speculation import Setting
from atlas_rl.policy.step_graphs import SIZES
from atlas_rl.replay.policy import RecordedPolicy
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.replay.replay import replay
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from benchmarks.common import ROOT, environment, write_result
from benchmarks.paced import Costs, PacedLoop
from benchmarks.paced_recurrent import PacedRecurrent

RECORDS, RESULT = ROOT / "runs" / "pace", ROOT / "benchmarks" / "results" / "pace.json"
BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXT = 1024  # tokens before each recorded text: prompts of a real task are longer than the demo's
FIXED = 4  # draft tokens of a drafter that runs alone
GROUP = 8
STEP_S, BETWEEN_UPDATES_S = 0.2, 240.0  # seconds of a distillation step, and the time of which a refresh has a share
PROMPTS, NEW_TOKENS = 8, 48  # of each recorded call
CALLS, LEARNED_CALLS = 5, 1  # recorded calls, and those of them that drafters learn from
MOST_CALLS = {1: 6, 8: 4, 32: 2}  # calls per pass, for batches of which the record holds more
ARMS = ("off", "history", "recurrent", "controller")

_FP8 = Precision(mlp="fp8", attention="fp8")
SETTINGS: dict[str, tuple[str, str, int, Precision]] = {
    "Qwen3-1.7B, H100": ("Qwen3-1.7B", "h100", 1, Precision()),
    "Qwen3-1.7B, H100, in process": ("Qwen3-1.7B", "h100", 1, Precision()),
    "Qwen3-8B, B200": ("Qwen3-8B", "b200", 1, Precision()),
    "Qwen3-32B, B200": ("Qwen3-32B", "b200", 1, Precision()),
    "DeepSeek-V3.1, 4x B200": ("DeepSeek-V3", "b200", 4, _FP8),
}
PADDED = {"Qwen3-1.7B, H100, in process": SIZES}
"""Settings whose decode forwards have the sizes of `policy/step_graphs.py`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "measure"])
    parser.add_argument("--policies", nargs="+", choices=["warm", "raw"], default=["warm", "raw"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--passes", type=int, default=3, help="that count")
    parser.add_argument("--quick", action="store_true", help="Qwen3-8B at batch 8, 64 and 256, warm, one pass")
    parser.add_argument("--keep", action="store_true", help="keep the cells of the output file that are not measured")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.quick:
        args.settings, args.batches, args.policies, args.passes = ["Qwen3-8B, B200"], [8, 64, 256], ["warm"], 1
    {"record": record, "measure": measure}[args.command](args)


def record(args: argparse.Namespace) -> None:
    """Record calls of 64 requests of each policy into `args.records`."""
    from atlas_rl import AtlasRolloutEngine
    from benchmarks.cells import tokenized
    from benchmarks.rollout import demo_policy, demo_tasks

    for policy in args.policies:
        model, tokenizer = demo_policy.load_policy(warm=policy == "warm")
        recorder = RecordingSpeculator(args.records / policy)
        engine = AtlasRolloutEngine(
            model=model, tokenizer=tokenizer, speculators=[recorder], console=False, audit_share=0
        )
        for call in progress.each(range(CALLS), f"calls, {policy}", "call"):
            rows = demo_tasks.build_dataset("train", PROMPTS, seed=70_000 + call)["prompt"]
            prompts = tokenized(tokenizer, rows)
            engine.generate(prompts, num_generations=GROUP, max_new_tokens=NEW_TOKENS, seed=70_000 + call)
            engine.policy_updated()
            progress.say(f"{policy}: call {call} recorded")


# ------------------------------------------------------------------------------------------------------------------ arms


@dataclass(slots=True)
class Learned:
    """Drafters that have learned from the first calls, and the call to measure.

    Attributes:
        recorded: The call to measure.
        recurrent: The bound head, kept from pass to pass: only a refresh changes its weights.
        history: The history index's state at the start of every pass.
        policy: View of the policy that drafters are bound to.
    """

    recorded: Recorded
    recurrent: PacedRecurrent
    history: dict[str, Any]
    policy: RecordedPolicy

    @classmethod
    def of(cls, folder: Path) -> Learned:
        calls = [Recorded.load(path) for path in recorded_calls(folder)]
        policy = RecordedPolicy(calls[0])
        for recorded in calls:
            policy.follow(recorded)
        clock = Ticking()
        history, head = HistorySpeculator(), PacedRecurrent(clock=clock)
        chosen: dict[str, Speculator] = {"history": history, "recurrent": head}
        for speculator in chosen.values():
            speculator.bind(policy, couples_noise=True)
        for version, recorded in enumerate(calls[:LEARNED_CALLS]):
            _, rollouts = replay(recorded, chosen, NothingYet(tuple(chosen)))
            clock.now_s += BETWEEN_UPDATES_S
            for speculator in chosen.values():
                speculator.refresh(rollouts, version + 1)
        return cls(joined(calls[LEARNED_CALLS:]), head, history.state_dict(), policy)

    def drafters(self, names: tuple[str, ...]) -> dict[str, Speculator]:
        """The named drafters, in their state before a pass."""
        chosen: list[Speculator] = []
        for name in names:
            if name == "history":
                index = HistorySpeculator()
                index.load_state_dict(self.history)
                chosen.append(index)
            else:
                self.recurrent.learner.end_call()
                chosen.append(self.recurrent)
        return dict(bind_all(chosen, self.policy, Faults(), couples_noise=True))


class Ticking:
    """A clock that advances one distillation step per reading, so that refreshes do equal work on any machine."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += STEP_S
        return self.now_s


class NothingYet(NoSpeculation):
    """Plain decoding beside drafters that only observe."""

    def __init__(self, speculators: tuple[str, ...]) -> None:
        super().__init__()
        self.speculators = speculators  # type: ignore[misc]


def joined(calls: list[Recorded]) -> Recorded:
    """Join several calls into one, as if their requests had run together."""
    each, first = [call.sequences for call in calls], calls[0].sequences
    width = max(one.token_ids.shape[1] for one in each)
    texts = [np.pad(one.token_ids, ((0, 0), (0, width - one.token_ids.shape[1]))) for one in each]
    arrays = [
        np.concatenate([getattr(one, name) for one in each])
        for name in ("lengths", "prompt_lengths", "prompt_keys", "noise_keys")
    ]
    sequences = Sequences(np.concatenate(texts), *arrays, first.sampling, first.vocab_size, first.policy_version, width)
    last = torch.cat([call.head_inputs for call in calls])
    return replace(calls[-1], sequences=sequences, head_inputs=last)


def part_of(recorded: Recorded, requests: np.ndarray) -> Recorded:
    """Some requests of a recorded call, int64 `[n]`, as a separate call."""
    true = recorded.sequences
    completions = true.lengths - true.prompt_lengths
    first = np.cumsum(completions) - completions
    places = np.concatenate([np.arange(first[r], first[r] + completions[r]) for r in requests])
    arrays = (true.token_ids, true.lengths, true.prompt_lengths, true.prompt_keys, true.noise_keys)
    sequences = Sequences(
        *(array[requests] for array in arrays), true.sampling, true.vocab_size, true.policy_version, true.max_length
    )
    return replace(recorded, sequences=sequences, head_inputs=recorded.head_inputs[torch.from_numpy(places)])


def controller_of(arm: str) -> tuple[tuple[str, ...], Controller]:
    """Drafters and controller of an arm, as in an engine."""
    if arm == "off":
        return (), NoSpeculation()
    if arm == "controller":
        names = ("history", "recurrent")
        return names, GuardedController(GoodputController(names), Faults())
    return (arm,), GuardedController(FixedController((arm,), arm, FIXED, ahead=True), Faults())


# --------------------------------------------------------------------------------------------------------------- measure


def measure(args: argparse.Namespace) -> None:
    origin, cells = environment(), []
    if args.keep and args.output.is_file():
        cells = json.loads(args.output.read_text())["cells"]
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # `benchmarks/paced.py` counts only one thread
    for policy in args.policies:
        learned = Learned.of(args.records / policy)
        for name in args.settings:
            costs = Costs(setting_of(name), PADDED.get(name, ()))
            for batch in progress.each(args.batches, f"{policy}, {name}", "cell"):
                if batch > len(learned.recorded.sequences.lengths):
                    continue  # fewer were recorded
                rows = cell(learned, costs, batch, args.passes)
                names = {"setting": name, "policy": policy, "batch": batch}
                cells = [row for row in cells if {key: row[key] for key in names} != names]
                cells += [names | row for row in rows]
                print_cell(names, rows)
                write_result(args.output, {**origin, "cells": cells})
    print(f"written: {args.output}")


def setting_of(name: str) -> Setting:
    """The planner's setting for the device only; the host is real here, not predicted."""
    config, gpu, count, precision = SETTINGS[name]
    model = parse_model(CONFIGS[config])
    machine = Machine(gpu=gpu_named(gpu), num_gpus=count)
    return Setting(
        model=model, machine=machine, drafter=recurrent(model), precision=precision, context=CONTEXT, host=NO_HOST
    )


def cell(learned: Learned, costs: Costs, batch: int, passes: int) -> list[dict[str, Any]]:
    """Every arm of one cell; the first pass of each is not counted."""
    whole = len(learned.recorded.sequences.lengths)
    # Small batches come from different groups; the first requests of a call are one of them.
    begins = np.arange(0, whole, max(batch, GROUP))[: MOST_CALLS.get(batch, 1)]
    parts = [begin + np.arange(batch) for begin in begins]
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        names, controller = controller_of(arm)
        loops: list[PacedLoop] = []
        for turn in range(1 + passes):
            drafters = learned.drafters(names)
            loops = loops if turn > 1 else []
            for part in parts:
                recorded = part_of(learned.recorded, part)
                loop = PacedLoop(recorded, drafters, controller, costs)
                learned.recurrent.follow(learned.recorded, part, loop)
                gc.collect()
                loop.run()
                assert (loop.sequences.lengths == recorded.sequences.lengths).all()
                loops.append(loop)
        rows.append({"arm": arm, **figures(loops)})
        rows[-1]["ratio_to_off"] = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def figures(loops: list[PacedLoop]) -> dict[str, Any]:
    """Figures over all counted passes."""
    reports = [
        loop.recorder.finish(
            step=0, policy_version=0, mode="standalone", num_prompt_tokens=0,
            completion_lengths=loop.sequences.lengths - loop.sequences.prompt_lengths,
        )
        for loop in loops
    ]  # fmt: skip
    seconds = sum(report.generate_s for report in reports)
    busy_s = sum(loop.device.busy_s for loop in loops)
    # The first forward of a call waits for the prefill's first tokens, which is not a step.
    gaps = 1e3 * np.concatenate([loop.device.gaps_s[1:] for loop in loops])
    steps = [step for loop in loops for step in loop.steps]
    return {
        "tokens_per_s": sum(report.num_tokens for report in reports) / seconds,
        "ratio_to_ideal": busy_s / seconds,
        "device_idle_share": 1 - busy_s / seconds,
        "host_exposed_ms": spread(gaps),
        "step_ms": 1e3 * busy_s / len(steps),
        "host_ms": {phase: spread(1e3 * np.array([step[phase] for step in steps])) for phase in steps[0]},
        "accepted_length": sum(r.num_decoded_tokens for r in reports) / sum(r.num_request_forwards for r in reports),
        "drafted": {name: sum(report.drafted[name] for report in reports) for name in reports[0].drafted},
    }


def spread(values: np.ndarray) -> dict[str, float]:
    median, p90 = np.quantile(values, [0.5, 0.9])
    return {"median": round(float(median), 4), "p90": round(float(p90), 4)}


def print_cell(names: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    progress.say(", ".join(str(value) for value in names.values()))
    for row in rows:
        host = " ".join(f"{phase} {one['median']:.2f}" for phase, one in row["host_ms"].items())
        progress.say(
            f"  {row['arm']:>10} {row['tokens_per_s']:8.0f} tok/s  {row['ratio_to_off']:.2f} of off  "
            f"{row['ratio_to_ideal']:.2f} of ideal  exposed {row['host_exposed_ms']['median']:.2f} ms of "
            f"{row['step_ms']:.1f}  length {row['accepted_length']:.2f}  [{host}]"
        )


if __name__ == "__main__":
    main()
