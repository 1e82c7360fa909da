"""Runs on a GPU, in one go, what has waited for one (docs/gpu.md), within the ten minutes that such a machine may be lent.

    python -m benchmarks.gpu.texts runs/gpu/texts.npz           # where the demo is installed, and bring the file along
    python -m benchmarks.gpu.waiting runs/gpu --commit HASH     # on the GPU, from the root of the checkout
    python -m benchmarks.gpu.waiting runs/gpu --rehearse        # without one: tiny policies, whether the commands run

Nothing has to be installed as a package, and nothing is downloaded: torch, Triton, transformers, numba, peft and pytest
are enough. A part that fails or takes longer than its share does not keep the next one from running. What a part has found
by then is in its file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import ROOT, write_result

BUDGET_S = 560.0
_LEAST_S = 5.0  # a part is not begun with less


@dataclass(frozen=True, slots=True)
class Part:
    """A command.

    Attributes:
        name: Of its log, NAME.log.
        limit_s: Seconds that it may take.
        arguments: Behind `python -m`.
    """

    name: str
    limit_s: float
    arguments: tuple[str, ...]


def parts_of(folder: Path, commit: str | None, rehearsal: bool) -> list[Part]:
    """What is run, the most important first: whether results are right, then how fast."""
    policy, texts = str(folder / "policy"), str(folder / "texts.npz")
    origin = () if commit is None else ("--commit", commit)
    tests = "pytest", "-q", "-p", "no:cacheprovider", "-n0"
    measured = "benchmarks.gpu", "--policy", policy, "--texts", texts, *origin
    trained = "benchmarks.gpu.policy", texts, policy
    peers = "benchmarks.gpu.peers", *origin, "--output", str(folder / "peers.json")
    compiled = Part("compile", 75, ("atlas_rl.decode.compile_kernels",))  # for the CPU, once per machine
    if rehearsal:
        return [
            compiled,
            Part("tests", 200, (*tests, "tests/gpu/test_on_a_device.py")),
            Part("policy", 60, (*trained, "--size", "tiny", "--seconds", "1", "--batch-tokens", "512")),
            Part("measurements", 60, (*measured, "--help")),
            Part("peers", 120, (*peers, "--sizes", "tiny", "--batches", "2", "--vocab", "128", "--max-new-tokens", "8")),
        ]  # fmt: skip
    short = "--repeats", "1", "--max-new-tokens", "64"
    wanted = "--parts", "graphs", "drafts", "arms", "autocast", "kernels", "--batches", "8", "32"
    return [
        compiled,
        Part("tests", 150, (*tests, "tests/gpu/test_on_a_device.py")),
        Part("policy", 70, trained),
        Part("measurements", 140, (*measured, *wanted, *short, "--output", str(folder / "decode.json"))),
        Part("peers", 120, (*peers, *short)),
        Part("kernels", 120, (*tests, "tests/kernels", "--ignore=tests/kernels/test_aot.py")),
    ]


def run(part: Part, limit_s: float, folder: Path) -> dict[str, float | int | str]:
    """Run a part, and print the end of its log; its `outcome` is an exit status, or that time was up."""
    paths = [str(ROOT), str(ROOT / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    log, began_s = folder / f"{part.name}.log", time.perf_counter()
    outcome: int | str
    with log.open("w", encoding="utf-8") as written:
        try:
            outcome = subprocess.run(
                [sys.executable, "-u", "-m", *part.arguments], cwd=ROOT, env=environment, stdout=written,
                stderr=subprocess.STDOUT, timeout=limit_s, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit_s:.0f} s"
    seconds = time.perf_counter() - began_s
    tail = log.read_text(encoding="utf-8").splitlines()[-12:]
    print("\n".join([f"--- {part.name}: {seconds:.0f} s, {outcome}", *tail]), flush=True)
    return {"part": part.name, "seconds": seconds, "outcome": outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has texts.npz, and gets the policy, logs and results")
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: whether the commands run")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not (folder / "texts.npz").exists():
        parser.error(
            f"{folder / 'texts.npz'} is missing: write it with benchmarks.gpu.texts where the demo is installed"
        )
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("torch finds no GPU; --rehearse runs the commands without one")
    began_s, found = time.perf_counter(), []
    for part in parts_of(folder, args.commit, args.rehearse):
        left_s = args.seconds - (time.perf_counter() - began_s)
        if left_s < _LEAST_S:
            found.append({"part": part.name, "seconds": 0.0, "outcome": "no time was left"})
            continue
        found.append(run(part, min(part.limit_s, left_s), folder))
        write_result(folder / "waiting.json", {"parts": found})
    print("\n".join(f"{row['part']:14} {row['seconds']:6.0f} s  {row['outcome']}" for row in found))
    if any(row["outcome"] != 0 for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
