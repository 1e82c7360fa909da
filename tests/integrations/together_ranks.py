"""One of two gloo ranks, of which one fails before a collective: `torchrun -m tests.integrations.together_ranks FOLDER`.

Each rank writes what it got and what was raised in it. A rank that waited for the other would never write.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator

from atlas_rl import AtlasRolloutEngine
from atlas_rl.integrations.trl.exchange import ExchangeCallback
from atlas_rl.integrations.trl.together import of_all_ranks, of_main_rank, on_all_ranks
from tests.models import tiny_llama
from tests.ranks import leave_together
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

FAILING = 1


def raised(call: Callable[[], object]) -> str:
    """The kind and the message of what a call raises."""
    try:
        call()
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing_on(rank: int, own: int, kind: type[Exception]) -> Callable[[], str]:
    """A function that raises on one rank."""

    def call() -> str:
        if own == rank:
            raise kind("on purpose")
        return "fine"

    return call


class Sharing:
    """A drafter that shares its rank's number, and may fail."""

    def __init__(self, rank: int, fails_in: str = "") -> None:
        self.rank, self.fails_in, self.taken = rank, fails_in, 0.0

    def shared(self) -> torch.Tensor:
        self._fail("shared")
        return torch.tensor([1.0 + self.rank])

    def take_shared(self, total: torch.Tensor) -> None:
        self._fail("take_shared")
        self.taken = float(total)

    def _fail(self, where: str) -> None:
        if self.rank == FAILING and self.fails_in == where:
            raise RuntimeError(f"{where} on purpose")


def exchanged(accelerator: Accelerator, fails_in: str) -> dict[str, Any]:
    """A step's exchange between drafters, of which the first fails on one rank."""
    rank = accelerator.process_index
    drafters = {"first": Sharing(rank, fails_in), "second": Sharing(rank)}
    callback = ExchangeCallback(SimpleNamespace(accelerator=accelerator))
    callback.refreshed(cast(Any, drafters))
    error = raised(lambda: callback.on_step_end(*[cast(Any, None)] * 3))
    return {"raised": error, "taken": [drafter.taken for drafter in drafters.values()]}


def unattached(accelerator: Accelerator, folder: Path) -> dict[str, str]:
    """What attaching raises if something is wrong on one rank alone, and then a run of the same trainer."""
    fails = accelerator.process_index == FAILING
    own = folder / f"rank{accelerator.process_index}"
    policy = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    policy.save_pretrained(own / "draft")
    trainer = built(own)
    seen = {}
    without_draft = AtlasRolloutEngine(console=False, draft_model=own / "draft")
    if fails:
        shutil.rmtree(own / "draft")
    seen["no draft model"] = raised(lambda: without_draft.attach(trainer))
    damaged = AtlasRolloutEngine(console=False)
    damaged.load_state_dict({"history": {"damaged": 1}} if fails else {})
    seen["damaged state"] = raised(lambda: damaged.attach(trainer))
    assert not trainer.use_vllm
    trainer.max_completion_length = trainer.args.max_completion_length = 0 if fails else 12
    seen["other option"] = raised(lambda: AtlasRolloutEngine(console=False).attach(trainer))
    trainer.max_completion_length = trainer.args.max_completion_length = 12
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    assert len(engine.reports) == (1 if accelerator.is_main_process else 0)
    by_function = AtlasRolloutEngine(console=False)
    by_function.load_state_dict({"history": {"damaged": 1}} if fails else {})
    seen["first rollout"] = raised(built(own, rollout_func=by_function).train)
    return seen


def built(folder: Path, **options: Any) -> Any:
    """A GRPO trainer of one step."""
    policy = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    return build_trainer("grpo", policy, word_tokenizer(), folder, max_steps=1, ddp_backend="gloo", **options)


def main(folder: Path) -> None:
    """Call everything in the same order on both ranks."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    seen = {
        "of_all": of_all_ranks(accelerator, "counting", lambda: 10 * rank),
        "own": on_all_ranks(accelerator, "counting", lambda: 10 * rank),
        "of_main": of_main_rank(accelerator, lambda: f"from rank {rank}"),
        "one_fails": raised(lambda: of_all_ranks(accelerator, "counting", failing_on(FAILING, rank, KeyError))),
        "main_fails": [
            raised(lambda: of_main_rank(accelerator, failing_on(0, rank, kind)))  # noqa: B023 - called at once
            for kind in (ConnectionRefusedError, ValueError, KeyError)
        ],
        "exchange": {fails_in: exchanged(accelerator, fails_in) for fails_in in ("", "shared", "take_shared")},
        "unattached": unattached(accelerator, folder),
        "in_step": of_all_ranks(accelerator, "counting", lambda: rank),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
