"""What a call in vLLM would take without speculation, on a clock that only forwards move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.core import Sequences
from atlas_rl.vllm.internals import drafter_of, runner_of
from tests.drafters import RandomDrafter
from tests.models import tiny_bigram
from tests.vllm_engines import engine  # first: it skips this module where there is no vLLM

PROMPTS = [list(range(2, 2 + n)) for n in (3, 40, 17, 40, 9, 25)]


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_bigram(vocab=64, hidden=64, heads=2, kv_heads=2, context=128, logit_std=3.0)


class Clock:
    """Stands still but for forwards, which take a hundredth of a second per token."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        (embedding,) = [module for name, module in model.named_modules() if name.endswith("embed_tokens")]

        def tick(module: torch.nn.Module, arguments: Any) -> None:
            self.now_s += 0.01 * arguments[0].numel()

        hook = embedding.register_forward_pre_hook(tick)
        try:
            yield
        finally:
            hook.remove()


class NeverReady(RandomDrafter):
    """Does not draft, so that the run itself says what a run without drafts takes."""

    def backlog(self, sequences: Sequences, requests: np.ndarray) -> int | None:
        return None


def test_prompts_that_run_beside_decoding_requests_are_counted_once(folder: Path) -> None:
    """The forwards' seconds are as many as their tokens, in whatever forwards they run."""
    llm, clock = engine(folder, max_num_seqs=16, max_num_batched_tokens=64), Clock()
    made = AtlasRolloutEngine(
        model=llm,
        speculators=[NeverReady()],
        controller=FixedController(["random"], "random", 3),
        console=False,
        clock=clock,
    )
    drafter: Any = drafter_of(llm)
    with clock.watching(runner_of(llm).get_model()):
        for seed in range(3):
            report = made.generate(
                PROMPTS, num_generations=2, max_new_tokens=60, eos_token_ids=[0, 1], seed=seed
            ).report
            assert drafter.drafting._plain_costs.mixed, "prompts must run beside decoding requests for this test"
            assert report.generate_s > 0
            assert report.no_speculation_s == pytest.approx(report.generate_s, rel=0.01)
