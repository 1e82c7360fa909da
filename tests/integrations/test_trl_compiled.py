"""TRL's `torch_compile=True`: the step trains what is compiled, and rollouts run the policy's own code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_llama
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer


@pytest.fixture(autouse=True)
def compiled_anew(accelerate_anew: Any) -> Any:
    """transformers tells accelerate by the environment."""
    torch._dynamo.reset()
    with mock.patch.dict(os.environ):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_trainer_that_compiles_trains_with_the_engine_attached(tmp_path: Path) -> None:
    model = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2, "learning_rate": 1e-2}
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, **options)
    engine = AtlasRolloutEngine(console=False, audit_share=1.0).attach(trainer)
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert [report.num_requests for report in engine.reports] == [8, 8]
    assert not any(report.warnings for report in engine.reports)
    assert not torch.equal(model.lm_head.weight, before)
    assert torch._dynamo.utils.counters["frames"]["ok"]
