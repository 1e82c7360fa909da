"""What changes a drafter's tensors on purpose is not reported as a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_bigram
from tests.vllm_engines import engine  # first: it skips this module where there is no vLLM

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10]]


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_bigram(vocab=64, hidden=64, heads=2, kv_heads=2, context=128, logit_std=3.0)


def test_drafters_that_are_loaded_between_two_calls_are_not_called_lost(folder: Path, tmp_path: Path) -> None:
    made = AtlasRolloutEngine(model=engine(folder, max_num_seqs=16), console=False)

    def generate(seed: int) -> tuple[str, ...]:
        given: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": [0], "num_generations": 4}
        return made.generate(PROMPTS, seed=seed, **given).report.warnings

    for seed in range(2):
        generate(seed)
        made.policy_updated()
        if not seed:
            made.save_drafters(tmp_path / "drafters.safetensors")
    made.load_drafters(tmp_path / "drafters.safetensors")
    assert not [warning for warning in generate(2) if "its tensors changed" in warning]
