"""The audit of policies that compute in less than their weights' type: no false alarm, and the true one still comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from atlas_rl import AtlasRolloutEngine
from atlas_rl.audit.auditor import Auditor
from atlas_rl.audit.plain_forward import plain_logits
from tests.audit.audits import asked, audit, sample
from tests.engines import policy
from tests.models import tiny_bigram, tiny_llama
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

TOKENS, PLACES = torch.tensor([3, 5, 7, 2]), torch.arange(4)

pytestmark = pytest.mark.usefixtures("accelerate_anew")


class Int8Linear(nn.Module):
    """LLM.int8's way to multiply, on a CPU: rows of inputs and weights as bytes, results in the inputs' type."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale[:, 0].detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
        return functional.linear((x / scale).round(), self.weight.to(x.dtype)) * scale * self.scale


def with_int8(model: Any) -> Any:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(module, name, Int8Linear(child))
    return model


def mixed(model: Any) -> Any:
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    return model


POLICIES = {
    "float32": (lambda: tiny_llama(seed=11), True),
    "bf16 weights": (lambda: tiny_llama(seed=11).to(torch.bfloat16), False),
    "autocast": (lambda: mixed(tiny_llama(seed=11)), False),
    "autocast around LoRA": (lambda: mixed(get_peft_model(tiny_llama(seed=11), LORA)), False),
    "int8": (lambda: with_int8(tiny_llama(seed=11)), False),
}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", POLICIES)
def test_precision_is_that_of_the_computation(name: str) -> None:
    build, full = POLICIES[name]
    assert plain_logits(build(), TOKENS, PLACES).full_precision is full


@pytest.mark.parametrize("name", POLICIES)
def test_no_false_alarm(name: str) -> None:
    engine = AtlasRolloutEngine(model=POLICIES[name][0](), console=False, speculation=False, audit_share=1.0)
    for seed in range(3):
        report = sample(engine=engine, seed=seed, num_generations=2).report
        assert report.num_audited_tokens > 0
        assert not report.warnings


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
def test_thirty_steps_of_training_in_bf16_raise_no_alarm(peft: bool, tmp_path: Path) -> None:
    """TRL's default: float32 weights and `bf16=True`, every completion audited."""
    model = tiny_bigram(vocab=len(WORDS), hidden=64, heads=4, kv_heads=2, context=64, seed=1, logit_std=2.5)
    trainer = build_trainer(
        "grpo", with_special_tokens(model), word_tokenizer(), tmp_path, peft=peft, bf16=True, max_steps=30
    )
    engine = AtlasRolloutEngine(console=False, audit_share=1.0).attach(trainer)
    trainer.train()
    assert len(engine.reports) == 30
    assert all(report.num_audited_tokens for report in engine.reports)
    assert [report.warnings for report in engine.reports if report.warnings] == []


def test_other_weights_are_still_found_in_mixed_precision() -> None:
    other = tiny_llama(seed=11)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.2)
    findings = audit(
        sample(other, num_generations=4), asked(), model=mixed(tiny_llama(seed=11)), logprobs=True
    ).findings
    assert any("other weights" in finding for finding in findings)


def test_the_wrapper_is_what_is_audited() -> None:
    """Samples of the model inside are not those of a wrapper that computes: the audit of the wrapper sees it."""

    class Sharpened(nn.Module):
        """What a value head, a steering vector or a PEFT method of its own may be to a trainer."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            output = self.model(**inputs)
            output.logits = output.logits * 2
            return output

        def get_input_embeddings(self) -> nn.Module:
            return self.model.get_input_embeddings()

    output = sample(num_generations=4)
    assert not audit(output, asked(), auditor=Auditor(1.0), logprobs=True).findings
    findings = audit(output, asked(), model=Sharpened(policy()), logprobs=True).findings
    assert any("returned logprobs differ" in finding for finding in findings)
