"""TRL's default, float32 weights under bf16 autocast, with Qwen2, whose linear layers have biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_qwen2
from tests.trainers import EOS, WORDS, build_trainer, with_special_tokens, word_tokenizer


@pytest.mark.parametrize("speculation", [False, True])
def test_qwen2_trains_in_bf16_with_the_engine_attached(speculation: bool, tmp_path: Path) -> None:
    """Long enough that requests end one by one: fewer than four rows take another route than the eight before them."""
    model = with_special_tokens(tiny_qwen2(vocab=len(WORDS), seed=1, context=64))
    with torch.no_grad():  # likelier or less likely by the text: requests end on any processor, whatever it rounds to
        model.get_output_embeddings().weight[EOS] *= 3
    options = {"bf16": True, "max_steps": 2, "learning_rate": 1e-2, "max_completion_length": 48}
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, **options)
    engine = AtlasRolloutEngine(console=False, speculation=speculation, audit_share=0.0).attach(trainer)
    before = model.model.layers[0].self_attn.k_proj.bias.detach().clone()
    trainer.train()
    assert [report.num_requests for report in engine.reports] == [8, 8]
    assert min(batch for _, batch in engine.reports[1].active_batch_curve) < 4
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.bias, before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
