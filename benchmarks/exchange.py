"""Measures what ranks gain from an exchange: accepted length per epoch with 1, 2 and 4 ranks, shared or separate.

    python -m benchmarks.exchange                     # some twenty minutes on two cores

GRPO of a tiny random policy over sixteen prompts, six epochs, drafts of four tokens by one drafter alone. Together, the
history index gets the rollouts of all ranks, and the recurrent head the mean of all ranks' weights. A step has the same
eight prompts' groups of two whatever the number of ranks. Each rank draws with a seed of its own, so that arms with
different numbers of ranks have different rollouts; arms of one number of ranks have the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.base import Speculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.common import ROOT, environment, write_result
from tests.models import tiny_bigram, tiny_llama
from tests.trainers import arguments, with_special_tokens

RESULT = ROOT / "benchmarks" / "results" / "exchange_cpu.json"
PROMPTS, ROWS_PER_STEP, EPOCHS = 16, 16, 6
STEPS_PER_EPOCH = 2 * PROMPTS // ROWS_PER_STEP
# A tiny policy's steps are short: the head's usual share, a twentieth of them, is one update each.
DRAFTERS: dict[str, Callable[[], Speculator]] = {
    "recurrent": partial(RecurrentSpeculator, budget_share=1.0),
    "history": HistorySpeculator,
}
VOCAB = {"recurrent": 128, "history": 512}
# A head can learn within a few updates that the next token depends on the last one. An index needs recurring texts.
POLICIES = {"recurrent": partial(tiny_bigram, logit_std=6), "history": partial(tiny_llama, logit_std=14)}
RANKS = ((1, "together"), (2, "together"), (2, "apart"), (4, "together"), (4, "apart"))


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(vocab - 2))]
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="w0")


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def arm(folder: Path, drafter: str, way: str) -> NoReturn:
    """Run one rank of one arm and end the process; rank 0 writes the figures."""
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    prompts = [
        " ".join(f"w{(37 * row + 11 * word) % (VOCAB[drafter] - 2)}" for word in range(4)) for row in range(PROMPTS)
    ]
    args = arguments(
        GRPOConfig,
        folder,
        per_device_train_batch_size=ROWS_PER_STEP // world,
        num_generations=2,
        max_completion_length=32,
        max_steps=STEPS_PER_EPOCH * EPOCHS,
        learning_rate=1e-5,
        ddp_backend="gloo",
    )
    trainer = GRPOTrainer(
        model=with_special_tokens(POLICIES[drafter](vocab=VOCAB[drafter], hidden=64, context=96, seed=3)),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer(VOCAB[drafter]),
    )
    controller, speculators = FixedController([drafter], drafter, 4), [DRAFTERS[drafter]()]
    engine = AtlasRolloutEngine(console=False, audit_share=0, speculators=speculators, controller=controller)
    engine.attach(trainer)
    if way == "apart":
        engine._adapter._exchange = None
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / "figures.json").write_text(
            json.dumps({"drafter": drafter, "ranks": world, "drafters": way} | figures(engine))
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that exits normally


def figures(engine: AtlasRolloutEngine) -> dict[str, Any]:
    epochs = [
        engine.reports[begin : begin + STEPS_PER_EPOCH] for begin in range(0, len(engine.reports), STEPS_PER_EPOCH)
    ]
    tokens = [sum(report.num_decoded_tokens for report in epoch) for epoch in epochs]
    forwards = [sum(report.num_request_forwards for report in epoch) for epoch in epochs]
    return {
        "accepted_length_by_epoch": [round(t / f, 3) for t, f in zip(tokens, forwards, strict=True)],
        "refresh_s_per_step": round(sum(report.refresh_s for report in engine.reports) / len(engine.reports), 4),
        "entropy_nats": engine.reports[0].entropy,
    }


def kept(output: Path, drafters: list[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run for drafters that this run leaves out."""
    earlier = json.loads(output.read_text()) if output.exists() else {"arms": []}
    return [{"commit": earlier["commit"], **row} for row in earlier["arms"] if row["drafter"] not in drafters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--rank-of", nargs=3, metavar=("FOLDER", "DRAFTER", "WAY"), help="be one rank of one arm, under torchrun"
    )
    parser.add_argument(
        "--drafters",
        nargs="+",
        default=list(DRAFTERS),
        choices=list(DRAFTERS),
        help="rows of the others are kept as the output file has them",
    )
    args = parser.parse_args()
    if args.rank_of:
        arm(Path(args.rank_of[0]), *args.rank_of[1:])
    rows = kept(args.output, args.drafters)
    arms = [(drafter, ranks, way) for drafter in args.drafters for ranks, way in RANKS]
    for drafter, ranks, way in progress.each(arms, "arms", "arm"):
        with tempfile.TemporaryDirectory() as folder:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            command = [*launch, "-m", "benchmarks.exchange", "--rank-of", folder, drafter, way]
            subprocess.run(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
            )
            rows.append(json.loads((Path(folder) / "figures.json").read_text()))
            progress.say(rows[-1])
    write_result(args.output, {"command": "python -m benchmarks.exchange", **environment(), "arms": rows})


if __name__ == "__main__":
    main()
