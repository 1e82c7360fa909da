"""One rank of small GRPO runs with gloo: `torchrun -m tests.integrations.two_ranks FOLDER`.

In each run the sampled logprobs of one rank are shifted, so that it finds what the other does not, or those of none. Each
rank writes by the shifted rank whether its importance-sampling correction is on in the end, and the forward passes of each
step over its rollouts. An OnlineDPO run follows. They share a launch, because that takes longer than all of them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_llama
from tests.other_trainers import build_other, expected_rows, trained_rows
from tests.ranks import leave_together
from tests.trainers import WORDS, build_trainer, passes_of, with_special_tokens, word_tokenizer


def train_another(folder: Path) -> None:
    """Train a trainer that calls `model.generate`; its rows must be those of generations without speculation."""
    trainer = build_other("online_dpo", folder, ddp_backend="gloo")
    trained = trained_rows(trainer)
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    expected = expected_rows(engine)
    trainer.train()
    assert len(expected) == 2
    assert [sorted(rows) for rows in trained] == [sorted(rows) for rows in expected]
    requests = [report.num_requests for report in engine.reports]
    assert requests == ([16, 16] if trainer.accelerator.is_main_process else []), "those of both ranks in one report"


def train(folder: Path, shifted_rank: int | None) -> tuple[int, dict[str, Any]]:
    """Train three steps with an engine on every rank; returns the rank, and what it found."""
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    trainer = build_trainer("grpo", model, word_tokenizer(), folder, ddp_backend="gloo")
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == 2
    rollout = engine.rollout

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = rollout(*args, **kwargs)
        by = 0.5 * (rank == shifted_rank)
        return replace(output, logprobs=[[value + by for value in row] for row in output.logprobs])

    engine.rollout = shifted  # type: ignore[method-assign]
    passes = passes_of(trainer)
    trainer.train()
    found = {"corrected": trainer.vllm_importance_sampling_correction, "passes": [passes.count(s) for s in range(3)]}
    return rank, found


def main(folder: Path) -> None:
    found = {}
    for shifted_rank in (0, 1, None):
        rank, found[str(shifted_rank)] = train(folder / f"shifted{shifted_rank}", shifted_rank)
    train_another(folder / f"other{rank}")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
